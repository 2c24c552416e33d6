//! Experts by load and what they carry together: the paper's Figure 2, with what a plan takes.

use plotters::prelude::*;
use yuan_laep::{LayerPlan, PrunePlan};

use super::{INK, PALE, PRUNE, STRONG, chosen_layers, panels};
use crate::ReportError;

/// Share of every expert, ascending (bars), and cumulative share (line), a panel per layer (four at
/// most).
///
/// The bars of pruned experts are red; the dashed line is β of the layer.
///
/// # Errors
///
/// If the drawing library fails.
pub fn load_profile(plan: &PrunePlan) -> Result<String, ReportError> {
    let title = "Experts by load, ascending, and their cumulative share";
    let layers = chosen_layers(plan.layers.len(), 4);
    panels("experts by load", title, &layers, |panel, layer| {
        profile(panel, layer, &plan.layers[layer], plan.limits.beta.at(layer))
    })
}

fn profile(panel: &super::Canvas<'_>, layer: usize, plan: &LayerPlan, beta: f64) -> super::Drawn {
    let (order, fractions) = (plan.load.ascending(), plan.load.fractions());
    let experts = order.len() as f64;
    let title = format!("layer {layer}: {} of {} experts pruned", plan.pruned.len(), order.len());
    let mut chart = ChartBuilder::on(panel)
        .margin(8)
        .caption(title, ("sans-serif", 14).into_font().color(&INK))
        .x_label_area_size(32)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..experts, 0.0..1.0)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("experts, least loaded first")
        .y_desc("share of the load")
        .x_label_formatter(&|rank| format!("{rank:.0}"))
        .y_label_formatter(&|share| format!("{share:.1}"))
        .draw()?;
    chart.draw_series(order.iter().enumerate().map(|(rank, &expert)| {
        let style = if plan.pruned.contains(&expert) { PRUNE.filled() } else { PALE.filled() };
        Rectangle::new([(rank as f64 + 0.1, 0.0), (rank as f64 + 0.9, fractions[expert])], style)
    }))?;
    let mut sum = 0.0;
    let cumulative = order.iter().enumerate().map(|(rank, &expert)| {
        sum += fractions[expert];
        (rank as f64 + 1.0, sum)
    });
    let cumulative = std::iter::once((0.0, 0.0)).chain(cumulative).collect::<Vec<_>>();
    chart.draw_series(LineSeries::new(cumulative, STRONG.stroke_width(2)))?;
    if beta <= 1.0 {
        let line = [(0.0, beta), (experts, beta)];
        chart.draw_series(DashedLineSeries::new(line, 6, 4, PRUNE.stroke_width(1)))?;
        chart.draw_series([Text::new(
            format!("beta {beta}"),
            (0.2, beta),
            ("sans-serif", 11).into_font().color(&PRUNE),
        )])?;
    }
    Ok(())
}
