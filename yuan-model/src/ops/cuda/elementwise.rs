//! SwiGLU, the filter's sum and rotary positions: one pass over memory each.

use burn_cubecl::tensor::CubeTensor;

use super::{
    kernels::{Arg, Kernel, KernelFile},
    queue::run,
    tensors::{VECTOR, contiguous, dims, empty, empty_in_order, is_bf16, strides},
};

pub(super) const THREADS: usize = 256;

/// Blocks for so many items, each thread taking several.
pub(super) fn blocks(items: usize) -> usize {
    items.div_ceil(THREADS).min(132 * 16)
}

fn kernel(name: &'static str, like: &CubeTensor) -> Kernel {
    Kernel::new(KernelFile::Elementwise, name, is_bf16(like))
}

pub(super) fn swiglu(gate_up: CubeTensor) -> CubeTensor {
    let gate_up = contiguous(gate_up);
    let [rows, both] = dims(&gate_up);
    let out = empty(&gate_up, [rows, both / 2], gate_up.dtype);
    let (width, kernel) = (both / 2 / VECTOR, kernel("swiglu", &gate_up));
    run([&gate_up, &out], move |lanes, pointers| {
        let [from, to] = pointers.map(Arg::Pointer);
        let count = rows * width;
        let args = [from, to, Arg::Long(count), Arg::Int(width)];
        lanes.launch(kernel, [blocks(count), 1], THREADS, 0, &args)
    });
    out
}

pub(super) fn swiglu_backward(gate_up: CubeTensor, grad: CubeTensor) -> CubeTensor {
    let (gate_up, grad) = (contiguous(gate_up), contiguous(grad));
    let [rows, both] = dims(&gate_up);
    let out = empty(&gate_up, [rows, both], gate_up.dtype);
    let (width, kernel) = (both / 2 / VECTOR, kernel("swiglu_backward", &gate_up));
    run([&gate_up, &grad, &out], move |lanes, pointers| {
        let [from, grad, to] = pointers.map(Arg::Pointer);
        let count = rows * width;
        let args = [from, grad, to, Arg::Long(count), Arg::Int(width)];
        lanes.launch(kernel, [blocks(count), 1], THREADS, 0, &args)
    });
    out
}

pub(super) fn add_previous(taps: CubeTensor) -> CubeTensor {
    let taps = contiguous(taps);
    let [batch, seq, both] = dims(&taps);
    let out = empty(&taps, [batch, seq, both / 2], taps.dtype);
    shift(kernel("add_previous", &taps), &taps, &out, [batch, seq, both / 2]);
    out
}

pub(super) fn add_previous_backward(grad: CubeTensor) -> CubeTensor {
    let grad = contiguous(grad);
    let [batch, seq, width] = dims(&grad);
    let out = empty(&grad, [batch, seq, 2 * width], grad.dtype);
    shift(kernel("add_previous_backward", &grad), &grad, &out, [batch, seq, width]);
    out
}

fn shift(kernel: Kernel, from: &CubeTensor, to: &CubeTensor, [batch, seq, width]: [usize; 3]) {
    let width = width / VECTOR;
    run([from, to], move |lanes, pointers| {
        let [from, to] = pointers.map(Arg::Pointer);
        let count = batch * seq * width;
        let args = [from, to, Arg::Long(count), Arg::Int(width), Arg::Int(seq)];
        lanes.launch(kernel, [blocks(count), 1], THREADS, 0, &args)
    });
}

/// Whether [`rotate`] can read `x` in place: heads of whole vectors, wherever they lie.
pub(super) fn can_rotate(x: &CubeTensor, cos: &CubeTensor) -> bool {
    let ([_, _, _, width], [_, _, _, pairs]) = (dims::<4>(x), dims::<4>(cos));
    let [batch, seq, head, along] = strides::<4>(x);
    let whole = |size: usize| size.is_multiple_of(VECTOR);
    along == 1 && whole(width) && whole(pairs) && whole(batch) && whole(seq) && whole(head)
}

/// The result lies in memory as `[batch, heads, seq, head_dim]`, which attention reads best.
pub(super) fn rotate(x: CubeTensor, cos: CubeTensor, sin: CubeTensor) -> CubeTensor {
    let (cos, sin) = (contiguous(cos), contiguous(sin));
    let out = empty_in_order(&x, dims(&x), [0, 2, 1, 3], x.dtype);
    rotate_into(&out, 0, &x, &cos, &sin);
    out
}

/// Both rotated, side by side in every head.
pub(super) fn rotate_pair(parts: [CubeTensor; 2], cos: CubeTensor, sin: CubeTensor) -> CubeTensor {
    let (cos, sin) = (contiguous(cos), contiguous(sin));
    let [batch, seq, heads, width] = dims(&parts[0]);
    let out = empty(&parts[0], [batch, seq, heads, 2 * width], parts[0].dtype);
    for (i, part) in parts.iter().enumerate() {
        rotate_into(&out, i * width, part, &cos, &sin);
    }
    out
}

/// Writes `x` rotated into `out`, from an element of every head on.
fn rotate_into(
    out: &CubeTensor,
    offset: usize,
    x: &CubeTensor,
    cos: &CubeTensor,
    sin: &CubeTensor,
) {
    let ([batch, seq, heads, width], [tables, _, _, pairs]) = (dims(x), dims(cos));
    let (from, to) = (strides::<4>(x), strides::<4>(out));
    let (width, pairs) = (width / VECTOR, pairs / VECTOR);
    let (kernel, bytes) = (kernel("rotate", x), offset * x.dtype.size());
    run([x, cos, sin, out], move |lanes, mut pointers| {
        pointers[3] += bytes as u64;
        let [x, cos, sin, out] = pointers.map(Arg::Pointer);
        let count = batch * seq * heads * (width - pairs);
        let table = if tables == 1 { 0 } else { seq * pairs };
        let sizes = [seq, heads, width, pairs].map(Arg::Int);
        let far = [from[0], from[1], from[2], to[0], to[1], to[2], table].map(Arg::Long);
        let args = [&[x, cos, sin, out, Arg::Long(count)][..], &sizes, &far].concat();
        lanes.launch(kernel, [blocks(count), 1], THREADS, 0, &args)
    });
}
