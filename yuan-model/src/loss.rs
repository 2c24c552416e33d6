//! Next-token cross-entropy in f32, with a loss mask.

use burn::tensor::{FloatDType, Int, Tensor};

use crate::{YuanModel, ops};

/// Cross-entropy of every position: `[batch, seq, vocab]` and labels `[batch, seq]` → `[batch,
/// seq]`.
pub fn token_losses(logits: Tensor<3>, labels: Tensor<2, Int>) -> Tensor<2> {
    let [batch, seq, vocab] = logits.dims();
    let logits = logits.cast(FloatDType::F32).reshape([batch * seq, vocab]);
    ops::cross_entropy(logits, labels.reshape([batch * seq])).reshape([batch, seq])
}

impl YuanModel {
    /// Cross-entropy of every position of `hidden`, `[batch, seq, hidden]`, for labels `[batch,
    /// seq]`, in f32.
    ///
    /// The same as [`token_losses`] of [`logits`](YuanModel::logits), but of more than
    /// [`ROWS_AT_ONCE`] rows the logits never exist at once: the head's product and its gradient go
    /// over so many rows at a time, and the gradient forms the logits again.
    pub fn token_losses(&self, hidden: Tensor<3>, labels: Tensor<2, Int>) -> Tensor<2> {
        let [batch, seq, width] = hidden.dims();
        if batch * seq <= ROWS_AT_ONCE {
            return token_losses(self.logits(hidden), labels);
        }
        let weight = self.head.weight.val().cast(hidden.dtype());
        let (rows, labels) = (hidden.reshape([batch * seq, width]), labels.reshape([batch * seq]));
        let scale = self.config().logit_scale;
        ops::linear_cross_entropy(rows, weight, labels, scale, ROWS_AT_ONCE).reshape([batch, seq])
    }
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
