//! From the tower's tokens to rows of the language model.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Device, Tensor, activation::silu},
};

use super::VisionConfig;
use crate::{YuanConfig, attention::project, norm::RmsNorm};

/// Four patches become one row of the language model:
/// `RMSNorm(W_down (silu(W_up x) ⊙ W_gate x))`, with `SiLU` on *up*.
#[derive(Module, Debug)]
pub struct Projector {
    /// `[4 · width, inner]`
    pub gate: Linear,
    /// `[4 · width, inner]`
    pub up: Linear,
    /// `[inner, hidden]`
    pub down: Linear,
    /// Norm of the rows.
    pub norm: RmsNorm,
}

impl Projector {
    /// A projector with fresh weights; its inner width is that of the language model's experts.
    pub fn new(vision: &VisionConfig, language: &YuanConfig, device: &Device) -> Self {
        let (from, inner, to) =
            (4 * vision.hidden_size, language.expert_hidden_size, language.hidden_size);
        let linear =
            |from: usize, to: usize| LinearConfig::new(from, to).with_bias(false).init(device);
        Self {
            gate: linear(from, inner),
            up: linear(from, inner),
            down: linear(inner, to),
            norm: RmsNorm::new(to, language.norm_epsilon, device),
        }
    }

    /// Rows `[tiles, tokens, 4 · width]` → `[tiles, tokens, hidden]`, and the same before the norm.
    pub fn forward(&self, x: Tensor<3>) -> [Tensor<3>; 2] {
        let inner = silu(project(&self.up, x.clone())) * project(&self.gate, x);
        let rows = project(&self.down, inner);
        [self.norm.forward(rows.clone()), rows]
    }
}

/// Puts the four patches of every square side by side: tokens of the tower `[tiles, 1 + grid²,
/// width]`, whose first one is left out, to `[tiles, (grid / 2)², 4 · width]`, squares row by row;
/// channel `4c + 2·dy + dx` is channel `c` of the patch at `(dy, dx)`.
///
/// # Panics
///
/// If there is no square and even number of patches.
pub fn pixel_unshuffle(tokens: Tensor<3>) -> Tensor<3> {
    let [tiles, count, width] = tokens.dims();
    let grid = (count - 1).isqrt();
    assert!(grid * grid == count - 1 && grid.is_multiple_of(2), "{} patches", count - 1);
    let half = grid / 2;
    tokens
        .slice_dim(1, 1..count)
        .reshape([tiles, half, 2, half, 2, width])
        .permute([0, 1, 3, 5, 2, 4])
        .reshape([tiles, half * half, 4 * width])
}
