//! Loss over the steps.

use plotters::prelude::*;

use yuan_train::Event;

use super::{INK, PALE, PRUNE, STRONG, key, legend, svg};
use crate::{History, ReportError};

/// Training and validation loss over the steps; prunes are marked, and what a guard undid is
/// dashed.
///
/// # Errors
///
/// If the drawing library fails.
pub fn loss(history: &History) -> Result<String, ReportError> {
    svg("loss over training", (900, 520), |canvas| {
        let train: Vec<(f64, f64)> = history.steps().map(|m| (m.step as f64, m.loss)).collect();
        let validation: Vec<(f64, f64)> =
            history.validations().map(|(step, loss)| (step as f64, loss)).collect();
        let undone: Vec<Vec<(f64, f64)>> = history.undone().map(validations).collect();
        let points = || train.iter().chain(&validation).chain(undone.iter().flatten());
        let low = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
        let high = points().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = if low <= high { (low - 0.1, high + 0.1) } else { (0.0, 1.0) };
        let last = history.last_step();
        let mut chart = ChartBuilder::on(canvas)
            .margin(16)
            .caption("Loss over training", ("sans-serif", 20).into_font().color(&INK))
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..last, low..high)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("optimizer step")
            .y_desc(match history.rollouts(false).next() {
                None => "cross-entropy, nats per token",
                Some(_) => "loss of the policy",
            })
            .x_label_formatter(&|step| format!("{step:.0}"))
            .draw()?;
        chart.draw_series(LineSeries::new(train, &PALE))?.label("training").legend(key(PALE));
        let line = LineSeries::new(validation.clone(), STRONG.stroke_width(2));
        let drawn = chart.draw_series(line)?;
        if !validation.is_empty() {
            drawn.label("validation").legend(key(STRONG.stroke_width(2)));
        }
        chart
            .draw_series(validation.iter().map(|&point| Circle::new(point, 3, STRONG.filled())))?;
        for branch in undone {
            chart
                .draw_series(DashedLineSeries::new(branch, 3, 3, PRUNE.stroke_width(1)))?
                .label("validation, undone by the guard")
                .legend(key(PRUNE.stroke_width(1)));
        }
        for (step, _) in history.prunes() {
            let at = step as f64;
            chart
                .draw_series(DashedLineSeries::new(
                    [(at, low), (at, high)],
                    6,
                    4,
                    PRUNE.stroke_width(2),
                ))?
                .label(format!("experts pruned, step {step}"))
                .legend(key(PRUNE.stroke_width(2)));
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    })
}

fn validations(events: &[Event]) -> Vec<(f64, f64)> {
    let point = |event: &Event| match event {
        Event::Validation { step, loss, .. } => Some((*step as f64, *loss)),
        _ => None,
    };
    events.iter().filter_map(point).collect()
}
