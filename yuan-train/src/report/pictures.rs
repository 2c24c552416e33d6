//! Pictures of a run as SVG.

use std::path::Path;

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use yuan_laep::{LayerLoad, PrunePlan};

use super::History;
use crate::TrainError;

const INK: RGBColor = RGBColor(40, 40, 48);
const TRAIN: RGBColor = RGBColor(150, 170, 200);
const VALIDATION: RGBColor = RGBColor(20, 90, 170);
const PRUNE: RGBColor = RGBColor(200, 60, 40);

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Draws training and validation loss over the steps, the prune marked.
///
/// # Errors
///
/// If the file cannot be written.
pub fn draw_loss(history: &History, path: &Path) -> Result<(), TrainError> {
    draw(path, (900, 520), |canvas| {
        let train: Vec<(f64, f64)> = history.steps().map(|m| (m.step as f64, m.loss)).collect();
        let validation: Vec<(f64, f64)> =
            history.validations().map(|(step, loss)| (step as f64, loss)).collect();
        let losses = || train.iter().chain(&validation).map(|point| point.1);
        let (low, high) =
            (losses().fold(f64::INFINITY, f64::min), losses().fold(f64::NEG_INFINITY, f64::max));
        let (low, high) = if low <= high { (low - 0.1, high + 0.1) } else { (0.0, 1.0) };
        let last = train.last().map_or(1.0, |point| point.0).max(1.0);
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
            .y_desc("cross-entropy, nats per token")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .draw()?;
        chart
            .draw_series(LineSeries::new(train, &TRAIN))?
            .label("training")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], TRAIN));
        chart
            .draw_series(LineSeries::new(validation.clone(), VALIDATION.stroke_width(2)))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], VALIDATION.stroke_width(2)));
        chart.draw_series(validation.iter().map(|&point| Circle::new(point, 3, VALIDATION.filled())))?;
        if let Some(step) = history.pruned_at() {
            let at = step as f64;
            chart
                .draw_series(DashedLineSeries::new([(at, low), (at, high)], 6, 4, PRUNE.stroke_width(2)))?
                .label(format!("experts pruned, step {step}"))
                .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], PRUNE.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(INK.mix(0.3))
            .draw()?;
        Ok(())
    })
}

/// Draws the load of every expert of every layer: before the prune (the loads of the plan, where
/// there is one), and after it in the new order.
///
/// # Errors
///
/// If the file cannot be written.
pub fn draw_expert_load(history: &History, plan: Option<&PrunePlan>, path: &Path) -> Result<(), TrainError> {
    let phases = history.phases();
    let last_window = phases.first().and_then(|phase| phase.loads.clone());
    let planned = plan.map(|plan| plan.layers.iter().map(|layer| layer.load.clone()).collect());
    let before: Vec<LayerLoad> = planned.or(last_window).unwrap_or_default();
    let after = phases.get(1).and_then(|phase| phase.loads.clone());
    let layers = before.len().max(1) as i32;
    let cell = (480 / layers).clamp(6, 40);
    let height = 130 + 2 * 40 + cell * layers * if after.is_some() { 2 } else { 1 };
    draw(path, (900, height as u32), |canvas| {
        let caption = "Expert load relative to the mean of its layer";
        text(canvas, caption, (450, 26), 20, (HPos::Center, VPos::Center))?;
        let pruned =
            |layer: usize, expert: usize| plan.is_some_and(|p| p.layers[layer].pruned.contains(&expert));
        let title = if after.is_some() {
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
        text(canvas, &format!("layer {layer}"), (left - 8, y + cell / 2), 12, (HPos::Right, VPos::Center))?;
        let mean = (load.total() as f64 / load.num_experts() as f64).max(1.0);
        for (expert, &tokens) in load.tokens_per_expert().iter().enumerate() {
            let (x, ratio) = (left + width * expert as i32, tokens as f64 / mean);
            let corners = [(x, y), (x + width - 1, y + cell - 1)];
            canvas.draw(&Rectangle::new(corners, heat(ratio).filled()))?;
            if crossed(layer, expert) {
                let [a, b] = corners;
                canvas.draw(&PathElement::new([a, b], PRUNE.mix(0.6).stroke_width(2)))?;
                canvas.draw(&PathElement::new([(a.0, b.1), (b.0, a.1)], PRUNE.mix(0.6).stroke_width(2)))?;
            }
            if width >= 28 && cell >= 14 {
                let ink = if ratio > 1.2 { WHITE } else { INK };
                let style = ("sans-serif", 11).into_font().color(&ink);
                let style = style.pos(Pos::new(HPos::Center, VPos::Center));
                canvas.draw(&Text::new(format!("{ratio:.2}"), (x + width / 2, y + cell / 2), style))?;
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

fn text(canvas: &Canvas<'_>, what: &str, at: (i32, i32), size: i32, (h, v): (HPos, VPos)) -> Drawn {
    let style = ("sans-serif", size).into_font().color(&INK).pos(Pos::new(h, v));
    canvas.draw(&Text::new(what.to_owned(), at, style))?;
    Ok(())
}

/// Draws in memory and writes the finished picture, so that no half of one is ever left.
fn draw(path: &Path, size: (u32, u32), paint: impl FnOnce(&Canvas<'_>) -> Drawn) -> Result<(), TrainError> {
    let mut svg = String::new();
    let canvas = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    let painted = canvas.fill(&WHITE).map_err(Into::into).and_then(|()| paint(&canvas));
    painted
        .and_then(|()| canvas.present().map_err(Into::into))
        .map_err(|error| TrainError::Picture { path: path.to_path_buf(), reason: error.to_string() })?;
    drop(canvas);
    crate::files::write_whole(path, svg.as_bytes())
}
