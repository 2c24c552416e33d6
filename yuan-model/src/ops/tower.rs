//! Operations of the image tower: attention without a mask, a norm with mean and bias, gelu, and
//! branches with a bias or a scale.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use super::YuanOps;

/// `softmax(q kᵀ / sqrt(d)) v` where every position sees every other one.
///
/// The scores are formed again for the gradient instead of being kept.
///
/// # Shapes
///
/// - `qkv`: `[batch, seq, 3 · width]`, queries, keys and values one after the other, heads side by side
///   in each
/// - output: `[batch, seq, width]`
///
/// # Panics
///
/// If the width is no multiple of 3 · heads.
pub fn full_attention(qkv: Tensor<3>, heads: usize) -> Tensor<3> {
    let width = qkv.dims()[2];
    assert!(
        width.is_multiple_of(3 * heads),
        "{heads} heads of queries, keys and values in {width}"
    );
    Tensor::from_dispatch(Dispatch::full_attention(qkv.into_dispatch(), heads))
}

/// `weight ⊙ (x − mean(x)) / sqrt(var(x) + ε) + bias` of every row, in f32: `[rows, d]` and `[d]`
/// twice → `[rows, d]`, in the type of `x`; weight and bias are in f32.
pub fn layer_norm(x: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let (x, weight, bias) = (x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch());
    Tensor::from_dispatch(Dispatch::layer_norm_rows(x, weight, bias, epsilon))
}

/// `x · Φ(x)` with the normal distribution Φ, and not by its tanh: `[rows, d]` → `[rows, d]`.
pub fn gelu(x: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::gelu_rows(x.into_dispatch()))
}

/// `x + bias` for every row: `[rows, d]` and `[d]`, of one type, → `[rows, d]`.
pub fn add_bias(x: Tensor<2>, bias: Tensor<1>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::add_bias(x.into_dispatch(), bias.into_dispatch()))
}

