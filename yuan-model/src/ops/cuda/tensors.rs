//! Tensors as the kernels want them.

use burn::tensor::{DType, Shape};
use burn_cubecl::{
    CubeDevice, kernel::into_contiguous, ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};

use super::{
    blas::Matrix,
    kernels::Arg,
    queue::{capability, libraries_are_there},
};

/// Elements of one vector access.
pub(super) const VECTOR: usize = 8;

/// On CUDA, with the libraries that the work there needs.
pub(super) fn is_cuda(tensor: &CubeTensor) -> bool {
    matches!(tensor.device, CubeDevice::Cuda(_))
        && tensor.qparams.is_none()
        && libraries_are_there()
}

/// [`is_cuda`], with fast paths on.
pub(super) fn is_ours(tensor: &CubeTensor) -> bool {
    crate::ops::fast_paths() && is_cuda(tensor)
}

/// [`is_ours`], with activations of a type that the kernels know on this card.
pub(super) fn is_fast(tensor: &CubeTensor) -> bool {
    is_ours(tensor)
        && match tensor.dtype {
            DType::F32 => true,
            DType::BF16 => capability(tensor) >= AMPERE,
            _ => false,
        }
}

/// The first cards that round to bf16.
const AMPERE: i32 = 80;

/// [`is_fast`], with rows of whole vectors.
pub(super) fn has_fast_rows(tensor: &CubeTensor) -> bool {
    is_fast(tensor) && tensor.meta.shape().last().is_some_and(|width| width.is_multiple_of(VECTOR))
}

pub(super) fn is_bf16(tensor: &CubeTensor) -> bool {
    tensor.dtype == DType::BF16
}

/// Uninitialised, without gaps between rows.
pub(super) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), dtype)
}

/// Uninitialised in the memory order of `axes`, slowest first: a view of a contiguous tensor with
/// permuted axes.
pub(super) fn empty_in_order<const D: usize>(
    like: &CubeTensor,
    shape: [usize; D],
    axes: [usize; D],
    dtype: DType,
) -> CubeTensor {
    let mut tensor = empty(like, Shape::from(axes.map(|axis| shape[axis])), dtype);
    let mut stride = 1;
    let mut strides = [0; D];
    for &axis in axes.iter().rev() {
        strides[axis] = stride;
        stride *= shape[axis];
    }
    tensor.meta.shape_mut().iter_mut().zip(shape).for_each(|(size, new)| *size = new);
    tensor.meta.strides_mut().iter_mut().zip(strides).for_each(|(stride, new)| *stride = new);
    tensor
}

/// Without gaps; a tensor that has some is copied.
pub(super) fn contiguous(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// Where documents start, or anything else and the word that there is nothing.
pub(super) struct FirstKeys {
    pub tensor: CubeTensor,
    pub given: bool,
}

impl FirstKeys {
    pub fn new(first_keys: Option<CubeTensor>, otherwise: &CubeTensor) -> Self {
        let given = first_keys.is_some();
        Self { tensor: first_keys.map_or_else(|| otherwise.clone(), contiguous), given }
    }

    /// The kernels' argument at an address: no pointer stands for no documents.
    pub fn argument(&self) -> impl Fn(u64) -> Arg + Send + Copy + 'static {
        let given = self.given;
        move |pointer| Arg::Pointer(if given { pointer } else { 0 })
    }
}

/// Sizes of a tensor of known rank.
pub(super) fn dims<const D: usize>(tensor: &CubeTensor) -> [usize; D] {
    tensor.meta.shape().dims()
}

pub(super) fn strides<const D: usize>(tensor: &CubeTensor) -> [usize; D] {
    std::array::from_fn(|axis| tensor.meta.strides()[axis])
}

/// Pitch of `[.., rows, columns]` as a matrix, and whether it is stored by columns; neither if it
/// is strided both ways.
fn order([rows, columns]: [usize; 2], [down, along]: [usize; 2]) -> Option<(usize, bool)> {
    if (along == 1 || columns == 1) && (down >= columns || rows == 1) {
        Some((down.max(columns), false))
    } else if (down == 1 || rows == 1) && (along >= rows || columns == 1) {
        Some((along.max(rows), true))
    } else {
        None
    }
}

/// Sizes and strides of the last two axes.
fn last_two(tensor: &CubeTensor) -> [[usize; 2]; 2] {
    let rank = tensor.meta.shape().len();
    let last = |values: &[usize]| [values[rank - 2], values[rank - 1]];
    [last(tensor.meta.shape()), last(tensor.meta.strides())]
}

/// A tensor whose last two axes a product can read in place, copied if it was not one.
pub(super) fn readable(tensor: CubeTensor) -> CubeTensor {
    let [sizes, strides] = last_two(&tensor);
    match order(sizes, strides) {
        Some(_) => tensor,
        None => contiguous(tensor),
    }
}

/// The last two axes of a [`readable`] tensor as a matrix, whose [address](Matrix::at) is known on
/// the device's thread.
pub(super) fn matrix(tensor: &CubeTensor) -> Matrix {
    let [[rows, columns], strides] = last_two(tensor);
    let (pitch, transposed) =
        order([rows, columns], strides).expect("the tensor was made readable");
    Matrix { pointer: 0, rows, columns, pitch, transposed, bf16: is_bf16(tensor) }
}
