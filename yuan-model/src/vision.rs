//! Images: the tower that turns tiles into tokens, and the projector that makes rows of the language
//! model of them.
//!
//! [`TileGrid`] says how an image is cut into tiles, [`VisionTower`] (`InternViT`) turns tiles into
//! tokens, [`pixel_unshuffle`] puts four of them together, [`Projector`] makes rows of the language
//! model's width, and [`put_in_place`] puts these where a text has placeholders. Upstream's names are in
//! [`hf::vision`](crate::hf::vision).

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};

use crate::ModelError;

mod config;
mod cubic;
mod picture;
mod projector;
mod segmentation;
mod tower;

pub use config::{VisionConfig, VisionNormType};
pub use picture::{NORMALISATION, Picture};
pub use projector::{Projector, pixel_unshuffle};
pub use segmentation::TileGrid;
pub use tower::{VisionBlock, VisionNorm, VisionTower};

/// The embeddings of a text, `[batch, seq, hidden]`, with the rows of its images, `[rows, hidden]`, in
/// the places of the `placeholder` tokens among `input_ids`, in order.
///
/// # Errors
///
/// If there are not as many placeholders as rows.
///
/// # Panics
///
/// If `input_ids` has not one token for each place of the text.
pub fn put_in_place(
    text: Tensor<3>,
    input_ids: &[u32],
    placeholder: u32,
    rows: Tensor<2>,
) -> Result<Tensor<3>, ModelError> {
    let ([batch, seq, hidden], [count, _]) = (text.dims(), rows.dims());
    assert_eq!(input_ids.len(), batch * seq, "a token for each place");
    let placeholders = input_ids.iter().filter(|&&token| token == placeholder).count();
    if placeholders != count {
        return Err(ModelError::ImageRows { placeholders, rows: count });
    }
    let mut image_rows: Range<usize> = batch * seq..batch * seq + count;
    let source = |(place, &token): (usize, &u32)| match token == placeholder {
        true => image_rows.next().unwrap_or(place) as i64,
        false => place as i64,
    };
    let sources: Vec<i64> = input_ids.iter().enumerate().map(source).collect();
    let sources: Tensor<1, Int> =
        Tensor::from_data(TensorData::new(sources, [batch * seq]), &text.device());
    let all = Tensor::cat(vec![text.reshape([batch * seq, hidden]), rows], 0);
    Ok(all.select(0, sources).reshape([batch, seq, hidden]))
}
