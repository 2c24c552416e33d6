//! Differences to a base run, measured ones beside published ones.

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, VPos},
};

use super::{INK, PRUNE, STRONG, heading, svg, text};
use crate::ReportError;

/// One variant against the base.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Name of the variant.
    pub name: String,
    /// Our difference.
    pub measured: f64,
    /// Half the width of its confidence interval.
    pub error: f64,
    /// The published difference.
    pub paper: Option<f64>,
}

/// A bar with its confidence interval for every variant, and a ring where the paper lies.
///
/// # Errors
///
/// If the drawing library fails.
pub fn differences(title: &str, rows: &[Difference]) -> Result<String, ReportError> {
    let reach = rows
        .iter()
        .flat_map(|row| [row.measured.abs() + row.error, row.paper.unwrap_or(0.0).abs()])
        .fold(1e-3, f64::max)
        * 1.1;
    let height = 100 + 26 * rows.len() as i32;
    svg("differences to the base", (900, height as u32), |canvas| {
        heading(canvas, title, 900)?;
        let (left, right) = (280, 870);
        let x = |value: f64| left + ((value / reach + 1.0) / 2.0 * f64::from(right - left)) as i32;
        let bottom = 50 + 26 * rows.len() as i32;
        for tick in -2..=2 {
            let value = reach / 1.1 * f64::from(tick) / 2.0;
            let line = [(x(value), 44), (x(value), bottom)];
            canvas.draw(&PathElement::new(line, INK.mix(if tick == 0 { 0.8 } else { 0.2 })))?;
            text(
                canvas,
                &format!("{value:+.3}"),
                (x(value), bottom + 12),
                12,
                (HPos::Center, VPos::Center),
            )?;
        }
        for (i, row) in rows.iter().enumerate() {
            let y = 60 + 26 * i as i32;
            text(canvas, &row.name, (left - 10, y), 13, (HPos::Right, VPos::Center))?;
            let bar = [(x(row.measured.min(0.0)), y - 7), (x(row.measured.max(0.0)), y + 7)];
            canvas.draw(&Rectangle::new(bar, STRONG.mix(0.7).filled()))?;
            let whisker = [(x(row.measured - row.error), y), (x(row.measured + row.error), y)];
            canvas.draw(&PathElement::new(whisker, INK.stroke_width(2)))?;
            if let Some(paper) = row.paper {
                canvas.draw(&Circle::new((x(paper), y), 5, PRUNE.stroke_width(2)))?;
            }
        }
        let note = "bars: measured, with confidence interval; rings: the paper; left is better";
        text(canvas, note, (575, bottom + 34), 12, (HPos::Center, VPos::Center))
    })
}
