//! The image tower's norm, its gelu, its biases and its scaled branches.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{
    elementwise,
    kernels::{Arg, Kernel, KernelFile},
    queue::{run, run_all},
    rows::{self, NORM_BLOCKS},
    tensors::{VECTOR, contiguous, dims, empty, is_bf16},
};

fn kernel(name: &'static str, like: &CubeTensor) -> Kernel {
    Kernel::new(KernelFile::Tower, name, is_bf16(like))
}

pub(super) fn layer_norm(
    x: CubeTensor,
    weight: CubeTensor,
    bias: CubeTensor,
    epsilon: f64,
) -> CubeTensor {
    let [x, weight, bias] = [x, weight, bias].map(contiguous);
    let [count, elements] = dims(&x);
    let (out, width) = (empty(&x, [count, elements], x.dtype), elements / VECTOR);
    let kernel = kernel("layer_norm", &x);
    run([&x, &weight, &bias, &out], move |lanes, pointers| {
        let [x, weight, bias, out] = pointers.map(Arg::Pointer);
        let args = [x, weight, bias, out, Arg::Int(width), Arg::Float(epsilon)];
        lanes.launch(kernel, [count, 1], rows::threads(width), 0, &args)
    });
    out
}

/// Gradients for the input, and for weight and bias side by side in f32, `[2 · width]`.
pub(super) fn layer_norm_backward(
    x: CubeTensor,
    weight: CubeTensor,
    grad: CubeTensor,
    epsilon: f64,
) -> (CubeTensor, CubeTensor) {
    let [x, weight, grad] = [x, weight, grad].map(contiguous);
    let [count, elements] = dims(&x);
    let (width, blocks) = (elements / VECTOR, count.clamp(1, NORM_BLOCKS));
    let d_x = empty(&x, [count, elements], x.dtype);
    let partial = empty(&x, [blocks, 2 * elements], DType::F32);
    let sums = empty(&x, [2 * elements], DType::F32);
    let kernel = kernel("layer_norm_backward", &x);
    run(
        [&x, &weight, &grad, &d_x, &partial, &sums],
        move |lanes, [x, weight, grad, d_x, partial, sums]| {
            let places = [x, weight, grad, d_x, partial].map(Arg::Pointer);
            let sizes = [Arg::Int(count), Arg::Int(width), Arg::Float(epsilon)];
            let args = [&places[..], &sizes].concat();
            lanes.launch(kernel, [blocks, 1], width.next_multiple_of(32), 0, &args)?;
            rows::column_sums(lanes, partial, sums, [blocks, 2 * elements])
        },
    );
    (d_x, sums)
}

/// One value for every value of the first tensor, by the kernel of that name.
fn by_element<const N: usize>(name: &'static str, tensors: [CubeTensor; N]) -> CubeTensor {
    let tensors = tensors.map(contiguous);
    let [count, elements] = dims(&tensors[0]);
    let out = empty(&tensors[0], [count, elements], tensors[0].dtype);
    let (vectors, kernel) = (count * elements / VECTOR, kernel(name, &out));
    let all: Vec<&CubeTensor> = tensors.iter().chain([&out]).collect();
    run_all(&all, move |lanes, pointers| {
        let mut args: Vec<Arg> = pointers.iter().copied().map(Arg::Pointer).collect();
        args.extend([Arg::Long(vectors), Arg::Int(elements / VECTOR)]);
        let grid = [elementwise::blocks(vectors), 1];
        lanes.launch(kernel, grid, elementwise::THREADS, 0, &args)
    });
    out
}

pub(super) fn gelu(x: CubeTensor) -> CubeTensor {
    by_element("gelu", [x])
}

pub(super) fn gelu_backward(x: CubeTensor, grad: CubeTensor) -> CubeTensor {
    by_element("gelu_backward", [x, grad])
}

pub(super) fn add_bias(x: CubeTensor, bias: CubeTensor) -> CubeTensor {
    by_element("add_bias", [x, bias])
}

pub(super) fn add_scaled(x: CubeTensor, branch: CubeTensor, scale: CubeTensor) -> CubeTensor {
    by_element("add_scaled", [x, branch, scale])
}

/// The sum over all rows in f32: `[rows, d]` → `[d]`.
pub(super) fn sum_rows(grad: CubeTensor) -> CubeTensor {
    let grad = contiguous(grad);
    let [count, elements] = dims(&grad);
    let (partial, sums) = partial_sums(&grad);
    let kernel = kernel("sum_rows", &grad);
    run([&grad, &partial, &sums], move |lanes, [grad, partial, sums]| {
        let places = [grad, 0, 0, 0, partial].map(Arg::Pointer);
        let blocks = count.clamp(1, NORM_BLOCKS);
        let args = [&places[..], &[Arg::Int(count), Arg::Int(elements / VECTOR)]].concat();
        lanes.launch(kernel, [blocks, 1], rows::threads(elements / VECTOR), 0, &args)?;
        rows::column_sums(lanes, partial, sums, [blocks, elements])
    });
    sums
}

/// Gradients for the branch, and for its scale in f32.
pub(super) fn add_scaled_backward(
    branch: CubeTensor,
    scale: CubeTensor,
    grad: CubeTensor,
) -> (CubeTensor, CubeTensor) {
    let [branch, scale, grad] = [branch, scale, grad].map(contiguous);
    let [count, elements] = dims(&grad);
    let d_branch = empty(&grad, [count, elements], grad.dtype);
    let (partial, sums) = partial_sums(&grad);
    let kernel = kernel("sum_rows", &grad);
    run(
        [&grad, &branch, &scale, &d_branch, &partial, &sums],
        move |lanes, [grad, branch, scale, d_branch, partial, sums]| {
            let places = [grad, branch, scale, d_branch, partial].map(Arg::Pointer);
            let blocks = count.clamp(1, NORM_BLOCKS);
            let args = [&places[..], &[Arg::Int(count), Arg::Int(elements / VECTOR)]].concat();
            lanes.launch(kernel, [blocks, 1], rows::threads(elements / VECTOR), 0, &args)?;
            rows::column_sums(lanes, partial, sums, [blocks, elements])
        },
    );
    (d_branch, sums)
}

/// Room for what each block sums up, and for the sum of those.
fn partial_sums(grad: &CubeTensor) -> (CubeTensor, CubeTensor) {
    let [count, elements] = dims(grad);
    let blocks = count.clamp(1, NORM_BLOCKS);
    (empty(grad, [blocks, elements], DType::F32), empty(grad, [elements], DType::F32))
}
