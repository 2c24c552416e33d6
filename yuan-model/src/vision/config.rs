//! What an image tower is.

use serde::{Deserialize, Serialize};

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
        }
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        require(
            width.is_multiple_of(heads),
            "num_attention_heads",
            heads,
            "must divide hidden_size",
        )?;
        let (image, patch) = (self.image_size, self.patch_size);
        let is_even = image.is_multiple_of(2 * patch);
        require(is_even, "image_size", image, "must be an even number of patches")
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
