//! What other limits would have pruned.

use plotters::prelude::*;
use yuan_laep::WhatIf;

use super::{INK, key, legend, svg};
use crate::ReportError;

/// Experts that would go, over β, a line per α: one picture of a [`WhatIf::sweep`].
///
/// # Errors
///
/// If the drawing library fails.
pub fn sweep(rows: &[WhatIf]) -> Result<String, ReportError> {
    let mut alphas: Vec<f64> = rows.iter().map(|row| row.alpha.at(0)).collect();
    alphas.sort_by(f64::total_cmp);
    alphas.dedup();
    let share = |row: &WhatIf| row.pruned as f64 / row.experts.max(1) as f64;
    let widest = rows.iter().map(|row| row.beta.at(0)).fold(0.0, f64::max).max(1e-9);
    let highest = rows.iter().map(share).fold(0.0, f64::max).max(0.05) * 1.1;
    svg("sweep of the limits", (900, 480), |canvas| {
        let mut chart = ChartBuilder::on(canvas)
            .margin(16)
            .caption("Experts that would be pruned", ("sans-serif", 20).into_font().color(&INK))
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..widest, 0.0..highest)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("beta: share of the load that the pruned experts of a layer may carry")
            .y_desc("share of the experts")
            .y_label_formatter(&|share| format!("{:.0} %", 100.0 * share))
            .draw()?;
        for (i, &alpha) in alphas.iter().enumerate() {
            let depth = if alphas.len() > 1 { i as f64 / (alphas.len() - 1) as f64 } else { 1.0 };
            let mix = |from: f64, to: f64| (from + (to - from) * depth) as u8;
            let colour = RGBColor(mix(150.0, 20.0), mix(170.0, 90.0), mix(200.0, 170.0));
            let mut line: Vec<(f64, f64)> = rows
                .iter()
                .filter(|row| row.alpha.at(0).total_cmp(&alpha).is_eq())
                .map(|row| (row.beta.at(0), share(row)))
                .collect();
            line.sort_by(|a, b| a.0.total_cmp(&b.0));
            chart.draw_series(line.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
            chart
                .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
                .label(format!("alpha {alpha}"))
                .legend(key(colour.stroke_width(2)));
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    })
}
