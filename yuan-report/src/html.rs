//! The run as one HTML page that needs nothing else: no network, no script, no other file.
//!
//! Every number names where it comes from. `<data value="4.35" data-line="17"
//! data-pointer="/loss">` is the number at the JSON pointer `/loss` of line 17 of the metrics file;
//! `data-derived` says how one was calculated from many. The text inside is the value, rounded.

use std::{fmt::Write, path::Path};

use serde_json::Value;
use yuan_laep::{LayerLoad, PrunePlan};
use yuan_train::{Event, RolloutMetrics};

use crate::{
    Answer, History, ReportError,
    pictures::{self, SeedRuns},
    table,
};

/// The report of a run called `name` in `run_dir`, with what its model answered about images, or why
/// that is not known.
///
/// # Errors
///
/// If a picture cannot be drawn.
pub fn html_report(
    name: &str,
    history: &History,
    run_dir: &Path,
    answers: Result<&[Answer], &str>,
) -> Result<String, ReportError> {
    let mut page = Page { history, html: String::new() };
    page.summary();
    page.rollouts()?;
    page.heading("Loss");
    let caption = match history.rollouts(false).next() {
        None => "Training and validation loss. Lower is better.",
        Some(_) => "The loss of the policy, whose gradient is what matters: it need not fall.",
    };
    page.figure(&pictures::loss(history)?, caption);
    page.validations();
    page.prunes()?;
    page.devices()?;
    page.loads()?;
    page.images()?;
    match answers {
        Ok(answers) => page.answers(run_dir, answers),
        Err(reason) => {
            page.heading("Answers");
            page.paragraph(&format!("The answers cannot be shown: {reason}."));
        }
    }
    Ok(document(name, &page.html))
}

/// A whole page with a title above its body, which is HTML.
pub(crate) fn document(title: &str, body: &str) -> String {
    let (title, style) = (escape(title), include_str!("html.css"));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n\
         <h1>{title}</h1>\n{body}</body>\n</html>\n"
    )
}

/// A table whose cells are HTML.
pub(crate) fn table_of(head: &[String], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, cells: &[String]| -> String {
        let cells: String = cells.iter().map(|cell| format!("<{tag}>{cell}</{tag}>")).collect();
        format!("<tr>{cells}</tr>")
    };
    let body: String = rows.iter().map(|row| cells("td", row)).collect();
    let head = cells("th", head);
    format!("<div class=\"table\"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>")
}

struct Page<'a> {
    history: &'a History,
    html: String,
}

/// How a number is shown.
#[derive(Clone, Copy)]
enum Show {
    /// With so many decimals.
    Fixed(usize),
    /// In per cent, with so many decimals.
    Percent(usize),
    /// In millions.
    Millions,
    /// In millions of bytes.
    Megabytes,
}

impl Show {
    fn text(self, value: f64) -> String {
        match self {
            Self::Fixed(decimals) => format!("{value:.decimals$}"),
            Self::Percent(decimals) => format!("{:.decimals$} %", 100.0 * value),
            Self::Millions => format!("{:.2} M", value / 1e6),
            Self::Megabytes => format!("{:.1} MB", value / 1e6),
        }
    }
}

/// A line of the metrics file.
struct Line {
    index: usize,
    event: Value,
}

impl Line {
    /// The number at a JSON pointer; a dash where there is none.
    fn number(&self, pointer: &str, show: Show) -> String {
        let Some(value) = self.event.pointer(pointer).and_then(Value::as_f64) else {
            return "-".into();
        };
        let (line, text) = (self.index + 1, show.text(value));
        format!(
            "<data value=\"{value}\" data-line=\"{line}\" data-pointer=\"{pointer}\">{text}</data>"
        )
    }

    fn len(&self, pointer: &str) -> usize {
        self.event.pointer(pointer).and_then(Value::as_array).map_or(0, Vec::len)
    }

    /// A row per layer with the numbers below `list`.
    fn rows(&self, list: &str, columns: &[(&str, &str, Show)]) -> Vec<Vec<String>> {
        let row = |layer: usize| {
            let cells = columns
                .iter()
                .map(|(_, key, show)| self.number(&format!("{list}/{layer}/{key}"), *show));
            std::iter::once(layer.to_string()).chain(cells).collect()
        };
        (0..self.len(list)).map(row).collect()
    }
}

/// Titles of a table with a row per layer.
fn titles(columns: &[(&str, &str, Show)]) -> Vec<String> {
    std::iter::once("layer")
        .chain(columns.iter().map(|(title, ..)| *title))
        .map(str::to_owned)
        .collect()
}

