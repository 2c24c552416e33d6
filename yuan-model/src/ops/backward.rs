//! A backward pass in pieces.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use super::YuanOps;

/// A number without a meaning, `[1]`, whose backward pass starts at `x` with `gradient`, of the same
/// shape: that of a loss for which `x` was used in a graph of its own, so that a model is
/// differentiated part by part.
///
/// The number's own gradient must be one: it is the objective, or added to it.
///
/// # Panics
///
/// If the shapes differ.
pub fn continue_backward<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    assert_eq!(x.shape(), gradient.shape(), "a gradient of the tensor's shape");
    let (x, gradient) = (x.into_dispatch(), gradient.into_dispatch());
    Tensor::from_dispatch(Dispatch::continue_backward(x, gradient))
}

pub mod portable {
    use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
    use burn::tensor::{FloatDType, Shape};

    /// See [`continue_backward`](super::continue_backward).
    pub fn continue_backward<B: Backend>(
        x: FloatTensor<B>,
        _gradient: FloatTensor<B>,
    ) -> FloatTensor<B> {
        B::float_zeros(Shape::from([1]), &x.device(), FloatDType::F32)
    }
}

step!(ContinueBackward, 1, kept 0, burn::backend::tensor::FloatTensor<B>, |[], gradient, _one| {
    [gradient]
});
