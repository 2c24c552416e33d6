//! The closing table of a run: before and after its prunes.

use yuan_laep::{LayerLoad, LoadStatistics};
use yuan_train::RolloutMetrics;

use crate::{History, Stage};

/// Parameters, experts, speed, validation loss and imbalance, a column before the prune and one
/// after each.
pub fn summary_table(history: &History) -> String {
    let stages = history.stages();
    if stages.is_empty() {
        return String::from("nothing was recorded\n");
    }
    let mut rows = vec![row("", stage_titles(history))];
    for (name, cell) in summary_rows() {
        rows.push(row(name, stages.iter().map(cell).collect()));
    }
    let measured: Vec<&RolloutMetrics> = history.rollouts(true).collect();
    if let (Some(first), Some(last)) = (measured.first(), measured.last()) {
        let of = |metrics: &RolloutMetrics| {
            let (right, tokens) = (100.0 * metrics.right, metrics.tokens);
            format!("{right:.1} % right, {tokens:.1} tokens an answer (step {})", metrics.step)
        };
        rows.push(format!("{:<27}  {}; {}\n", "held-out prompts", of(first), of(last)));
    }
    rows.concat()
}

/// "before (to step 80)", "after", and so on, a title per stage.
pub(super) fn stage_titles(history: &History) -> Vec<String> {
    let prunes: Vec<u64> = history.prunes().map(|(step, _)| step).collect();
    match prunes[..] {
        [] => vec!["whole run".into()],
        [only] => vec![format!("before (to step {only})"), "after".into()],
        [first, ..] => {
            let after = |(i, step): (usize, &u64)| match prunes.get(i + 1) {
                Some(next) => format!("{} (to step {next})", i + 1),
                None => format!("{} (from step {step})", i + 1),
            };
            let titles =
                prunes.iter().enumerate().map(after).map(|which| format!("after prune {which}"));
            std::iter::once(format!("before (to step {first})")).chain(titles).collect()
        }
    }
}

type Cell = fn(&Stage) -> String;

fn summary_rows() -> [(&'static str, Cell); 6] {
    [
        ("parameters", |stage| format!("{:.2} M", stage.parameters as f64 / 1e6)),
        ("experts per layer", |stage| join(stage.experts_per_layer.iter().map(usize::to_string))),
        ("tokens per second", |stage| {
            stage.tokens_per_second.map_or("-".into(), |speed| format!("{speed:.0}"))
        }),
        ("validation loss", |stage| {
            stage.validation.map_or("-".into(), |(step, loss)| format!("{loss:.4} (step {step})"))
        }),
        ("busiest expert / mean", |stage| {
            per_layer(stage, |load| format!("{:.2}", load.max_over_mean()))
        }),
        ("least loaded expert / mean", |stage| {
            per_layer(stage, |load| {
                let statistics = LoadStatistics::of(load);
                format!("{:.2}", statistics.min as f64 / statistics.mean.max(f64::MIN_POSITIVE))
            })
        }),
    ]
}

fn per_layer(stage: &Stage, text: impl Fn(&LayerLoad) -> String) -> String {
    stage.loads.as_ref().map_or("-".into(), |loads| join(loads.iter().map(text)))
}

fn join(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(" ")
}

fn row(name: &str, cells: Vec<String>) -> String {
    let cells: String = cells.iter().map(|cell| format!("  {cell:<24}")).collect();
    format!("{name:<27}{}\n", cells.trim_end())
}
