//! Parts of tensors, for the portable forms of several families.

use std::ops::Range;

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{FloatDType, Shape, Slice};

/// A range along one axis.
pub fn part<B: Backend>(
    tensor: FloatTensor<B>,
    axis: usize,
    range: Range<usize>,
) -> FloatTensor<B> {
    let mut slices = vec![Slice::full(); tensor.shape().num_dims()];
    slices[axis] = Slice::from(range);
    B::float_slice(tensor, &slices)
}

pub fn zeros_like<B: Backend>(tensor: &FloatTensor<B>, shape: Shape) -> FloatTensor<B> {
    B::float_zeros(shape, &tensor.device(), FloatDType::from(tensor.dtype()))
}
