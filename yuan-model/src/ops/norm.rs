//! RMSNorm over rows.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use super::YuanOps;

/// `weight ⊙ x / sqrt(mean(x²) + ε)` of every row: `[rows, d]` and `[d]` → `[rows, d]`.
///
/// Computed in f32 whatever the type of `x`, which the result has too; the weight is in f32.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), epsilon))
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
    use burn::tensor::{FloatDType, Shape};

    /// See [`rms_norm`](super::rms_norm).
    pub fn rms_norm<B: Backend>(
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        epsilon: f64,
    ) -> FloatTensor<B> {
        let (width, dtype) = (weight.shape()[0], x.dtype());
        let weight = B::float_reshape(weight, Shape::from([1, width]));
        B::float_cast(B::float_mul(normalised::<B>(x, epsilon).0, weight), dtype.into())
    }

    /// With `n` the normalised row, `r` its inverse root and `g = grad ⊙ weight`:
    /// `d x = r (g − n mean(g ⊙ n))`, `d weight = Σ grad ⊙ n`.
    pub fn rms_norm_backward<B: Backend>(
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        grad: FloatTensor<B>,
        epsilon: f64,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let (width, dtype) = (weight.shape()[0], x.dtype());
        let (normed, inverse) = normalised::<B>(x, epsilon);
        let grad = B::float_cast(grad, FloatDType::F32);
        let d_weight = B::float_sum_dim(B::float_mul(grad.clone(), normed.clone()), 0);
        let scaled = B::float_mul(grad, B::float_reshape(weight, Shape::from([1, width])));
        let along = B::float_mean_dim(B::float_mul(scaled.clone(), normed.clone()), 1);
        let d_x = B::float_mul(B::float_sub(scaled, B::float_mul(normed, along)), inverse);
        (B::float_cast(d_x, dtype.into()), B::float_reshape(d_weight, Shape::from([width])))
    }

    /// The normalised rows in f32, and `1 / sqrt(mean(x²) + ε)` of each.
    fn normalised<B: Backend>(x: FloatTensor<B>, epsilon: f64) -> (FloatTensor<B>, FloatTensor<B>) {
        let x = B::float_cast(x, FloatDType::F32);
        let mean_square = B::float_mean_dim(B::float_mul(x.clone(), x.clone()), 1);
        let inverse =
            B::float_recip(B::float_sqrt(B::float_add_scalar(mean_square, epsilon.into())));
        (B::float_mul(x, inverse.clone()), inverse)
    }
}

step!(RmsNorm, 2, kept 2, f64, |[x, weight], epsilon, grad| {
    B::rms_norm_backward(x, weight, grad, epsilon).into()
});
