//! From tiles to rows of the language model: tower, pixel unshuffle and projector in one.

use std::ops::Range;

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor, TensorData},
};

use super::{ImageConfig, Picture, Projector, VisionTower, pixel_unshuffle};
use crate::{ConfigError, YuanConfig};

/// The part of a multimodal model that sees.
#[derive(Module, Debug)]
pub struct ImageEncoder {
    /// Tiles to tokens.
    pub tower: VisionTower,
    /// Four tokens to a row of the language model.
    pub projector: Projector,
}

impl ImageEncoder {
    /// Tiles that go through the tower together: their activations bound its memory.
    const TILES_AT_ONCE: usize = 8;

    /// So many tiles in parts that go through the tower together.
    pub fn parts(tiles: usize) -> impl Iterator<Item = Range<usize>> {
        let starts = (0..tiles).step_by(Self::TILES_AT_ONCE);
        starts.map(move |first| first..(first + Self::TILES_AT_ONCE).min(tiles))
    }

    /// An encoder with fresh weights, for a language model of this configuration.
    ///
    /// # Errors
    ///
    /// If the configuration contradicts itself.
    pub fn new(
        images: &ImageConfig,
        language: &YuanConfig,
        device: &Device,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            tower: VisionTower::new(&images.tower, device)?,
            projector: Projector::new(&images.tower, language, device),
        })
    }

    /// Rows of the language model that tiles `[tiles, channels, side, side]` become, tile by tile:
    /// `[tiles · rows of a tile, hidden]`. The type of the pixels is the one that it computes in.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<2> {
        let [rows, _] = self.projector.forward(pixel_unshuffle(self.tower.forward(pixels)));
        rows.flatten(0, 1)
    }
}

/// Tiles as the tower reads them: normalised, `[tiles, 3, side, side]`.
///
/// # Panics
///
/// If there is none, or they differ in size.
pub fn pixels_of<'a>(
    tiles: impl IntoIterator<Item = &'a Picture>,
    dtype: FloatDType,
    device: &Device,
) -> Tensor<4> {
    let (mut values, mut count, mut size) = (Vec::new(), 0, None);
    for tile in tiles {
        let this = [tile.height(), tile.width()];
        assert_eq!(*size.get_or_insert(this), this, "height and width of a tile");
        values.extend(tile.normalised());
        count += 1;
    }
    let [height, width] = size.expect("at least one tile");
    let data = TensorData::new(values, [count, 3, height, width]);
    Tensor::<4>::from_data(data, device).cast(dtype)
}
