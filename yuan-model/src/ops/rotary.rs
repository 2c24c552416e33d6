//! Rotary positions.

use burn::backend::{Dispatch, tensor::FloatTensor};
use burn::tensor::Tensor;

use super::YuanOps;

/// Rotates the first `2 · pairs` dimensions of every head, halves paired; the rest pass through.
///
/// # Shapes
///
/// - `x`, output: `[batch, seq, heads, head_dim]`
/// - `cos`, `sin`: `[batch or 1, seq, 1, pairs]`; they carry no gradient
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    Tensor::from_dispatch(Dispatch::rotate(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
    ))
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};

    use crate::ops::{YuanOps, parts::part};

    /// See [`rotate`](super::rotate).
    pub fn rotate<B: Backend>(
        x: FloatTensor<B>,
        cos: FloatTensor<B>,
        sin: FloatTensor<B>,
    ) -> FloatTensor<B> {
        let (pairs, width) = (cos.shape()[3], x.shape()[3]);
        let (first, second) =
            (part::<B>(x.clone(), 3, 0..pairs), part::<B>(x.clone(), 3, pairs..2 * pairs));
        let product = |a: &FloatTensor<B>, b: &FloatTensor<B>| B::float_mul(a.clone(), b.clone());
        let mut parts = vec![
            B::float_sub(product(&first, &cos), product(&second, &sin)),
            B::float_add(product(&second, &cos), product(&first, &sin)),
        ];
        if 2 * pairs < width {
            parts.push(part::<B>(x, 3, 2 * pairs..width));
        }
        B::float_cat(parts, 3)
    }

    /// Both [rotated](super::rotate), side by side in every head.
    pub fn rotate_pair<B: YuanOps>(
        first: FloatTensor<B>,
        second: FloatTensor<B>,
        cos: FloatTensor<B>,
        sin: FloatTensor<B>,
    ) -> FloatTensor<B> {
        B::float_cat(
            vec![B::rotate(first, cos.clone(), sin.clone()), B::rotate(second, cos, sin)],
            3,
        )
    }

    /// Queries and keys taken apart and rotated, and values, all `[batch, heads, seq, head_dim]`.
    pub fn rotated_heads<B: YuanOps>(
        query_key: FloatTensor<B>,
        value: FloatTensor<B>,
        cos: FloatTensor<B>,
        sin: FloatTensor<B>,
    ) -> [FloatTensor<B>; 3] {
        let width = value.shape()[3];
        let half = |range| part::<B>(query_key.clone(), 3, range);
        let query = B::rotate(half(0..width), cos.clone(), sin.clone());
        let key = B::rotate(half(width..2 * width), cos, sin);
        [query, key, value].map(|x| B::float_swap_dims(x, 1, 2))
    }
}

// The inverse of a rotation turns the other way.
step!(Rotate, 1, kept 0, [FloatTensor<B>; 2], |[], [cos, sin], grad| {
    [B::rotate(grad, cos, B::float_neg(sin))]
});
