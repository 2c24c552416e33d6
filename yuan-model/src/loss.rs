//! Next-token cross-entropy in f32, with a loss mask.

use burn::tensor::{FloatDType, Int, Tensor};

use crate::ops;

/// Cross-entropy of every position: `[batch, seq, vocab]` and labels `[batch, seq]` → `[batch,
/// seq]`.
pub fn token_losses(logits: Tensor<3>, labels: Tensor<2, Int>) -> Tensor<2> {
    let [batch, seq, vocab] = logits.dims();
    let logits = logits.cast(FloatDType::F32).reshape([batch * seq, vocab]);
    ops::cross_entropy(logits, labels.reshape([batch * seq])).reshape([batch, seq])
}

/// Rows whose logits are in memory at once: 136,064 tokens of vocabulary in f32 are then 1.1 GB.
pub const ROWS_AT_ONCE: usize = 2048;

/// `Σ mask · loss / Σ mask` over `[batch, seq]`; without a mask, the mean. Shape `[1]`.
///
/// A mask of zeros gives a loss of zero.
pub fn masked_mean(losses: Tensor<2>, mask: Option<Tensor<2>>) -> Tensor<1> {
    match mask {
        Some(mask) => (losses * mask.clone()).sum() / mask.sum().clamp_min(1.0),
        None => losses.mean(),
    }
}
