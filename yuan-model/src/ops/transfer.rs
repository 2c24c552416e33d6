//! Tensors on another device, with a gradient that travels back.

use burn::backend::{Dispatch, tensor::IntTensor};
use burn::tensor::{Device, Int, Tensor};

use super::YuanOps;

/// A tensor on another device, with a gradient that travels back; on its own device, itself.
pub fn transfer<const D: usize>(x: Tensor<D>, device: &Device) -> Tensor<D> {
    if x.device() == *device {
        return x;
    }
    let to = Tensor::<1, Int>::empty([1], device);
    Tensor::from_dispatch(Dispatch::transfer(x.into_dispatch(), to.into_dispatch()))
}

/// [`transfer`] of integers.
pub fn transfer_int<const D: usize>(x: Tensor<D, Int>, device: &Device) -> Tensor<D, Int> {
    if x.device() == *device {
        return x;
    }
    let to = Tensor::<1, Int>::empty([1], device);
    Tensor::from_dispatch(Dispatch::transfer_int(x.into_dispatch(), to.into_dispatch()))
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    };

    /// See [`transfer`](super::transfer).
    pub fn transfer<B: Backend>(x: FloatTensor<B>, to: IntTensor<B>) -> FloatTensor<B> {
        B::float_to_device(x, &to.device())
    }

    /// See [`transfer_int`](super::transfer_int).
    pub fn transfer_int<B: Backend>(x: IntTensor<B>, to: IntTensor<B>) -> IntTensor<B> {
        B::int_to_device(x, &to.device())
    }
}

step!(Transfer, 1, kept 0, IntTensor<B>, |[], back, grad| [B::transfer(grad, back)]);
