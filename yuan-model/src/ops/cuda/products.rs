//! Products by cuBLAS: bf16 or f32 operands, f32 arithmetic.
//!
//! Gradients of weights come out in f32 whatever the operands are: they are sums over all tokens,
//! and the optimizer wants them so.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{
    blas::Matrix,
    context::{LANES, Lanes},
    queue::run,
    tensors::{dims, empty, matrix, readable, strides},
};

/// `rows · weight`, in their type.
pub(super) fn product(rows: CubeTensor, weight: CubeTensor) -> CubeTensor {
    let (rows, weight) = (readable(rows), readable(weight));
    let ([count, _], [_, columns]) = (dims(&rows), dims(&weight));
    let out = empty(&rows, [count, columns], rows.dtype);
    if count > 0 {
        let parts = [matrix(&rows), matrix(&weight), matrix(&out)];
        run([&rows, &weight, &out], move |lanes, pointers| {
            lanes.product(0, at(parts, pointers), 1.0, 0.0, None)
        });
    }
    out
}

/// `rowsᵀ · grad` in f32.
pub(super) fn weight_gradient(rows: CubeTensor, grad: CubeTensor) -> CubeTensor {
    let (rows, grad) = (readable(rows), readable(grad));
    let ([count, d_in], [_, d_out]) = (dims(&rows), dims(&grad));
    let out = empty(&rows, [d_in, d_out], DType::F32);
    let parts = [matrix(&rows).t(), matrix(&grad), matrix(&out)];
    run([&rows, &grad, &out], move |lanes, pointers| {
        if count == 0 {
            return lanes.zero(pointers[2], 4 * d_in * d_out);
        }
        lanes.product(0, at(parts, pointers), 1.0, 0.0, None)
    });
    out
}

/// See [`ops::grouped_matmul`](crate::ops::grouped_matmul).
pub(super) fn grouped(
    rows: CubeTensor,
    weight: CubeTensor,
    rows_per_group: Vec<usize>,
) -> CubeTensor {
    let (rows, weight) = (readable(rows), readable(weight));
    let ([num_rows, _], [_, _, d_out]) = (dims(&rows), dims(&weight));
    let [apart, ..] = strides::<3>(&weight);
    let out = empty(&rows, [num_rows, d_out], rows.dtype);
    let size = rows.dtype.size();
    let parts = [matrix(&rows), matrix(&weight), matrix(&out)];
    run([&rows, &weight, &out], move |lanes, pointers| {
        let [all, first, out] = at(parts, pointers);
        on_lanes(lanes, &rows_per_group, |lanes, lane, group, start, end| {
            let weight = Matrix { pointer: first.pointer + (group * apart * size) as u64, ..first };
            let parts = [all.slice_rows(start, end), weight, out.slice_rows(start, end)];
            lanes.product(lane, parts, 1.0, 0.0, None)
        })
    });
    out
}

/// `rowsᵀ · grad` of every group in f32, stacked; zero where a group has no rows.
pub(super) fn grouped_weight_gradient(
    rows: CubeTensor,
    grad: CubeTensor,
    rows_per_group: Vec<usize>,
) -> CubeTensor {
    let (rows, grad) = (readable(rows), readable(grad));
    let ([_, d_in], [_, d_out]) = (dims(&rows), dims(&grad));
    let out = empty(&rows, [rows_per_group.len(), d_in, d_out], DType::F32);
    let parts = [matrix(&rows), matrix(&grad)];
    run([&rows, &grad, &out], move |lanes, [rows_at, grad_at, out_at]| {
        let [rows, grad] = at(parts, [rows_at, grad_at]);
        let bytes = 4 * d_in * d_out;
        let of_group = |group: usize| Matrix {
            pointer: out_at + (group * bytes) as u64,
            rows: d_in,
            columns: d_out,
            pitch: d_out,
            transposed: false,
            bf16: false,
        };
        for group in (0..rows_per_group.len()).filter(|&group| rows_per_group[group] == 0) {
            lanes.zero(of_group(group).pointer, bytes)?;
        }
        on_lanes(lanes, &rows_per_group, |lanes, lane, group, start, end| {
            let parts =
                [rows.slice_rows(start, end).t(), grad.slice_rows(start, end), of_group(group)];
            lanes.product(lane, parts, 1.0, 0.0, None)
        })
    });
    out
}

/// The matrices at their addresses.
fn at<const N: usize>(matrices: [Matrix; N], pointers: [u64; N]) -> [Matrix; N] {
    std::array::from_fn(|index| matrices[index].at(pointers[index]))
}

/// Hands every group that has rows to `work`, the groups in turn to the lanes: the last blocks of
/// one product run beside the first of the next.
fn on_lanes(
    lanes: &mut Lanes<'_>,
    rows_per_group: &[usize],
    mut work: impl FnMut(&mut Lanes<'_>, usize, usize, usize, usize) -> Result<(), String>,
) -> Result<(), String> {
    lanes.fork()?;
    let (mut start, mut lane) = (0, 0);
    for (group, &count) in rows_per_group.iter().enumerate().filter(|(_, count)| **count > 0) {
        work(lanes, lane, group, start, start + count)?;
        start += count;
        lane = (lane + 1) % LANES;
    }
    lanes.join()
}
