//! Load of the ranks that share the experts over training.

use plotters::prelude::*;

use super::{INK, PALE, PRUNE, STRONG, key, legend, svg};
use crate::{History, ReportError};

/// What the busiest rank computed over what one does on average, over the steps: in the
/// worst layer and in the mean over the layers. Prunes and rearrangements are marked. Nothing for a
/// run on one device.
///
/// # Errors
///
/// If the drawing library fails.
pub fn device_load(history: &History) -> Result<Option<String>, ReportError> {
    let steps = || history.steps().filter(|step| !step.device_max_over_mean.is_empty());
    let curve = |of: fn(&[f64]) -> f64| -> Vec<(f64, f64)> {
        steps().map(|step| (step.step as f64, of(&step.device_max_over_mean))).collect()
    };
    let worst = curve(|layers| layers.iter().copied().fold(0.0, f64::max));
    let mean = curve(|layers| layers.iter().sum::<f64>() / layers.len() as f64);
    if worst.is_empty() {
        return Ok(None);
    }
    let high = worst.iter().map(|point| point.1).fold(1.1, f64::max) * 1.02;
    let draw = svg("device load over training", (900, 380), |canvas| {
        let mut chart = ChartBuilder::on(canvas)
            .margin(16)
            .caption(
                "Rows of the busiest device over the mean",
                ("sans-serif", 20).into_font().color(&INK),
            )
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..history.last_step(), 1.0..high)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("optimizer step")
            .y_desc("busiest / mean")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .draw()?;
        for (points, name, style) in [
            (worst, "worst layer", PALE.stroke_width(1)),
            (mean, "mean over the layers", STRONG.stroke_width(2)),
        ] {
            chart.draw_series(LineSeries::new(points, style))?.label(name).legend(key(style));
        }
        let prunes = history.prunes().map(|(step, _)| {
            (step, Some(format!("experts pruned, step {step}")), PRUNE.stroke_width(2))
        });
        // There may be many rearrangements: one of them names them all.
        let moves = history.rearrangements().enumerate().map(|(i, step)| {
            (step, (i == 0).then(|| "experts rearranged".to_owned()), INK.stroke_width(1))
        });
        for (step, name, style) in prunes.chain(moves) {
            let line = [(step as f64, 1.0), (step as f64, high)];
            let series = chart.draw_series(DashedLineSeries::new(line, 6, 4, style))?;
            if let Some(name) = name {
                series.label(name).legend(key(style));
            }
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    });
    draw.map(Some)
}
