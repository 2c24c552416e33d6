//! Pictures of a run as SVG text.

use plotters::{
    coord::{Shift, types::RangedCoordf64},
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use crate::ReportError;

mod device_load;
mod differences;
mod expert_load;
mod groups;
mod image_load;
mod load_history;
mod load_profile;
mod loss;
mod rollouts;
mod sweep;

pub use device_load::device_load;
pub use differences::{Difference, differences};
pub use expert_load::expert_load;
pub use groups::device_groups;
pub use image_load::{common_load, image_load};
pub use load_history::load_history;
pub use load_profile::load_profile;
pub use loss::loss;
pub use rollouts::{SeedRuns, rollouts};
pub use sweep::sweep;

// The HTML report gives these colours others in the dark (`html.css`).
const INK: RGBColor = RGBColor(40, 40, 48);
const PALE: RGBColor = RGBColor(150, 170, 200);
const STRONG: RGBColor = RGBColor(20, 90, 170);
const PRUNE: RGBColor = RGBColor(200, 60, 40);

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Layers that a picture with a panel per layer shows: at most `most`, the first and the last among
/// them.
fn chosen_layers(layers: usize, most: usize) -> Vec<usize> {
    if layers <= most {
        return (0..layers).collect();
    }
    (0..most).map(|i| i * (layers - 1) / (most - 1).max(1)).collect()
}

fn text(canvas: &Canvas<'_>, what: &str, at: (i32, i32), size: i32, (h, v): (HPos, VPos)) -> Drawn {
    let style = ("sans-serif", size).into_font().color(&INK).pos(Pos::new(h, v));
    canvas.draw(&Text::new(what.to_owned(), at, style))?;
    Ok(())
}

fn heading(canvas: &Canvas<'_>, what: &str, width: i32) -> Drawn {
    text(canvas, what, (width / 2, 22), 20, (HPos::Center, VPos::Center))
}

/// A series' line beside its name.
fn key(style: impl Into<ShapeStyle>) -> impl Fn((i32, i32)) -> PathElement<(i32, i32)> {
    let style = style.into();
    move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style)
}

/// The names of the labelled series, in a corner.
fn legend<'a, 'b: 'a>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>,
    position: SeriesLabelPosition,
) -> Drawn {
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.85))
        .border_style(INK.mix(0.3))
        .draw()?;
    Ok(())
}

/// A picture with a panel for each of some layers, two in a row.
fn panels(
    name: &'static str,
    title: &str,
    layers: &[usize],
    mut paint: impl FnMut(&Canvas<'_>, usize) -> Drawn,
) -> Result<String, ReportError> {
    let rows = layers.len().div_ceil(2).max(1);
    svg(name, (900, 50 + 260 * rows as u32), |canvas| {
        heading(canvas, title, 900)?;
        let panels =
            canvas.margin(40, 0, 0, 0).split_evenly((rows, if layers.len() > 1 { 2 } else { 1 }));
        panels.iter().zip(layers).try_for_each(|(panel, &layer)| paint(panel, layer))
    })
}

fn svg(
    name: &'static str,
    size: (u32, u32),
    paint: impl FnOnce(&Canvas<'_>) -> Drawn,
) -> Result<String, ReportError> {
    let mut svg = String::new();
    let canvas = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    let painted = canvas.fill(&WHITE).map_err(Into::into).and_then(|()| paint(&canvas));
    painted
        .and_then(|()| canvas.present().map_err(Into::into))
        .map_err(|error| ReportError::Picture { name, reason: error.to_string() })?;
    drop(canvas);
    // With a view box it scales where a page gives it another width.
    let (width, height) = size;
    let plain = format!("<svg width=\"{width}\" height=\"{height}\"");
    Ok(svg.replacen(&plain, &format!("{plain} role=\"img\" aria-label=\"{name}\""), 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_layers_span_the_model() {
        assert_eq!(chosen_layers(3, 4), [0, 1, 2]);
        assert_eq!(chosen_layers(103, 4), [0, 34, 68, 102]);
        assert_eq!(chosen_layers(0, 4), [0; 0]);
    }
}
