//! Images: the tower that turns tiles into tokens, and the projector that makes rows of the language
//! model of them.
//!
//! [`TileGrid`] says how an image is cut into tiles, [`VisionTower`] (`InternViT`) turns tiles into
//! tokens, [`pixel_unshuffle`] puts four of them together, and [`Projector`] makes rows of the language
//! model's width. [`ImageEncoder`] is all of that; [`put_in_place`] puts its rows where a text has
//! placeholders. A [`YuanModel`](crate::YuanModel) with
//! [`YuanConfig::images`](crate::YuanConfig::images) has such an encoder.

use burn::tensor::{Int, Tensor, TensorData};

use crate::{ModelError, ops};

mod config;
mod cubic;
#[cfg(feature = "images")]
mod decode;
mod encoder;
mod layout;
mod picture;
mod positions;
mod projector;
mod segmentation;
mod tower;

pub use config::{ImageConfig, VisionConfig, VisionNormType};
#[cfg(feature = "images")]
pub use decode::PictureError;
pub use encoder::{ImageEncoder, pixels_of};
pub use layout::ImageLayout;
pub use picture::{NORMALISATION, Picture};
pub use positions::ImagePositions;
pub use projector::{Projector, pixel_unshuffle};
pub use segmentation::TileGrid;
pub use tower::{LayerNorm, VisionBlock, VisionNorm, VisionTower};

/// Places in a text that keep room for rows of images, in order.
pub fn placeholders(input_ids: &[u32], placeholder: u32) -> Vec<usize> {
    let places = input_ids.iter().enumerate().filter(|(_, token)| **token == placeholder);
    places.map(|(place, _)| place).collect()
}

/// The embeddings of a text, `[batch, seq, hidden]`, with the rows of its images, `[rows, hidden]`, at
/// `places` of the tokens, which are counted over the whole batch.
///
/// # Errors
///
/// If there are not as many places as rows.
///
/// # Panics
///
/// If a place lies outside the text.
pub fn put_in_place(
    text: Tensor<3>,
    places: &[usize],
    rows: Tensor<2>,
) -> Result<Tensor<3>, ModelError> {
    let ([batch, seq, hidden], [count, _]) = (text.dims(), rows.dims());
    if places.len() != count {
        return Err(ModelError::ImageRows { placeholders: places.len(), rows: count });
    }
    let mut sources: Vec<i64> = (0..(batch * seq) as i64).collect();
    for (row, &place) in places.iter().enumerate() {
        sources[place] = (batch * seq + row) as i64;
    }
    let sources: Tensor<1, Int> =
        Tensor::from_data(TensorData::new(sources, [batch * seq]), &text.device());
    let dtype = text.dtype().into();
    let all = Tensor::cat(vec![text.reshape([batch * seq, hidden]), rows.cast(dtype)], 0);
    // The gradient of this selection is added up in the same order on every backend.
    Ok(ops::embed(all, sources, dtype).reshape([batch, seq, hidden]))
}
