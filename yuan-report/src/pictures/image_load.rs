//! The loads of images and of text, expert by expert.

use plotters::prelude::*;
use yuan_laep::LayerLoad;

use super::{Canvas, Drawn, INK, PALE, STRONG, chosen_layers, key, legend, panels};
use crate::ReportError;

/// The part of the load that images and text have on the same experts, from 0 (they share none) to 1
/// (every expert has the same share of both): `Σ min(p, q)` of their distributions.
pub fn common_load(images: &LayerLoad, text: &LayerLoad) -> f64 {
    images.fractions().iter().zip(text.fractions()).map(|(p, q)| p.min(q)).sum()
}

/// Share of every expert in the load of images and in that of text, a panel per layer (four at most);
/// experts in the order of their share of text.
///
/// # Errors
///
/// If the drawing library fails.
pub fn image_load(images: &[LayerLoad], text: &[LayerLoad]) -> Result<String, ReportError> {
    let layers = chosen_layers(images.len().min(text.len()), 4);
    panels(
        "experts of images and of text",
        "Experts of images and of text",
        &layers,
        |panel, at| pairs(panel, at, &images[at], &text[at]),
    )
}

fn pairs(panel: &Canvas<'_>, layer: usize, images: &LayerLoad, text: &LayerLoad) -> Drawn {
    let mut order = text.ascending();
    order.reverse();
    let (of_images, of_text) = (images.fractions(), text.fractions());
    let (experts, common) = (order.len() as f64, 100.0 * common_load(images, text));
    let most = of_images.iter().chain(&of_text).fold(0.0_f64, |most, share| most.max(*share));
    let title = format!("layer {layer}: {common:.0} % of the load on the same experts");
    let mut chart = ChartBuilder::on(panel)
        .margin(8)
        .caption(title, ("sans-serif", 14).into_font().color(&INK))
        .x_label_area_size(32)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..experts, 0.0..(1.15 * most).max(0.01))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("experts, busiest with text first")
        .y_desc("share of the load")
        .x_label_formatter(&|rank| format!("{rank:.0}"))
        .y_label_formatter(&|share| format!("{share:.2}"))
        .draw()?;
    for (name, shares, left, color) in
        [("text", &of_text, 0.08, PALE), ("images", &of_images, 0.5, STRONG)]
    {
        let bar = |(rank, &expert): (usize, &usize)| {
            let from = rank as f64 + left;
            Rectangle::new([(from, 0.0), (from + 0.42, shares[expert])], color.filled())
        };
        let series = chart.draw_series(order.iter().enumerate().map(bar))?;
        series.label(name).legend(key(color.stroke_width(6)));
    }
    legend(&mut chart, SeriesLabelPosition::UpperMiddle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_shares_have_all_in_common_and_other_experts_nothing() {
        let load = |tokens: &[u64]| LayerLoad::new(tokens.to_vec());
        assert!((common_load(&load(&[1, 2, 1]), &load(&[2, 4, 2])) - 1.0).abs() < 1e-12);
        assert_eq!(common_load(&load(&[5, 0]), &load(&[0, 7])), 0.0);
        assert!((common_load(&load(&[3, 1]), &load(&[1, 3])) - 0.5).abs() < 1e-12);
        let picture = image_load(&[load(&[3, 1])], &[load(&[1, 3])]).unwrap();
        assert!(picture.contains("layer 0: 50 % of the load on the same experts"));
    }
}
