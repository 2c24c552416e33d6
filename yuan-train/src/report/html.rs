//! The run as one HTML page that needs nothing else: no network, no script, no other file.
//!
//! Every number names where it comes from. `<data value="4.35" data-line="17" data-pointer="/loss">` is the
//! number at the JSON pointer `/loss` of line 17 of the metrics file; `data-derived` says how one was
//! calculated from many. The text inside is the value, rounded.

use std::fmt::Write;

use serde_json::Value;
use yuan_laep::PrunePlan;

use super::{History, pictures, table};
use crate::{TrainError, callback::Event};

/// The report of a run called `name`.
///
/// # Errors
///
/// If a picture cannot be drawn.
pub fn html_report(name: &str, history: &History) -> Result<String, TrainError> {
    let mut page = Page { history, html: String::new() };
    page.summary();
    page.heading("Loss");
    page.figure(&pictures::loss(history)?, "Training and validation loss. Lower is better.");
    page.validations();
    page.prunes()?;
    page.loads()?;
    let title = escape(name);
    let (style, body) = (include_str!("html.css"), page.html);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n\
         <h1>{title}</h1>\n{body}</body>\n</html>\n"
    ))
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
}

impl Show {
    fn text(self, value: f64) -> String {
        match self {
            Self::Fixed(decimals) => format!("{value:.decimals$}"),
            Self::Percent(decimals) => format!("{:.decimals$} %", 100.0 * value),
            Self::Millions => format!("{:.2} M", value / 1e6),
        }
    }
}

