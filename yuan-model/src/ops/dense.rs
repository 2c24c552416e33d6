//! Products with a dense weight, and the rows of an embedding.

use burn::backend::{Dispatch, tensor::IntTensor};
use burn::tensor::{FloatDType, Int, Tensor};

use super::YuanOps;

/// `rows · weight`: `[rows, d_in]` and `[d_in, d_out]` of one type → `[rows, d_out]`.
///
/// Where products are narrower than f32, the weight's gradient may come in f32: a weight that was
/// cast from f32 gets it unrounded.
///
/// # Panics
///
/// If the shapes do not fit.
pub fn dense(rows: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let ([_, d_in], [weight_in, _]) = (rows.dims(), weight.dims());
    assert_eq!(d_in, weight_in, "rows of width {d_in} against a weight of {weight_in} rows");
    Tensor::from_dispatch(Dispatch::dense(rows.into_dispatch(), weight.into_dispatch()))
}

/// Rows `ids` of a table, cast to `dtype`: `[vocab, d]` and `[rows]` → `[rows, d]`.
///
/// The gradient is added up in the order of the rows, whatever the backend.
pub fn embed(weight: Tensor<2>, ids: Tensor<1, Int>, dtype: FloatDType) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::embed(weight.into_dispatch(), ids.into_dispatch(), dtype))
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    };
    use burn::tensor::{FloatDType, IndexingUpdateOp, Shape};

    use crate::ops::parts::zeros_like;

    /// See [`dense`](super::dense).
    pub fn dense<B: Backend>(rows: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
        B::float_matmul(rows, weight)
    }

    /// `rowsᵀ · grad`.
    pub fn dense_weight_backward<B: Backend>(
        rows: FloatTensor<B>,
        grad: FloatTensor<B>,
    ) -> FloatTensor<B> {
        B::float_matmul(B::float_transpose(rows), grad)
    }

    /// See [`embed`](super::embed).
    pub fn embed<B: Backend>(
        weight: FloatTensor<B>,
        ids: IntTensor<B>,
        dtype: FloatDType,
    ) -> FloatTensor<B> {
        B::float_cast(B::float_select(weight, 0, ids), dtype)
    }

    /// Every row's gradient added to its place in the table.
    pub fn embed_backward<B: Backend>(
        grad: FloatTensor<B>,
        ids: IntTensor<B>,
        vocab: usize,
    ) -> FloatTensor<B> {
        let grad = B::float_cast(grad, FloatDType::F32);
        let table = zeros_like::<B>(&grad, Shape::from([vocab, grad.shape()[1]]));
        B::float_select_assign(table, 0, ids, grad, IndexingUpdateOp::Add)
    }
}

step!(Dense, 2, kept 2, (), |[rows, weight], (), grad| {
    let d_rows = B::dense(grad.clone(), B::float_transpose(weight));
    [d_rows, B::dense_weight_backward(rows, grad)]
});

step!(Embed, 1, kept 0, (IntTensor<B>, usize), |[], (ids, vocab), grad| {
    [B::embed_backward(grad, ids, vocab)]
});
