//! The shifted sum of the localized filter.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use super::YuanOps;

/// `y_t = current_t + previous_{t−1}` of `[previous | current]` side by side, `previous_{−1} = 0`.
///
/// `[batch, seq, 2 · d]` → `[batch, seq, d]`.
pub fn add_previous(taps: Tensor<3>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::add_previous(taps.into_dispatch()))
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
    use burn::tensor::Shape;

    use crate::ops::parts::{part, zeros_like};

    /// See [`add_previous`](super::add_previous).
    pub fn add_previous<B: Backend>(taps: FloatTensor<B>) -> FloatTensor<B> {
        let [batch, seq, width] = taps.shape().dims();
        let (previous, current) =
            (part::<B>(taps.clone(), 2, 0..width / 2), part::<B>(taps, 2, width / 2..width));
        if seq == 1 {
            return current; // CubeCL cannot join with an empty part
        }
        let nothing = zeros_like::<B>(&current, Shape::from([batch, 1, width / 2]));
        let shifted = B::float_cat(vec![nothing, part::<B>(previous, 1, 0..seq - 1)], 1);
        B::float_add(current, shifted)
    }

    /// The current token's tap gets the gradient as it is, the previous one's that of the next
    /// token.
    pub fn add_previous_backward<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
        let [batch, seq, width] = grad.shape().dims();
        let nothing = zeros_like::<B>(&grad, Shape::from([batch, 1, width]));
        if seq == 1 {
            return B::float_cat(vec![nothing, grad], 2);
        }
        let shifted = B::float_cat(vec![part::<B>(grad.clone(), 1, 1..seq), nothing], 1);
        B::float_cat(vec![shifted, grad], 2)
    }
}

step!(AddPrevious, 1, kept 0, (), |[], (), grad| [B::add_previous_backward(grad)]);