impl Page<'_> {
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
        self.push(&format!("<figure>{svg}<figcaption class=\"dim\">{caption}</figcaption></figure>"));
    }

    fn table(&mut self, head: &[String], rows: &[Vec<String>]) {
        let cells = |tag: &str, cells: &[String]| -> String {
            let cells: String = cells.iter().map(|cell| format!("<{tag}>{cell}</{tag}>")).collect();
            format!("<tr>{cells}</tr>")
        };
        let body: String = rows.iter().map(|row| cells("td", row)).collect();
        let head = cells("th", head);
        self.push(&format!(
            "<div class=\"table\"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
        ));
    }

    /// The number at a JSON pointer of an event; a dash where there is none.
    fn number(&self, line: usize, pointer: &str, show: Show) -> String {
        let event = serde_json::to_value(&self.history.events()[line]).unwrap_or_default();
        let value = if pointer.is_empty() { None } else { event.pointer(pointer).and_then(Value::as_f64) };
        value.map_or_else(
            || "-".into(),
            |value| {
                let (line, text) = (line + 1, show.text(value));
                format!(
                    "<data value=\"{value}\" data-line=\"{line}\" data-pointer=\"{pointer}\">{text}</data>"
                )
            },
        )
    }

    fn derived(value: f64, how: &str, show: Show) -> String {
        format!("<data value=\"{value}\" data-derived=\"{}\">{}</data>", escape(how), show.text(value))
    }

    /// Parameters, experts, speed and loss, a column per phase.
    fn summary(&mut self) {
        self.heading("Summary");
        let events: Vec<(usize, Event)> =
            self.history.lasting().map(|(line, event)| (line, event.clone())).collect();
        let is_start = |event: &Event| matches!(event, Event::Start { .. });
        let is_prune = |event: &Event| matches!(event, Event::Prune { .. });
        let Some(start) = events.iter().position(|(_, event)| is_start(event)) else {
            self.paragraph("Nothing was recorded.");
            return;
        };
        // The line that says what the model is in each phase, and the last line of its kind in that phase.
        let mut begins = vec![(start, "/parameters", "/experts_per_layer")];
        for (at, (_, event)) in events.iter().enumerate().filter(|(_, (_, event))| is_prune(event)) {
            let _ = event;
            begins.push((at, "/parameters_after", "/experts_after"));
        }
        let ends = begins.iter().skip(1).map(|(at, ..)| *at).chain([events.len()]);
        let phases: Vec<_> = begins.iter().zip(ends).map(|(&(from, p, e), to)| (from, to, p, e)).collect();
        let last = |from: usize, to: usize, wanted: fn(&Event) -> bool| {
            events[from..to].iter().rev().find(|(_, event)| wanted(event)).map(|(line, _)| *line)
        };
        let mut head = vec![String::new()];
        head.extend(table::phase_titles(self.history).iter().map(|title| escape(title)));
        let speeds: Vec<Option<f64>> =
            self.history.phases().iter().map(|phase| phase.tokens_per_second).collect();
        let mut rows = vec![
            vec!["parameters".to_owned()],
            vec!["experts".to_owned()],
            vec!["tokens per second".to_owned()],
            vec!["validation loss".to_owned()],
            vec!["busiest expert / mean, worst layer".to_owned()],
        ];
        for (phase, &(from, to, parameters, experts)) in phases.iter().enumerate() {
            let (begin, event) = &events[from];
            let layers = serde_json::to_value(event)
                .ok()
                .and_then(|event| event.pointer(experts).and_then(Value::as_array).map(Vec::len))
                .unwrap_or(0);
            rows[0].push(self.number(*begin, parameters, Show::Millions));
            let counts: Vec<String> =
                (0..layers).map(|i| self.number(*begin, &format!("{experts}/{i}"), Show::Fixed(0))).collect();
            rows[1].push(if layers <= 12 { counts.join(" ") } else { format!("{layers} layers, see below") });
            rows[2].push(speeds.get(phase).copied().flatten().map_or_else(
                || "-".into(),
                |speed| Self::derived(speed, &format!("median speed of phase {phase}"), Show::Fixed(0)),
            ));
            let validation = last(from, to, |event| matches!(event, Event::Validation { .. }));
            rows[3].push(
                validation.map_or_else(|| "-".into(), |line| self.number(line, "/loss", Show::Fixed(4))),
            );
            let load = last(from, to, |event| matches!(event, Event::Load { .. }));
            rows[4].push(load.map_or_else(|| "-".into(), |line| self.worst(line, "max_over_mean")));
        }
        self.table(&head, &rows);
        if let [Some(before), .., Some(after)] = speeds[..] {
            let measured = Self::derived(after / before - 1.0, "gain in median speed", Show::Percent(1));
            let predicted: Vec<String> = events
                .iter()
                .filter(|(_, event)| is_prune(event))
                .map(|(line, _)| self.number(*line, "/predicted_gain", Show::Fixed(3)))
                .collect();
            self.paragraph(&format!(
                "Measured gain in tokens per second: {measured}. Step time before over after, as the \
                 efficiency model predicts it: {}.",
                predicted.join(", ")
            ));
        }
    }

    /// The largest value of a statistic over the layers of a window.
    fn worst(&self, line: usize, statistic: &str) -> String {
        let Event::Load { statistics, .. } = &self.history.events()[line] else { return "-".into() };
        let worst = (0..statistics.len())
            .max_by(|&a, &b| statistics[a].max_over_mean.total_cmp(&statistics[b].max_over_mean));
        worst.map_or_else(
            || "-".into(),
            |layer| self.number(line, &format!("/statistics/{layer}/{statistic}"), Show::Fixed(2)),
        )
    }

    fn validations(&mut self) {
        let lines: Vec<usize> = self
            .history
            .lasting()
            .filter(|(_, event)| matches!(event, Event::Validation { .. }))
            .map(|(line, _)| line)
            .collect();
        let rows: Vec<Vec<String>> = lines
            .into_iter()
            .map(|line| {
                vec![self.number(line, "/step", Show::Fixed(0)), self.number(line, "/loss", Show::Fixed(4))]
            })
            .collect();
        self.table(&["step".into(), "validation loss".into()], &rows);
    }

    fn prunes(&mut self) -> Result<(), TrainError> {
        let events: Vec<(usize, Event)> = self.history.events().iter().cloned().enumerate().collect();
        for (line, event) in events {
            match event {
                Event::Prune { round, plan, layers, .. } => self.prune(line, round, &plan, layers.len())?,
                Event::Guard { satisfied, .. } => {
                    let step = self.number(line, "/step", Show::Fixed(0));
                    let loss = self.number(line, "/loss", Show::Fixed(4));
                    let allowed = self.number(line, "/allowed_loss", Show::Fixed(4));
                    let verdict = if satisfied {
                        "is within it: the prune stays"
                    } else {
                        "is not: the prune is undone"
                    };
                    self.paragraph(&format!(
                        "Guard, step {step}: at most {allowed} is allowed; the validation loss {loss} {verdict}."
                    ));
                }
                Event::RollBack { .. } => {
                    let to = self.number(line, "/to_step", Show::Fixed(0));
                    self.paragraph(&format!("The run went back to step {to} and on without pruning."));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn prune(
        &mut self,
        line: usize,
        round: usize,
        plan: &PrunePlan,
        layers: usize,
    ) -> Result<(), TrainError> {
        self.heading(&format!("Prune {round}"));
        let step = self.number(line, "/step", Show::Fixed(0));
        let load = self.number(line, "/pruned_load", Show::Percent(2));
        let before = self.number(line, "/parameters_before", Show::Millions);
        let after = self.number(line, "/parameters_after", Show::Millions);
        self.paragraph(&format!(
            "After step {step}: {before} parameters to {after}. The pruned experts carried {load} of the load."
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
        let mut head = vec!["layer".to_owned()];
        head.extend(columns.iter().map(|(title, ..)| (*title).to_owned()));
        let rows: Vec<Vec<String>> = (0..layers)
            .map(|layer| {
                let cells = columns
                    .iter()
                    .map(|(_, key, show)| self.number(line, &format!("/layers/{layer}/{key}"), *show));
                std::iter::once(layer.to_string()).chain(cells).collect()
            })
            .collect();
        self.table(&head, &rows);
        self.paragraph(
            "<span class=\"dim\">Groups: load of the busiest device group over the mean, the experts in their old \
             order and in the new one; the optimum is searched for up to 16 experts, the bound holds for any \
             arrangement.</span>",
        );
        self.figure(&pictures::load_profile(plan)?, "Experts by load; what the plan takes is red.");
        self.figure(&pictures::device_groups(plan)?, "Device groups before and after the plan.");
        Ok(())
    }

    fn loads(&mut self) -> Result<(), TrainError> {
        self.heading("Expert load");
        self.figure(&pictures::expert_load(self.history)?, "Each cell is one expert.");
        self.figure(
            &pictures::load_history(self.history)?,
            "Each line is one expert; dead ones lie on the axis.",
        );
        let last = self.history.lasting().filter(|(_, event)| matches!(event, Event::Load { .. })).last();
        let Some((line, Event::Load { statistics, .. })) = last else { return Ok(()) };
        let layers = statistics.len();
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
        let mut head = vec!["layer".to_owned()];
        head.extend(columns.iter().map(|(title, ..)| (*title).to_owned()));
        let rows: Vec<Vec<String>> = (0..layers)
            .map(|layer| {
                let cells = columns
                    .iter()
                    .map(|(_, key, show)| self.number(line, &format!("/statistics/{layer}/{key}"), *show));
                std::iter::once(layer.to_string()).chain(cells).collect()
            })
            .collect();
        let step = self.number(line, "/step", Show::Fixed(0));
        self.paragraph(&format!("Tokens per expert in the last window, to step {step}:"));
        self.table(&head, &rows);
        Ok(())
    }
}

fn escape(text: &str) -> String {
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