impl Page<'_> {
    fn line(&self, index: usize) -> Line {
        Line {
            index,
            event: serde_json::to_value(&self.history.events()[index]).unwrap_or_default(),
        }
    }

    fn push(&mut self, text: &str) {
        self.html.push_str(text);
        self.html.push('\n');
    }

    fn heading(&mut self, text: &str) {
        self.push(&format!("<h2>{}</h2>", escape(text)));
    }

    fn paragraph(&mut self, html: &str) {
        self.push(&format!("<p>{html}</p>"));
    }

    fn figure(&mut self, svg: &str, caption: &str) {
        let caption = escape(caption);
        self.push(&format!(
            "<figure>{svg}<figcaption class=\"dim\">{caption}</figcaption></figure>"
        ));
    }

    fn table(&mut self, head: &[String], rows: &[Vec<String>]) {
        self.push(&table_of(head, rows));
    }

    fn derived(value: f64, how: &str, show: Show) -> String {
        format!(
            "<data value=\"{value}\" data-derived=\"{}\">{}</data>",
            escape(how),
            show.text(value)
        )
    }

    /// Parameters, experts, speed and loss, a column per stage.
    fn summary(&mut self) {
        self.heading("Summary");
        let stages = self.history.stages();
        if stages.is_empty() {
            self.paragraph("Nothing was recorded.");
            return;
        }
        let mut head = vec![String::new()];
        head.extend(table::stage_titles(self.history).iter().map(|title| escape(title)));
        let names = [
            "parameters",
            "experts",
            "tokens per second",
            "validation loss",
            "busiest expert / mean, worst layer",
        ];
        let mut rows = names.map(|name| vec![name.to_owned()]);
        for (i, stage) in stages.iter().enumerate() {
            // A prune says what the model became, the start what it was.
            let model = self.line(stage.lines.model);
            let after = match i {
                0 => ("/parameters", "/experts_per_layer"),
                _ => ("/parameters_after", "/experts_after"),
            };
            let speed = stage.tokens_per_second.map(|speed| {
                Self::derived(speed, &format!("median speed of stage {i}"), Show::Fixed(0))
            });
            let validation =
                stage.lines.validation.map(|at| self.line(at).number("/loss", Show::Fixed(4)));
            let cells = [
                model.number(after.0, Show::Millions),
                Self::experts(&model, after.1),
                speed.unwrap_or_else(|| "-".into()),
                validation.unwrap_or_else(|| "-".into()),
                stage
                    .lines
                    .load
                    .map_or_else(|| "-".into(), |at| Self::worst_imbalance(&self.line(at))),
            ];
            rows.iter_mut().zip(cells).for_each(|(row, cell)| row.push(cell));
        }
        self.table(&head, &rows);
        if let [before, .., after] = &stages[..]
            && let (Some(before), Some(after)) = (before.tokens_per_second, after.tokens_per_second)
        {
            let measured = Self::derived(after / before, "gain in median speed", Show::Fixed(3));
            let predicted: Vec<String> = stages[1..]
                .iter()
                .map(|stage| self.line(stage.lines.model).number("/predicted_gain", Show::Fixed(3)))
                .collect();
            self.paragraph(&format!(
                "Tokens per second after over before, as measured: {measured}; as the efficiency model predicts \
                 it for each prune: {}.",
                predicted.join(", ")
            ));
        }
    }

    /// The experts of every layer, where they are few enough to be read.
    fn experts(model: &Line, list: &str) -> String {
        let layers = model.len(list);
        let number = |i: usize| model.number(&format!("{list}/{i}"), Show::Fixed(0));
        if layers > 12 {
            let count =
                |i: &usize| model.event.pointer(&format!("{list}/{i}")).and_then(Value::as_u64);
            let (fewest, most) = ((0..layers).min_by_key(count), (0..layers).max_by_key(count));
            return format!("{} to {}", number(fewest.unwrap_or(0)), number(most.unwrap_or(0)));
        }
        (0..layers).map(number).collect::<Vec<_>>().join(" ")
    }

    fn worst_imbalance(load: &Line) -> String {
        let pointer = |layer: usize| format!("/statistics/{layer}/max_over_mean");
        let value = |layer: &usize| {
            load.event.pointer(&pointer(*layer)).and_then(Value::as_f64).unwrap_or(0.0)
        };
        let worst = (0..load.len("/statistics")).max_by(|a, b| value(a).total_cmp(&value(b)));
        worst.map_or_else(|| "-".into(), |layer| load.number(&pointer(layer), Show::Fixed(2)))
    }

    fn validations(&mut self) {
        let lines =
            self.history.lasting().filter(|(_, event)| matches!(event, Event::Validation { .. }));
        let row = |(index, _)| {
            let line = self.line(index);
            vec![line.number("/step", Show::Fixed(0)), line.number("/loss", Show::Fixed(4))]
        };
        let rows: Vec<Vec<String>> = lines.map(row).collect();
        if !rows.is_empty() {
            self.table(&["step".into(), "validation loss".into()], &rows);
        }
    }

    /// What LAEP did, in the order in which it happened.
    fn prunes(&mut self) -> Result<(), ReportError> {
        for index in 0..self.history.events().len() {
            match &self.history.events()[index] {
                Event::Prune { round, plan, .. } => self.prune(&self.line(index), *round, plan)?,
                Event::Rearrange { .. } => {
                    let line = self.line(index);
                    self.paragraph(&format!(
                        "After step {} all experts were spread over the device groups anew.{}",
                        line.number("/step", Show::Fixed(0)),
                        Self::moved(&line)
                    ));
                }
                Event::Guard { loss, satisfied, .. } => {
                    let line = self.line(index);
                    let measured = line.number("/loss", Show::Fixed(4));
                    let verdict = match (loss, satisfied) {
                        (None, _) => "the loss is not a number: the prune is undone".into(),
                        (_, true) => {
                            format!("the validation loss {measured} is within it: the prune stays")
                        }
                        (_, false) => {
                            format!("the validation loss {measured} is not: the prune is undone")
                        }
                    };
                    self.paragraph(&format!(
                        "Guard, step {}: at most {} is allowed; {verdict}.",
                        line.number("/step", Show::Fixed(0)),
                        line.number("/allowed_loss", Show::Fixed(4)),
                    ));
                }
                Event::RollBack { .. } => {
                    let to = self.line(index).number("/to_step", Show::Fixed(0));
                    self.paragraph(&format!(
                        "The run went back to step {to} and on without pruning."
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn prune(&mut self, line: &Line, round: usize, plan: &PrunePlan) -> Result<(), ReportError> {
        self.heading(&format!("Prune {round}"));
        self.paragraph(&format!(
            "After step {}: {} parameters to {}. The pruned experts carried {} of the load.{}",
            line.number("/step", Show::Fixed(0)),
            line.number("/parameters_before", Show::Millions),
            line.number("/parameters_after", Show::Millions),
            line.number("/pruned_load", Show::Percent(2)),
            Self::moved(line)
        ));
        let columns = [
            ("experts", "experts", Show::Fixed(0)),
            ("kept", "kept", Show::Fixed(0)),
            ("pruned", "pruned", Show::Fixed(0)),
            ("pruned load", "pruned_load", Show::Percent(2)),
            ("busiest / mean", "max_over_mean", Show::Fixed(2)),
            ("groups before", "groups_before", Show::Fixed(3)),
            ("groups after", "groups_after", Show::Fixed(3)),
            ("optimum", "optimum", Show::Fixed(3)),
            ("bound", "lower_bound", Show::Fixed(3)),
        ];
        self.table(&titles(&columns), &line.rows("/layers", &columns));
        self.paragraph(
            "<span class=\"dim\">Groups: load of the busiest device group over the mean, the experts in their old \
             order and in the new one; the optimum is searched for up to 16 experts, the bound holds for any \
             arrangement.</span>",
        );
        self.figure(&pictures::load_profile(plan)?, "Experts by load; what the plan takes is red.");
        self.figure(&pictures::device_groups(plan)?, "Device groups before and after the plan.");
        Ok(())
    }

    /// How prompts were answered, where the run learns from rewards.
    fn rollouts(&mut self) -> Result<(), ReportError> {
        let Some(picture) = pictures::rollouts(&[SeedRuns::of(self.history)])? else {
            return Ok(());
        };
        self.heading("Rewards");
        self.figure(
            &picture,
            "Strong: held-out prompts. Thin: the answers that the model learns from.",
        );
        let of_held_out = |(_, event): &(usize, &Event)| {
            matches!(event, Event::Rollout(RolloutMetrics { held_out: true, .. }))
        };
        let lines: Vec<usize> =
            self.history.lasting().filter(of_held_out).map(|(index, _)| index).collect();
        let ends = lines.first().into_iter().chain(lines.last().filter(|_| lines.len() > 1));
        let columns = [
            ("step", "/step", Show::Fixed(0)),
            ("right", "/right", Show::Percent(1)),
            ("reward", "/reward", Show::Fixed(3)),
            ("tokens of an answer", "/tokens", Show::Fixed(1)),
            ("cut off", "/cut_off", Show::Percent(1)),
        ];
        let row = |&index: &usize| {
            let line = self.line(index);
            columns.iter().map(|(_, pointer, show)| line.number(pointer, *show)).collect()
        };
        let rows: Vec<Vec<String>> = ends.map(row).collect();
        if !rows.is_empty() {
            self.paragraph("Held-out prompts at the beginning and at the end:");
            let head: Vec<String> = columns.iter().map(|(name, ..)| (*name).to_owned()).collect();
            self.table(&head, &rows);
        }
        Ok(())
    }

    /// How much went from device to device, if anything did.
    fn moved(line: &Line) -> String {
        if line.event.pointer("/bytes_moved").and_then(Value::as_u64).unwrap_or(0) == 0 {
            return String::new();
        }
        let moved = line.number("/bytes_moved", Show::Megabytes);
        format!(" {moved} of experts and moments moved to other devices.")
    }

    /// The ranks that share the experts, if there were several.
    fn devices(&mut self) -> Result<(), ReportError> {
        if let Some(picture) = pictures::device_load(self.history)? {
            self.heading("Device load");
            self.figure(
                &picture,
                "Rows that the experts of the busiest device computed, over the mean of all.",
            );
        }
        Ok(())
    }

    fn loads(&mut self) -> Result<(), ReportError> {
        self.heading("Expert load");
        self.figure(&pictures::expert_load(self.history)?, "Each cell is one expert.");
        self.figure(
            &pictures::load_history(self.history)?,
            "Each line is one expert; dead ones lie on the axis.",
        );
        let last =
            self.history.lasting().filter(|(_, event)| matches!(event, Event::Load { .. })).last();
        let Some(line) = last.map(|(index, _)| self.line(index)) else { return Ok(()) };
        let columns = [
            ("min", "min", Show::Fixed(0)),
            ("max", "max", Show::Fixed(0)),
            ("mean", "mean", Show::Fixed(1)),
            ("max / mean", "max_over_mean", Show::Fixed(2)),
            ("variation", "coefficient_of_variation", Show::Fixed(3)),
            ("Gini", "gini", Show::Fixed(3)),
            ("entropy", "entropy", Show::Fixed(3)),
            ("top tenth", "top_tenth_share", Show::Percent(1)),
            ("dead", "dead_experts", Show::Fixed(0)),
        ];
        let step = line.number("/step", Show::Fixed(0));
        self.paragraph(&format!("Tokens per expert in the last window, to step {step}:"));
        self.table(&titles(&columns), &line.rows("/statistics", &columns));
        Ok(())
    }

    /// Whether images and text use the same experts.
    fn images(&mut self) -> Result<(), ReportError> {
        let Some((images, text)) = self.history.image_loads() else { return Ok(()) };
        self.heading("Images and text");
        self.figure(
            &pictures::image_load(images, text)?,
            "Do images and text use the same experts? Two bars for each expert: its share of the text \
             tokens, and of the rows of images.",
        );
        let common = |(layer, (images, text)): (usize, (&LayerLoad, &LayerLoad))| {
            let how = format!("common load of images and text in layer {layer}");
            let value = pictures::common_load(images, text);
            vec![layer.to_string(), Self::derived(value, &how, Show::Percent(1))]
        };
        let rows: Vec<Vec<String>> = images.iter().zip(text).enumerate().map(common).collect();
        self.table(&["layer".into(), "load on the same experts".into()], &rows);
        Ok(())
    }

    /// What the model answered about images.
    fn answers(&mut self, run_dir: &Path, answers: &[Answer]) {
        if answers.is_empty() {
            return;
        }
        self.heading("Answers");
        let right = answers.iter().filter(|a| a.expected.as_ref() == Some(&a.answer)).count();
        if answers.iter().all(|answer| answer.expected.is_some()) {
            self.paragraph(&format!("{right} of {} answers are right.", answers.len()));
        }
        self.push("<div class=\"answers\">");
        for answer in answers.iter().take(Answer::MOST) {
            let image = match answer.data_uri(run_dir) {
                Some(uri) => format!("<img src=\"{uri}\" alt=\"{}\">", escape(&answer.image)),
                None => format!("<p class=\"dim\">{} cannot be shown</p>", escape(&answer.image)),
            };
            let (question, given) = (escape(&answer.question), escape(&answer.answer));
            let expected = match &answer.expected {
                Some(expected) if *expected == answer.answer => " (right)".to_owned(),
                Some(expected) => format!(" (expected: {})", escape(expected)),
                None => String::new(),
            };
            self.push(&format!(
                "<figure>{image}<figcaption>{question}<br><b>{given}</b>\
                 <span class=\"dim\">{expected}</span></figcaption></figure>"
            ));
        }
        self.push("</div>");
    }
}

pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => drop(escaped.write_char(other)),
        }
    }
    escaped
}
