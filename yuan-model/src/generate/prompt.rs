//! What a sequence begins with: tokens, and images among them.

use burn::{
    module::Module,
    tensor::{FloatDType, Tensor},
};

use crate::{
    ModelError, YuanModel,
    vision::{ImageEncoder, Picture, pixels_of},
};

/// What a sequence begins with.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Its tokens; placeholders keep the places of the rows of images.
    pub(super) tokens: Vec<u32>,
    pub(super) images: Option<ImageRows>,
}

impl Prompt {
    /// A prompt with images, whose rows stand in the places of the placeholders in order.
    pub fn with_images(tokens: Vec<u32>, images: ImageRows) -> Self {
        Self { tokens, images: Some(images) }
    }

    /// Its tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

impl From<Vec<u32>> for Prompt {
    /// A prompt of text alone, in which a placeholder is a token like any other.
    fn from(tokens: Vec<u32>) -> Self {
        Self { tokens, images: None }
    }
}

/// What the image tower made of images: rows of the language model, which any number of prompts may
/// use. The tower does not run again for a second question on the same images.
#[derive(Debug, Clone)]
pub struct ImageRows(pub(super) Tensor<2>);

impl ImageRows {
    /// How many rows there are.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one image")]
    pub fn len(&self) -> usize {
        self.0.dims()[0]
    }

    /// The rows, `[rows, hidden]`.
    pub fn rows(&self) -> &Tensor<2> {
        &self.0
    }
}

impl YuanModel {
    /// Sends the tiles of images through the tower, a few at a time, and makes rows of them.
    ///
    /// # Errors
    ///
    /// If the model sees no images, there is no tile, or one is not of the tower's size.
    pub fn see(&self, tiles: &[Picture]) -> Result<ImageRows, ModelError> {
        let encoder = self.images.as_ref().ok_or(ModelError::SeesNoImages)?.clone().valid();
        if tiles.is_empty() {
            return Err(ModelError::NoTile);
        }
        let weight = encoder.tower.patch.weight.val();
        let (dtype, device) = (FloatDType::from(weight.dtype()), weight.device());
        let expected = encoder.tower.config().image_size;
        let sizes = tiles.iter().map(|tile| [tile.width(), tile.height()]);
        if let Some(found) = { sizes }.find(|&size| size != [expected; 2]) {
            return Err(ModelError::TileSize { found, expected });
        }
        let part = |part| encoder.forward(pixels_of(&tiles[part], dtype, &device));
        Ok(ImageRows(Tensor::cat(ImageEncoder::parts(tiles.len()).map(part).collect(), 0)))
    }
}
