//! Cross-entropy, of logits or of what the logits are made from.

use burn::backend::{Dispatch, tensor::IntTensor};
use burn::tensor::{Int, Tensor};

use super::YuanOps;

/// `log Σ exp(logits) − logits[label]` of every row: `[rows, classes]` and `[rows]` → `[rows]`.
pub fn cross_entropy(logits: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::cross_entropy(logits.into_dispatch(), labels.into_dispatch()))
}

/// [`cross_entropy`] of the logits `scale · rows · weight`, some rows at a time: all logits at once
/// never exist, neither here nor in the gradient, which forms them again.
///
/// # Shapes
///
/// - `rows`: `[num_rows, d]`, `weight`: `[d, classes]`, of one type; `labels`: `[num_rows]`
/// - output: `[num_rows]` in f32
pub fn linear_cross_entropy(
    rows: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: f64,
    rows_at_once: usize,
) -> Tensor<1> {
    let (rows, weight, labels) =
        (rows.into_dispatch(), weight.into_dispatch(), labels.into_dispatch());
    Tensor::from_dispatch(Dispatch::linear_cross_entropy(rows, weight, labels, scale, rows_at_once))
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use std::ops::Range;

    use burn::backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    };
    use burn::tensor::{FloatDType, IndexingUpdateOp, Shape, Slice};

    use crate::ops::YuanOps;

    /// See [`cross_entropy`](super::cross_entropy).
    pub fn cross_entropy<B: Backend>(
        logits: FloatTensor<B>,
        labels: IntTensor<B>,
    ) -> FloatTensor<B> {
        let rows = logits.shape()[0];
        let labels = B::int_reshape(labels, Shape::from([rows, 1]));
        let picked = B::float_gather(1, log_probabilities::<B>(logits), labels);
        B::float_neg(B::float_reshape(picked, Shape::from([rows])))
    }

    /// `grad · (softmax(logits) − onehot(label))`.
    pub fn cross_entropy_backward<B: Backend>(
        logits: FloatTensor<B>,
        labels: IntTensor<B>,
        grad: FloatTensor<B>,
    ) -> FloatTensor<B> {
        let column = Shape::from([logits.shape()[0], 1]);
        let grad = B::float_reshape(grad, column.clone());
        let spread = B::float_mul(B::float_exp(log_probabilities::<B>(logits)), grad.clone());
        B::float_scatter(
            1,
            spread,
            B::int_reshape(labels, column),
            B::float_neg(grad),
            IndexingUpdateOp::Add,
        )
    }

    /// See [`linear_cross_entropy`](super::linear_cross_entropy).
    pub fn linear_cross_entropy<B: YuanOps>(
        rows: FloatTensor<B>,
        weight: FloatTensor<B>,
        labels: IntTensor<B>,
        scale: f64,
        rows_at_once: usize,
    ) -> FloatTensor<B> {
        let parts = pieces(rows.shape()[0], rows_at_once).map(|piece| {
            let logits = piece_logits::<B>(&rows, &weight, scale, piece.clone());
            B::cross_entropy(logits, int_rows::<B>(&labels, piece))
        });
        B::float_cat(parts.collect(), 0)
    }

    /// With `g = grad · (softmax(logits) − onehot)`: `d rows = scale · g · weightᵀ`, `d weight =
    /// scale · rowsᵀ · g`.
    pub fn linear_cross_entropy_backward<B: YuanOps>(
        rows: FloatTensor<B>,
        weight: FloatTensor<B>,
        labels: IntTensor<B>,
        scale: f64,
        rows_at_once: usize,
        grad: FloatTensor<B>,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let dtype = rows.dtype().into();
        let transposed = B::float_transpose(weight.clone());
        let (mut d_rows, mut d_weight) = (Vec::new(), None);
        for piece in pieces(rows.shape()[0], rows_at_once) {
            let logits = piece_logits::<B>(&rows, &weight, scale, piece.clone());
            let grad = B::float_slice(grad.clone(), &[Slice::from(piece.clone())]);
            let d_logits =
                B::cross_entropy_backward(logits, int_rows::<B>(&labels, piece.clone()), grad);
            let d_logits = B::float_cast(B::float_mul_scalar(d_logits, scale.into()), dtype);
            let rows = B::float_slice(rows.clone(), &[Slice::from(piece), Slice::full()]);
            let part = B::float_matmul(B::float_transpose(rows), d_logits.clone());
            d_weight = Some(match d_weight {
                None => part,
                Some(sum) => B::float_add(sum, part),
            });
            d_rows.push(B::float_matmul(d_logits, transposed.clone()));
        }
        let d_weight = d_weight.unwrap_or_else(|| B::float_mul_scalar(weight, 0.0.into()));
        (B::float_cat(d_rows, 0), d_weight)
    }

    /// Logits less the logarithm of the sum of their exponentials: log-probabilities.
    fn log_probabilities<B: Backend>(logits: FloatTensor<B>) -> FloatTensor<B> {
        let shifted = B::float_sub(logits.clone(), B::float_max_dim(logits, 1));
        let sum = B::float_sum_dim(B::float_exp(shifted.clone()), 1);
        B::float_sub(shifted, B::float_log(sum))
    }

    fn pieces(rows: usize, at_once: usize) -> impl Iterator<Item = Range<usize>> {
        let at_once = at_once.max(1);
        (0..rows).step_by(at_once).map(move |start| start..(start + at_once).min(rows))
    }

    /// Logits of some rows, in f32.
    fn piece_logits<B: Backend>(
        rows: &FloatTensor<B>,
        weight: &FloatTensor<B>,
        scale: f64,
        piece: Range<usize>,
    ) -> FloatTensor<B> {
        let rows = B::float_slice(rows.clone(), &[Slice::from(piece), Slice::full()]);
        let logits = B::float_cast(B::float_matmul(rows, weight.clone()), FloatDType::F32);
        if scale == 1.0 { logits } else { B::float_mul_scalar(logits, scale.into()) }
    }

    fn int_rows<B: Backend>(labels: &IntTensor<B>, piece: Range<usize>) -> IntTensor<B> {
        B::int_slice(labels.clone(), &[Slice::from(piece)])
    }
}

step!(CrossEntropy, 1, kept 1, IntTensor<B>, |[logits], labels, grad| {
    [B::cross_entropy_backward(logits, labels, grad)]
});

step!(
    LinearCrossEntropy, 2, kept 2, (IntTensor<B>, f64, usize),
    |[rows, weight], (labels, scale, at_once), grad| {
        B::linear_cross_entropy_backward(rows, weight, labels, scale, at_once, grad).into()
    }
);
