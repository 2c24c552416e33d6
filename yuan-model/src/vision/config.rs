//! What an image tower is.

use serde::{Deserialize, Serialize};

use super::ImagePositions;
use crate::{ConfigError, config::require};

/// The norm of a tower's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VisionNormType {
    /// With mean and bias, as InternViT-300M has it.
    LayerNorm,
    /// By the root of the mean square.
    RmsNorm,
}

/// An `InternViT` tower; the keys are upstream's `vision_config`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    /// Width of a token.
    pub hidden_size: usize,
    /// Inner width of a block's perceptron.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads of attention.
    pub num_attention_heads: usize,
    /// Channels of an image.
    pub num_channels: usize,
    /// Pixels of a tile's side.
    pub image_size: usize,
    /// Pixels of a patch's side.
    pub patch_size: usize,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether queries and keys are normed.
    pub qk_normalization: bool,
    /// Norm of the blocks.
    pub norm_type: VisionNormType,
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// Factor that the branches of a block begin with.
    #[serde(default = "one")]
    pub initializer_factor: f64,
}

fn one() -> f64 {
    1.0
}

impl VisionConfig {
    /// InternViT-300M at 448 pixels, which Yuan3.0 uses: 304,012,288 parameters.
    pub fn intern_vit_300m() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            num_channels: 3,
            image_size: 448,
            patch_size: 14,
            qkv_bias: true,
            qk_normalization: false,
            norm_type: VisionNormType::LayerNorm,
            layer_norm_eps: 1e-6,
            initializer_factor: 0.1,
        }
    }

    /// Patches of a tile's side.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens of a tile after four patches became one.
    pub fn tokens_per_tile(&self) -> usize {
        (self.grid() / 2).pow(2)
    }

    /// Parameters of the tower.
    pub fn parameters(&self) -> u64 {
        let (w, inner) = (self.hidden_size, self.intermediate_size);
        let bias = if self.qkv_bias { 3 * w } else { 0 };
        let norm = match self.norm_type {
            VisionNormType::LayerNorm => 2 * w,
            VisionNormType::RmsNorm => w,
        };
        let of_queries = if self.qk_normalization { 2 * w } else { 0 };
        let block = 3 * w * w
            + bias
            + w * w
            + w
            + 2 * w * inner
            + inner
            + w
            + 2 * norm
            + of_queries
            + 2 * w;
        let patch = self.num_channels * self.patch_size.pow(2) * w + w;
        let positions = (self.grid().pow(2) + 1) * w;
        (self.num_hidden_layers * block + patch + positions + w) as u64
    }

    /// Far above any tower: the largest has some 6e9.
    const MOST_PARAMETERS: f64 = 1e12;

    /// The count in a number that cannot overflow.
    fn rough_parameter_count(&self) -> f64 {
        let [width, inner, layers, channels, patch, grid] = [
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_channels,
            self.patch_size,
            self.grid(),
        ]
        .map(|size| size as f64);
        layers * width * (4.0 * width + 2.0 * inner)
            + width * (channels * patch * patch + grid * grid)
    }

    /// Checks that the sizes fit each other.
    ///
    /// # Errors
    ///
    /// Names the key that does not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_channels", self.num_channels),
            ("patch_size", self.patch_size),
            ("image_size", self.image_size),
        ];
        for (key, size) in sizes {
            if size == 0 {
                return Err(ConfigError::Zero { key });
            }
            require(size <= 1 << 20, key, size, "is beyond any image tower")?;
        }
        let layers = self.num_hidden_layers;
        require(layers <= 1 << 16, "num_hidden_layers", layers, "is beyond any image tower")?;
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        require(
            width.is_multiple_of(heads),
            "num_attention_heads",
            heads,
            "must divide hidden_size",
        )?;
        let (image, patch) = (self.image_size, self.patch_size);
        let epsilon = self.layer_norm_eps;
        let is_small = epsilon > 0.0 && epsilon < 1.0;
        require(is_small, "layer_norm_eps", epsilon, "must lie between 0 and 1")?;
        let is_even = image.is_multiple_of(2 * patch);
        require(is_even, "image_size", image, "must be an even number of patches")?;
        let count = self.rough_parameter_count();
        match count <= Self::MOST_PARAMETERS {
            true => Ok(()),
            false => Err(ConfigError::TooManyParameters { count }),
        }
    }
}

/// How a model sees: its tower, and where the rows of an image stand in a text.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageConfig {
    /// The tower.
    pub tower: VisionConfig,
    /// The token that keeps a place for a row of an image (`img_context_token_id`).
    pub placeholder: u32,
    /// Tiles that an image is cut into at most (`max_dynamic_patch`); the whole image, which comes
    /// after several tiles, is not one of them.
    pub max_tiles: usize,
    /// Where its training had images among the tokens of a text, if it is known: `image_positions`, a
    /// key of this library.
    pub positions: Option<ImagePositions>,
}

impl ImageConfig {
    /// A tower for tests: two layers of width 32, tiles of 28 × 28 pixels, four rows each.
    pub fn tiny(placeholder: u32) -> Self {
        let tower = VisionConfig {
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            image_size: 28,
            patch_size: 7,
            ..VisionConfig::intern_vit_300m()
        };
        Self { tower, placeholder, max_tiles: 9, positions: None }
    }

    /// That of the published models: InternViT-300M, and nine tiles of one image.
    pub fn published() -> Self {
        let tower = VisionConfig::intern_vit_300m();
        Self { tower, placeholder: 77188, max_tiles: 9, positions: None }
    }

    /// Checks that the sizes fit each other and a language model of `vocab_size` tokens.
    ///
    /// # Errors
    ///
    /// Names the key that does not.
    pub fn validate(&self, vocab_size: usize) -> Result<(), ConfigError> {
        self.tower.validate()?;
        let channels = self.tower.num_channels;
        require(channels == 3, "num_channels", channels, "must be 3: red, green and blue")?;
        if self.max_tiles == 0 {
            return Err(ConfigError::Zero { key: "max_dynamic_patch" });
        }
        let most = 1 << 10;
        require(self.max_tiles <= most, "max_dynamic_patch", self.max_tiles, "is above 1024")?;
        let (id, name) = (self.placeholder, "img_context");
        match (id as usize) < vocab_size {
            true => Ok(()),
            false => Err(ConfigError::TokenOutside { name, id, vocab_size }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tower_has_as_many_parameters_as_the_published_one() {
        assert_eq!(VisionConfig::intern_vit_300m().parameters(), 304_012_288);
        assert_eq!(VisionConfig::intern_vit_300m().tokens_per_tile(), 256);
    }
}
