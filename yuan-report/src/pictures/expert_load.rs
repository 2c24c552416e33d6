//! Heat map of the loads before and after.

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use yuan_laep::LayerLoad;

use super::{Canvas, Drawn, PRUNE, svg, text};
use crate::{History, ReportError};

/// The load of every expert of every layer: before the first prune (the loads that its plan rests
/// on), and at the end of the run in the new order.
///
/// # Errors
///
/// If the drawing library fails.
pub fn expert_load(history: &History) -> Result<String, ReportError> {
    let stages = history.stages();
    let plan = history.prunes().next().map(|(_, plan)| plan);
    let last_window = stages.first().and_then(|stage| stage.loads.clone());
    let planned = plan.map(|plan| plan.layers.iter().map(|layer| layer.load.clone()).collect());
    let before: Vec<LayerLoad> = planned.or(last_window).unwrap_or_default();
    let after = stages.get(1..).and_then(<[_]>::last).and_then(|stage| stage.loads.clone());
    let layers = before.len().max(1) as i32;
    let cell = (480 / layers).clamp(6, 40);
    let height = 130 + 2 * 40 + cell * layers * if after.is_some() { 2 } else { 1 };
    svg("expert load", (900, height as u32), |canvas| {
        let caption = "Expert load relative to the mean of its layer";
        text(canvas, caption, (450, 26), 20, (HPos::Center, VPos::Center))?;
        let pruned = |layer: usize, expert: usize| {
            plan.is_some_and(|p| p.layers[layer].pruned.contains(&expert))
        };
        let title = if plan.is_some() {
            "before the prune, in the windows it rests on (crossed out: pruned)"
        } else {
            "last window of the run"
        };
        heat_map(canvas, 50, cell, title, &before, &pruned)?;
        if let Some(after) = &after {
            let top = 50 + 40 + cell * layers + 10;
            heat_map(
                canvas,
                top,
                cell,
                "after it, at the end of the run, in the new order",
                after,
                &|_, _| false,
            )?;
        }
        scale(canvas, height - 40)
    })
}

/// On a pale cell; it stays as it is when a dark page turns the ink of axes light.
const ON_CELL: RGBColor = RGBColor(41, 41, 48);

/// A row per layer, a column per expert; `crossed` marks cells.
fn heat_map(
    canvas: &Canvas<'_>,
    top: i32,
    cell: i32,
    title: &str,
    loads: &[LayerLoad],
    crossed: &dyn Fn(usize, usize) -> bool,
) -> Drawn {
    let left = 80;
    text(canvas, title, (left, top + 14), 15, (HPos::Left, VPos::Center))?;
    let columns = loads.iter().map(LayerLoad::num_experts).max().unwrap_or(1).max(16) as i32;
    let width = (900 - left - 30) / columns;
    for (layer, load) in loads.iter().enumerate() {
        let y = top + 32 + cell * layer as i32;
        text(
            canvas,
            &format!("layer {layer}"),
            (left - 8, y + cell / 2),
            12,
            (HPos::Right, VPos::Center),
        )?;
        let mean = (load.total() as f64 / load.num_experts() as f64).max(1.0);
        for (expert, &tokens) in load.tokens_per_expert().iter().enumerate() {
            let (x, ratio) = (left + width * expert as i32, tokens as f64 / mean);
            let corners = [(x, y), (x + width - 1, y + cell - 1)];
            canvas.draw(&Rectangle::new(corners, heat(ratio).filled()))?;
            if crossed(layer, expert) {
                let [a, b] = corners;
                canvas.draw(&PathElement::new([a, b], PRUNE.mix(0.6).stroke_width(2)))?;
                canvas.draw(&PathElement::new(
                    [(a.0, b.1), (b.0, a.1)],
                    PRUNE.mix(0.6).stroke_width(2),
                ))?;
            }
            if width >= 28 && cell >= 14 {
                let ink = if ratio > 1.2 { WHITE } else { ON_CELL };
                let style = ("sans-serif", 11).into_font().color(&ink);
                let style = style.pos(Pos::new(HPos::Center, VPos::Center));
                canvas.draw(&Text::new(
                    format!("{ratio:.2}"),
                    (x + width / 2, y + cell / 2),
                    style,
                ))?;
            }
        }
    }
    Ok(())
}

/// The colours and what they mean.
fn scale(canvas: &Canvas<'_>, top: i32) -> Drawn {
    for (i, ratio) in [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0].into_iter().enumerate() {
        let x = 80 + 60 * i as i32;
        canvas.draw(&Rectangle::new([(x, top), (x + 58, top + 12)], heat(ratio).filled()))?;
        text(canvas, &format!("{ratio} x"), (x + 29, top + 22), 11, (HPos::Center, VPos::Center))?;
    }
    Ok(())
}

/// Pale for an idle expert, dark for one with four times the mean load or more.
fn heat(ratio: f64) -> RGBColor {
    let depth = (ratio / 4.0).clamp(0.0, 1.0).sqrt();
    let mix = |from: f64, to: f64| (from + (to - from) * depth) as u8;
    RGBColor(mix(246.0, 10.0), mix(248.0, 55.0), mix(252.0, 125.0))
}
