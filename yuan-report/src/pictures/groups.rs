//! Device groups before and after rearranging: the paper's Figure 3.

use plotters::prelude::*;
use yuan_laep::{LayerPlan, PrunePlan, efficiency::PlacedLayer};

use super::{INK, PALE, STRONG, chosen_layers, panels};
use crate::ReportError;

/// Load of every device group over the mean, before the plan and after it, a panel per layer (four
/// at most).
///
/// # Errors
///
/// If the drawing library fails.
pub fn device_groups(plan: &PrunePlan) -> Result<String, ReportError> {
    let title = "Load of the device groups over their mean: before (pale) and after (strong)";
    let layers = chosen_layers(plan.layers.len(), 4);
    panels("device groups", title, &layers, |panel, layer| {
        let bars = Bars::of(&plan.layers[layer]);
        let title = format!("layer {layer}: busiest {:.2}, then {:.2}", bars.most(0), bars.most(1));
        let mut chart = ChartBuilder::on(panel)
            .margin(8)
            .caption(title, ("sans-serif", 14).into_font().color(&INK))
            .x_label_area_size(32)
            .y_label_area_size(44)
            .build_cartesian_2d(
                0.0..bars.0.len() as f64,
                0.0..bars.most(0).max(bars.most(1)) * 1.1,
            )?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(format!("device groups 0 to {}", bars.0.len() - 1))
            .y_desc("load / mean")
            .x_labels(0)
            .draw()?;
        for (side, colour) in [PALE, STRONG].into_iter().enumerate() {
            chart.draw_series(bars.0.iter().enumerate().map(|(group, shares)| {
                let left = group as f64 + 0.1 + 0.4 * side as f64;
                Rectangle::new([(left, 0.0), (left + 0.4, shares[side])], colour.filled())
            }))?;
        }
        let mean = [(0.0, 1.0), (bars.0.len() as f64, 1.0)];
        chart.draw_series(DashedLineSeries::new(mean, 6, 4, INK.mix(0.6).stroke_width(1)))?;
        Ok(())
    })
}

/// Per group: load over the mean, before and after.
struct Bars(Vec<[f64; 2]>);

impl Bars {
    fn of(plan: &LayerPlan) -> Self {
        let [before, after] =
            [PlacedLayer::before(plan), PlacedLayer::rearranged(plan)].map(|placed| {
                let fractions = placed.load.fractions();
                let share = |members: &Vec<usize>| {
                    members.iter().map(|&expert| fractions[expert]).sum::<f64>()
                };
                let groups = placed.groups.len() as f64;
                placed.groups.iter().map(share).map(|share| share * groups).collect::<Vec<f64>>()
            });
        Self(before.into_iter().zip(after).map(|(before, after)| [before, after]).collect())
    }

    fn most(&self, side: usize) -> f64 {
        self.0.iter().map(|shares| shares[side]).fold(0.0, f64::max)
    }
}
