//! Answers to prompts over training: how many are right, and how long they are.

use std::collections::BTreeMap;

use plotters::prelude::*;
use yuan_train::RolloutMetrics;

use super::{Canvas, Drawn, INK, PRUNE, STRONG, heading, key, legend, svg};
use crate::{History, ReportError};

/// Runs that differ in nothing but their seeds.
#[derive(Debug)]
pub struct SeedRuns<'a> {
    /// What they have in common, for the legend.
    pub name: &'a str,
    /// One for each seed.
    pub runs: Vec<&'a History>,
}

impl<'a> SeedRuns<'a> {
    /// One run, of which nothing but the measurement is named.
    pub fn of(run: &'a History) -> Self {
        Self { name: "held-out prompts", runs: vec![run] }
    }
}

/// Colours of the groups, which the colour-blind tell apart.
const COLOURS: [RGBColor; 4] = [STRONG, PRUNE, RGBColor(90, 130, 40), RGBColor(140, 90, 160)];

/// Accuracy, and tokens of an answer, over the steps of runs of reinforcement learning: strong lines are
/// held-out prompts in the mean over the seeds, thin ones the rollouts of each run. Nothing where no
/// run has any.
///
/// # Errors
///
/// If the drawing library fails.
pub fn rollouts(groups: &[SeedRuns<'_>]) -> Result<Option<String>, ReportError> {
    let all = || groups.iter().flat_map(|group| &group.runs);
    let metrics = || all().flat_map(|run| run.rollouts(false).chain(run.rollouts(true)));
    if metrics().next().is_none() {
        return Ok(None);
    }
    let last = all().map(|run| run.last_step()).fold(1.0, f64::max);
    let longest = metrics().map(|metrics| metrics.tokens).fold(1.0, f64::max) * 1.05;
    let drawn = svg("answers over training", (900, 420), |canvas| {
        heading(canvas, "Answers over training", 900)?;
        let panels = canvas.margin(40, 0, 0, 0).split_evenly((1, 2));
        let right = |metrics: &RolloutMetrics| 100.0 * metrics.right;
        panel(&panels[0], groups, "right answers, %", [last, 100.0], right)?;
        let tokens = |metrics: &RolloutMetrics| metrics.tokens;
        panel(&panels[1], groups, "tokens of an answer", [last, longest], tokens)
    });
    drawn.map(Some)
}

fn panel(
    canvas: &Canvas<'_>,
    groups: &[SeedRuns<'_>],
    what: &str,
    [last, most]: [f64; 2],
    value: impl Fn(&RolloutMetrics) -> f64,
) -> Drawn {
    let mut chart = ChartBuilder::on(canvas)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..last, 0.0..most)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 12).into_font().color(&INK))
        .x_desc("optimizer step")
        .y_desc(what)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| match most < 10.0 {
            true => format!("{value:.1}"),
            false => format!("{value:.0}"),
        })
        .draw()?;
    for (group, colour) in groups.iter().zip(COLOURS.iter().cycle()) {
        for run in &group.runs {
            let line = run.rollouts(false).map(|metrics| (metrics.step as f64, value(metrics)));
            chart.draw_series(LineSeries::new(line, colour.mix(0.35)))?;
        }
        let mut held_out: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for metrics in group.runs.iter().flat_map(|run| run.rollouts(true)) {
            held_out.entry(metrics.step).or_default().push(value(metrics));
        }
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        let points: Vec<(f64, f64)> =
            held_out.into_iter().map(|(step, values)| (step as f64, mean(values))).collect();
        let strong = colour.stroke_width(2);
        let line = chart.draw_series(LineSeries::new(points.clone(), strong))?;
        line.label(group.name).legend(key(strong));
        chart
            .draw_series(points.into_iter().map(|point| Circle::new(point, 3, colour.filled())))?;
    }
    legend(&mut chart, SeriesLabelPosition::LowerRight)
}
