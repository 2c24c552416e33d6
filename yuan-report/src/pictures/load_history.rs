//! Loads over training: the paper's Figure 1.

use plotters::prelude::*;
use yuan_laep::{LayerLoad, LayerPlan, PrunePlan};

use yuan_train::Event;

use super::{INK, PALE, PRUNE, STRONG, chosen_layers, panels};
use crate::{History, ReportError};

/// Tokens of every expert in every window, a panel per layer (four at most), on a logarithmic
/// scale.
///
/// Experts keep their line over prunes and rearrangements; those that a prune takes are red.
///
/// # Errors
///
/// If the drawing library fails.
pub fn load_history(history: &History) -> Result<String, ReportError> {
    let curves = Curves::of(history);
    let title = "Tokens per expert and window over training";
    let layers = chosen_layers(curves.layers.len(), 4);
    panels("expert load over training", title, &layers, |panel, layer| {
        let mut chart = ChartBuilder::on(panel)
            .margin(8)
            .caption(format!("layer {layer}"), ("sans-serif", 14).into_font().color(&INK))
            .x_label_area_size(32)
            .y_label_area_size(52)
            .build_cartesian_2d(
                0.0..curves.last_step,
                (curves.floor()..curves.ceiling()).log_scale(),
            )?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("optimizer step")
            .y_desc("tokens")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .y_label_formatter(&|tokens| format!("{tokens:.0}"))
            .y_labels(5)
            .draw()?;
        for (steps, style) in
            [(&curves.prunes, INK.mix(0.6)), (&curves.rearrangements, PALE.mix(1.0))]
        {
            for &step in steps {
                let line = [(step, curves.floor()), (step, curves.ceiling())];
                chart.draw_series(DashedLineSeries::new(line, 6, 4, style.stroke_width(1)))?;
            }
        }
        for curve in &curves.layers[layer] {
            let style = if curve.pruned { PRUNE.mix(0.8) } else { STRONG.mix(0.7) };
            chart.draw_series(LineSeries::new(
                curve.points.iter().copied(),
                style.stroke_width(1),
            ))?;
        }
        Ok(())
    })
}

struct Curve {
    points: Vec<(f64, f64)>,
    pruned: bool,
}

struct Curves {
    /// Per layer, per original expert.
    layers: Vec<Vec<Curve>>,
    /// Original expert at every place of every layer; a prune selects among them, a rearrangement
    /// moves them.
    identity: Vec<Vec<usize>>,
    prunes: Vec<f64>,
    rearrangements: Vec<f64>,
    last_step: f64,
    least: f64,
    most: f64,
}

impl Curves {
    /// The power of ten below all points.
    fn floor(&self) -> f64 {
        if self.least.is_finite() { 10_f64.powf(self.least.log10().floor()) } else { 1.0 }
    }

    fn ceiling(&self) -> f64 {
        self.most.max(10.0) * 1.2
    }

    fn of(history: &History) -> Self {
        let prunes: Vec<_> = history.prunes().collect();
        let first_window = history.windows().next().map(|window| window.layers);
        let counts =
            |layers: &[LayerLoad]| layers.iter().map(LayerLoad::num_experts).collect::<Vec<_>>();
        // The first plan knows the experts of before, even if no window was complete by then.
        let experts = match prunes.first() {
            Some((_, plan)) => plan.layers.iter().map(LayerPlan::num_experts).collect(),
            None => first_window.map(counts).unwrap_or_default(),
        };
        let empty = |_| Curve { points: Vec::new(), pruned: false };
        let mut curves = Self {
            layers: experts.iter().map(|&experts| (0..experts).map(empty).collect()).collect(),
            identity: experts.iter().map(|&experts| (0..experts).collect()).collect(),
            prunes: prunes.iter().map(|(step, _)| *step as f64).collect(),
            rearrangements: history.rearrangements().map(|step| step as f64).collect(),
            last_step: history.last_step(),
            least: f64::INFINITY,
            most: 1.0,
        };
        for (_, event) in history.lasting() {
            match event {
                Event::Load { step, layers, .. } => curves.add(*step, layers),
                Event::Prune { plan, .. } => curves.apply(plan),
                Event::Rearrange { order, .. } => {
                    order
                        .iter()
                        .enumerate()
                        .for_each(|(layer, order)| curves.reorder(layer, order));
                }
                _ => {}
            }
        }
        curves
    }

    fn apply(&mut self, plan: &PrunePlan) {
        for (layer, plan) in plan.layers.iter().enumerate() {
            for &expert in &plan.pruned {
                if let Some(curve) = self.curve(layer, expert) {
                    curve.pruned = true;
                }
            }
            self.reorder(layer, &plan.kept);
        }
    }

    /// The curve of the expert that is at a place now. A history with gaps may tell of places that
    /// nothing is known of.
    fn curve(&mut self, layer: usize, place: usize) -> Option<&mut Curve> {
        let expert = *self.identity.get(layer)?.get(place)?;
        self.layers.get_mut(layer)?.get_mut(expert)
    }

    fn reorder(&mut self, layer: usize, order: &[usize]) {
        let Some(identity) = self.identity.get_mut(layer) else { return };
        *identity = order.iter().filter_map(|&place| identity.get(place).copied()).collect();
    }

    fn add(&mut self, step: u64, layers: &[LayerLoad]) {
        for (layer, load) in layers.iter().enumerate() {
            for (place, &tokens) in load.tokens_per_expert().iter().enumerate() {
                // A logarithm knows no zero: a dead expert lies on the axis.
                let point = (step as f64, (tokens as f64).max(1.0));
                let Some(curve) = self.curve(layer, place) else { continue };
                curve.points.push(point);
                self.least = self.least.min(point.1);
                self.most = self.most.max(point.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_keep_their_line_where_they_are_rearranged() {
        let load = |step, tokens: [u64; 3]| Event::Load {
            step,
            window_steps: 1,
            layers: vec![LayerLoad::new(tokens.to_vec())],
            statistics: Vec::new(),
            stability: None,
        };
        let moved = Event::Rearrange {
            step: 1,
            groups_before: vec![1.5],
            groups_after: vec![1.0],
            order: vec![vec![2, 0, 1]],
            bytes_moved: 0,
        };
        let history = History::new(vec![
            load(1, [10, 20, 30]),
            moved,
            load(2, [31, 11, 21]),
            load(3, [32, 12, 22]),
        ]);
        let curves = Curves::of(&history);
        let tokens = |curve: &Curve| curve.points.iter().map(|point| point.1).collect::<Vec<_>>();
        let lines: Vec<_> = curves.layers[0].iter().map(tokens).collect();
        assert_eq!(lines, [[10.0, 11.0, 12.0], [20.0, 21.0, 22.0], [30.0, 31.0, 32.0]]);
        assert_eq!(curves.rearrangements, [1.0]);
    }
}