/// `x + branch ⊙ scale` for every row: `[rows, d]` twice and `[d]`, of one type, → `[rows, d]`.
pub fn add_scaled(x: Tensor<2>, branch: Tensor<2>, scale: Tensor<1>) -> Tensor<2> {
    let (x, branch, scale) = (x.into_dispatch(), branch.into_dispatch(), scale.into_dispatch());
    Tensor::from_dispatch(Dispatch::add_scaled(x, branch, scale))
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use std::f64::consts::{FRAC_1_SQRT_2, PI};

    use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
    use burn::tensor::{FloatDType, Shape};

    use crate::ops::{
        attention::portable::{gradients_of, scaled_scores, softmax},
        parts::part,
    };

    /// See [`full_attention`](super::full_attention); the softmax is in f32 whatever the type.
    pub fn full_attention<B: Backend>(qkv: FloatTensor<B>, heads: usize) -> FloatTensor<B> {
        let dtype = qkv.dtype().into();
        let [query, key, value] = split_heads::<B>(qkv, heads);
        let probabilities = softmax::<B>(scaled_scores::<B>(query, key));
        join_heads::<B>(B::float_matmul(B::float_cast(probabilities, dtype), value))
    }

    /// Gradient of [`full_attention`](super::full_attention): the scores are formed again.
    pub fn full_attention_backward<B: Backend>(
        qkv: FloatTensor<B>,
        grad: FloatTensor<B>,
        heads: usize,
    ) -> FloatTensor<B> {
        let [query, key, value] = split_heads::<B>(qkv, heads);
        let p = softmax::<B>(scaled_scores::<B>(query.clone(), key.clone()));
        let grad = by_head::<B>(grad, heads);
        let (d_query, d_key, d_value) = gradients_of::<B>(p, query, key, value, grad);
        B::float_cat([d_query, d_key, d_value].map(join_heads::<B>).into(), 2)
    }

    /// Queries, keys and values, `[batch, heads, seq, d]` each.
    pub(in crate::ops) fn split_heads<B: Backend>(
        qkv: FloatTensor<B>,
        heads: usize,
    ) -> [FloatTensor<B>; 3] {
        let width = qkv.shape()[2] / 3;
        [0, 1, 2].map(|index| {
            by_head::<B>(part::<B>(qkv.clone(), 2, index * width..(index + 1) * width), heads)
        })
    }

    /// `[batch, seq, width]` → `[batch, heads, seq, d]`.
    pub(in crate::ops) fn by_head<B: Backend>(x: FloatTensor<B>, heads: usize) -> FloatTensor<B> {
        let [batch, seq, width] = x.shape().dims();
        let split = B::float_reshape(x, Shape::from([batch, seq, heads, width / heads]));
        B::float_swap_dims(split, 1, 2)
    }

    /// `[batch, heads, seq, d]` → `[batch, seq, width]`.
    pub(in crate::ops) fn join_heads<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
        let [batch, heads, seq, d] = x.shape().dims();
        B::float_reshape(B::float_swap_dims(x, 1, 2), Shape::from([batch, seq, heads * d]))
    }

    fn as_row<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
        let width = x.shape()[0];
        B::float_reshape(x, Shape::from([1, width]))
    }

    /// The sum over all rows, `[rows, d]` → `[d]`.
    fn over_rows<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
        let width = x.shape()[1];
        B::float_reshape(B::float_sum_dim(x, 0), Shape::from([width]))
    }

    /// See [`layer_norm`](super::layer_norm).
    pub fn layer_norm<B: Backend>(
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        bias: FloatTensor<B>,
        epsilon: f64,
    ) -> FloatTensor<B> {
        let dtype = x.dtype();
        let scaled = B::float_mul(standardised::<B>(x, epsilon).0, as_row::<B>(weight));
        B::float_cast(B::float_add(scaled, as_row::<B>(bias)), dtype.into())
    }

    /// With `n` the standardised row, `r` its inverse deviation and `g = grad ⊙ weight`:
    /// `d x = r (g − mean(g) − n mean(g ⊙ n))`, `d weight = Σ grad ⊙ n`, `d bias = Σ grad`.
    pub fn layer_norm_backward<B: Backend>(
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        grad: FloatTensor<B>,
        epsilon: f64,
    ) -> [FloatTensor<B>; 3] {
        let dtype = x.dtype();
        let (normed, inverse) = standardised::<B>(x, epsilon);
        let grad = B::float_cast(grad, FloatDType::F32);
        let d_weight = over_rows::<B>(B::float_mul(grad.clone(), normed.clone()));
        let d_bias = over_rows::<B>(grad.clone());
        let scaled = B::float_mul(grad, as_row::<B>(weight));
        let along = B::float_mean_dim(B::float_mul(scaled.clone(), normed.clone()), 1);
        let rest = B::float_sub(scaled.clone(), B::float_mean_dim(scaled, 1));
        let d_x = B::float_mul(B::float_sub(rest, B::float_mul(normed, along)), inverse);
        [B::float_cast(d_x, dtype.into()), d_weight, d_bias]
    }

    /// The rows with mean 0 and variance 1 in f32, and the inverse of each one's deviation.
    fn standardised<B: Backend>(
        x: FloatTensor<B>,
        epsilon: f64,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let x = B::float_cast(x, FloatDType::F32);
        let centred = B::float_sub(x.clone(), B::float_mean_dim(x, 1));
        let variance = B::float_mean_dim(B::float_mul(centred.clone(), centred.clone()), 1);
        let inverse = B::float_recip(B::float_sqrt(B::float_add_scalar(variance, epsilon.into())));
        (B::float_mul(centred, inverse.clone()), inverse)
    }

    /// See [`gelu`](super::gelu); in f32 whatever the type.
    pub fn gelu<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
        let dtype = x.dtype();
        let x = B::float_cast(x, FloatDType::F32);
        B::float_cast(B::float_mul(x.clone(), distribution::<B>(x)), dtype.into())
    }

    /// `grad ⊙ (Φ(x) + x φ(x))`, φ being the normal density.
    pub fn gelu_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
        let dtype = x.dtype();
        let x = B::float_cast(x, FloatDType::F32);
        let square = B::float_mul(x.clone(), x.clone());
        let density = B::float_exp(B::float_mul_scalar(square, (-0.5).into()));
        let density = B::float_mul_scalar(density, (1.0 / (2.0 * PI).sqrt()).into());
        let slope = B::float_add(distribution::<B>(x.clone()), B::float_mul(x, density));
        let grad = B::float_cast(grad, FloatDType::F32);
        B::float_cast(B::float_mul(grad, slope), dtype.into())
    }

    /// Φ(x).
    fn distribution<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
        let erf = B::float_erf(B::float_mul_scalar(x, FRAC_1_SQRT_2.into()));
        B::float_mul_scalar(B::float_add_scalar(erf, 1.0.into()), 0.5.into())
    }

    /// See [`add_bias`](super::add_bias).
    pub fn add_bias<B: Backend>(x: FloatTensor<B>, bias: FloatTensor<B>) -> FloatTensor<B> {
        B::float_add(x, as_row::<B>(bias))
    }

    /// The gradient for the bias: the sum over all rows.
    pub fn sum_rows<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
        let dtype = grad.dtype();
        let sum = over_rows::<B>(B::float_cast(grad, FloatDType::F32));
        B::float_cast(sum, dtype.into())
    }

    /// See [`add_scaled`](super::add_scaled).
    pub fn add_scaled<B: Backend>(
        x: FloatTensor<B>,
        branch: FloatTensor<B>,
        scale: FloatTensor<B>,
    ) -> FloatTensor<B> {
        B::float_add(x, B::float_mul(branch, as_row::<B>(scale)))
    }

    /// Gradients for the branch and its scale: `grad ⊙ scale` and `Σ grad ⊙ branch`.
    pub fn add_scaled_backward<B: Backend>(
        branch: FloatTensor<B>,
        scale: FloatTensor<B>,
        grad: FloatTensor<B>,
    ) -> [FloatTensor<B>; 2] {
        let d_branch = B::float_mul(grad.clone(), as_row::<B>(scale));
        [d_branch, sum_rows::<B>(B::float_mul(grad, branch))]
    }
}

step!(FullAttention, 1, kept 1, usize, |[qkv], heads, grad| {
    [B::full_attention_backward(qkv, grad, heads)]
});

step!(LayerNorm, 3, kept 2, f64, |[x, weight], epsilon, grad| {
    B::layer_norm_rows_backward(x, weight, grad, epsilon).into()
});

step!(Gelu, 1, kept 1, (), |[x], (), grad| { [B::gelu_rows_backward(x, grad)] });

step!(AddBias, 2, kept 0, (), |[], (), grad| {
    [grad.clone(), B::sum_rows(grad)]
});

step!(AddScaled, 3, kept 2, (), |[branch, scale], (), grad| {
    let (d_branch, d_scale) = B::add_scaled_backward(branch, scale, grad.clone());
    [grad, d_branch, d_scale]
});
