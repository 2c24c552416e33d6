//! Norms, dispatch, combination and cross-entropy: a block of threads for every row.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{
    context::Lanes,
    dispatch,
    kernels::{Arg, Kernel, KernelFile},
    queue::run,
    tensors::{VECTOR, contiguous, dims, empty, is_bf16, matrix, readable},
};

/// Threads for a row of so many items.
pub(super) fn threads(items: usize) -> usize {
    items.next_multiple_of(32).clamp(32, 256)
}

fn kernel(name: &'static str, like: &CubeTensor) -> Kernel {
    Kernel::new(KernelFile::Rows, name, is_bf16(like))
}

pub(super) fn rms_norm(x: CubeTensor, weight: CubeTensor, epsilon: f64) -> CubeTensor {
    let (x, weight) = (contiguous(x), contiguous(weight));
    let [rows, width] = dims(&x);
    let (out, width) = (empty(&x, [rows, width], x.dtype), width / VECTOR);
    let kernel = kernel("rms_norm", &x);
    run([&x, &weight, &out], move |lanes, [x, weight, out]| {
        let args = [
            Arg::Pointer(x),
            Arg::Pointer(weight),
            Arg::Pointer(out),
            Arg::Int(width),
            Arg::Float(epsilon),
        ];
        lanes.launch(kernel, [rows, 1], threads(width), 0, &args)
    });
    out
}

/// Blocks whose partial sums of a norm's weight gradient are added up afterwards.
pub(super) const NORM_BLOCKS: usize = 132 * 8;
/// The widest row whose gradient a block takes, one vector a thread.
pub(super) const WIDEST_NORM: usize = 1024 * VECTOR;

pub(super) fn rms_norm_backward(
    x: CubeTensor,
    weight: CubeTensor,
    grad: CubeTensor,
    epsilon: f64,
) -> (CubeTensor, CubeTensor) {
    let (x, weight, grad) = (contiguous(x), contiguous(weight), contiguous(grad));
    let [rows, elements] = dims(&x);
    let (width, blocks) = (elements / VECTOR, rows.clamp(1, NORM_BLOCKS));
    let d_x = empty(&x, [rows, elements], x.dtype);
    let partial = empty(&x, [blocks, elements], DType::F32);
    let d_weight = empty(&x, [elements], DType::F32);
    let kernel = kernel("rms_norm_backward", &x);
    run(
        [&x, &weight, &grad, &d_x, &partial, &d_weight],
        move |lanes, [x, weight, grad, d_x, partial, d_weight]| {
            let places = [x, weight, grad, d_x, partial].map(Arg::Pointer);
            let sizes = [Arg::Int(rows), Arg::Int(width), Arg::Float(epsilon)];
            let args = [&places[..], &sizes].concat();
            lanes.launch(kernel, [blocks, 1], width.next_multiple_of(32), 0, &args)?;
            column_sums(lanes, partial, d_weight, [blocks, elements])
        },
    );
    (d_x, d_weight)
}

/// Adds up the rows at one address, f32 like their sum at the other.
pub(super) fn column_sums(
    lanes: &mut Lanes<'_>,
    from: u64,
    to: u64,
    [rows, width]: [usize; 2],
) -> Result<(), String> {
    let kernel = Kernel::new(KernelFile::Rows, "column_sums", false);
    let args = [Arg::Pointer(from), Arg::Pointer(to), Arg::Int(rows), Arg::Int(width)];
    lanes.launch(kernel, [width.div_ceil(32), 1], 256, 0, &args)
}

pub(super) fn gather(source: CubeTensor, rows: CubeTensor) -> CubeTensor {
    let dtype = source.dtype;
    pick("gather_rows", source, rows, dtype)
}

pub(super) fn embed(weight: CubeTensor, ids: CubeTensor, dtype: DType) -> CubeTensor {
    pick("embed", weight, ids, dtype)
}

/// The rows that `rows` names, in another type where the kernel rounds.
fn pick(name: &'static str, source: CubeTensor, rows: CubeTensor, dtype: DType) -> CubeTensor {
    let (source, rows) = (contiguous(source), contiguous(rows));
    let ([_, elements], [count]) = (dims(&source), dims(&rows));
    let (out, width) = (empty(&source, [count, elements], dtype), elements / VECTOR);
    let kernel = kernel(name, &out);
    run([&source, &rows, &out], move |lanes, pointers| {
        let [source, rows, out] = pointers.map(Arg::Pointer);
        lanes.launch(kernel, [count, 1], threads(width), 0, &[source, rows, out, Arg::Int(width)])
    });
    out
}

pub(super) fn embed_backward(grad: CubeTensor, ids: CubeTensor, vocab: usize) -> CubeTensor {
    let (grad, ids) = (contiguous(grad), contiguous(ids));
    let [rows, elements] = dims(&grad);
    let order = dispatch::sorted(&ids, vocab);
    let (out, width) = (empty(&grad, [vocab, elements], DType::F32), elements / VECTOR);
    let kernel = kernel("embed_backward", &grad);
    run([&grad, &ids, &order, &out], move |lanes, pointers| {
        lanes.zero(pointers[3], 4 * vocab * elements)?;
        let [grad, ids, order, out] = pointers.map(Arg::Pointer);
        let args = [grad, ids, order, out, Arg::Int(rows), Arg::Int(width)];
        lanes.launch(kernel, [rows, 1], threads(width), 0, &args)
    });
    out
}

pub(super) fn gather_sum(grad: CubeTensor, inverse: CubeTensor, copies: usize) -> CubeTensor {
    let (grad, inverse) = (contiguous(grad), contiguous(inverse));
    let [count, elements] = dims(&grad);
    let (rows, width) = (count / copies, elements / VECTOR);
    let out = empty(&grad, [rows, elements], grad.dtype);
    let kernel = kernel("gather_sum", &grad);
    run([&grad, &inverse, &out], move |lanes, pointers| {
        let [grad, inverse, out] = pointers.map(Arg::Pointer);
        let args = [grad, inverse, out, Arg::Int(width), Arg::Int(copies)];
        lanes.launch(kernel, [rows, 1], threads(width), 0, &args)
    });
    out
}

pub(super) fn combine(
    rows: CubeTensor,
    weights: CubeTensor,
    row_of_pair: CubeTensor,
) -> CubeTensor {
    let (rows, weights, row_of_pair) =
        (contiguous(rows), contiguous(weights), contiguous(row_of_pair));
    let ([_, elements], [tokens, top_k]) = (dims(&rows), dims(&weights));
    let (out, width) = (empty(&rows, [tokens, elements], rows.dtype), elements / VECTOR);
    let kernel = kernel("combine_rows", &rows);
    run([&rows, &weights, &row_of_pair, &out], move |lanes, pointers| {
        let [rows, weights, row_of_pair, out] = pointers.map(Arg::Pointer);
        let args = [rows, weights, row_of_pair, out, Arg::Int(width), Arg::Int(top_k)];
        lanes.launch(kernel, [tokens, 1], threads(width), 0, &args)
    });
    out
}

pub(super) fn combine_backward(
    rows: CubeTensor,
    weights: CubeTensor,
    row_of_pair: CubeTensor,
    grad: CubeTensor,
) -> (CubeTensor, CubeTensor) {
    let [rows, weights, row_of_pair, grad] = [rows, weights, row_of_pair, grad].map(contiguous);
    let ([pairs, elements], [tokens, top_k]) = (dims(&rows), dims(&weights));
    let width = elements / VECTOR;
    let d_rows = empty(&rows, [pairs, elements], rows.dtype);
    let d_weights = empty(&rows, [tokens, top_k], rows.dtype);
    let kernel = kernel("combine_rows_backward", &rows);
    run([&rows, &weights, &row_of_pair, &grad, &d_rows, &d_weights], move |lanes, pointers| {
        let [rows, weights, row_of_pair, grad, d_rows, d_weights] = pointers.map(Arg::Pointer);
        let args =
            [rows, weights, row_of_pair, grad, d_rows, d_weights, Arg::Int(width), Arg::Int(top_k)];
        lanes.launch(kernel, [tokens, 1], threads(width), 0, &args)
    });
    (d_rows, d_weights)
}

/// Threads for a row of logits.
const LOGIT_THREADS: usize = 512;

pub(super) fn cross_entropy(logits: CubeTensor, labels: CubeTensor) -> CubeTensor {
    let (logits, labels) = (contiguous(logits), contiguous(labels));
    let [rows, classes] = dims(&logits);
    let out = empty(&logits, [rows], DType::F32);
    run([&logits, &labels, &out], move |lanes, pointers| {
        let [logits, labels, out] = pointers.map(Arg::Pointer);
        let kernel = Kernel::new(KernelFile::Rows, "cross_entropy", false);
        lanes.launch(kernel, [rows, 1], LOGIT_THREADS, 0, &[logits, labels, out, Arg::Int(classes)])
    });
    out
}

pub(super) fn cross_entropy_backward(
    logits: CubeTensor,
    labels: CubeTensor,
    grad: CubeTensor,
) -> CubeTensor {
    let [logits, labels, grad] = [logits, labels, grad].map(contiguous);
    let [rows, classes] = dims(&logits);
    let out = empty(&logits, [rows, classes], DType::F32);
    let kernel = kernel("cross_entropy_backward", &out);
    run([&logits, &labels, &grad, &out], move |lanes, pointers| {
        let [logits, labels, grad, out] = pointers.map(Arg::Pointer);
        let args = [logits, labels, grad, out, Arg::Int(classes), Arg::Float(1.0)];
        lanes.launch(kernel, [rows, 1], LOGIT_THREADS, 0, &args)
    });
    out
}

/// See [`ops::linear_cross_entropy`](crate::ops::linear_cross_entropy): the logits of some rows at
/// a time, in f32.
pub(super) fn linear_cross_entropy(
    rows: CubeTensor,
    weight: CubeTensor,
    labels: CubeTensor,
    scale: f64,
    at_once: usize,
) -> CubeTensor {
    let (rows, weight, labels) = (readable(rows), readable(weight), contiguous(labels));
    let ([num_rows, _], [_, classes]) = (dims(&rows), dims(&weight));
    let losses = empty(&rows, [num_rows], DType::F32);
    let logits = empty(&rows, [at_once.clamp(1, num_rows.max(1)), classes], DType::F32);
    let parts = [&rows, &weight, &logits].map(matrix);
    run(
        [&rows, &weight, &labels, &losses, &logits],
        move |lanes, [rows_at, weight_at, labels, losses, logits_at]| {
            let [rows, weight, logits] = parts;
            let (rows, weight, logits) =
                (rows.at(rows_at), weight.at(weight_at), logits.at(logits_at));
            for start in (0..num_rows).step_by(logits.rows) {
                let end = (start + logits.rows).min(num_rows);
                let piece = logits.slice_rows(0, end - start);
                lanes.product(
                    0,
                    [rows.slice_rows(start, end), weight, piece],
                    scale as f32,
                    0.0,
                    None,
                )?;
                let kernel = Kernel::new(KernelFile::Rows, "cross_entropy", false);
                let [labels, losses] =
                    [labels, losses].map(|at| Arg::Pointer(at + 4 * start as u64));
                let args = [Arg::Pointer(logits_at), labels, losses, Arg::Int(classes)];
                lanes.launch(kernel, [end - start, 1], LOGIT_THREADS, 0, &args)?;
            }
            Ok(())
        },
    );
    losses
}

pub(super) fn linear_cross_entropy_backward(
    rows: CubeTensor,
    weight: CubeTensor,
    labels: CubeTensor,
    scale: f64,
    at_once: usize,
    grad: CubeTensor,
) -> (CubeTensor, CubeTensor) {
    let (rows, weight) = (readable(rows), readable(weight));
    let (labels, grad) = (contiguous(labels), contiguous(grad));
    let ([num_rows, width], [_, classes]) = (dims(&rows), dims(&weight));
    let at_once = at_once.clamp(1, num_rows.max(1));
    let logits = empty(&rows, [at_once, classes], DType::F32);
    let d_logits = empty(&rows, [at_once, classes], rows.dtype);
    let d_rows = empty(&rows, [num_rows, width], rows.dtype);
    let d_weight = empty(&rows, [width, classes], DType::F32);
    let kernel = kernel("cross_entropy_backward", &rows);
    let tensors = [&rows, &weight, &labels, &grad, &logits, &d_logits, &d_rows, &d_weight];
    let parts = [&rows, &weight, &logits, &d_logits, &d_rows, &d_weight].map(matrix);
    run(
        tensors,
        move |lanes,
              [
            rows_at,
            weight_at,
            labels,
            grad,
            logits_at,
            d_logits_at,
            d_rows_at,
            d_weight_at,
        ]| {
            let [rows, weight, logits, d_logits, d_rows, d_weight] = parts;
            let (rows, weight) = (rows.at(rows_at), weight.at(weight_at));
            let (logits, d_logits) = (logits.at(logits_at), d_logits.at(d_logits_at));
            let (d_rows, d_weight) = (d_rows.at(d_rows_at), d_weight.at(d_weight_at));
            if num_rows == 0 {
                return lanes.zero(d_weight_at, 4 * width * classes);
            }
            for start in (0..num_rows).step_by(at_once) {
                let end = (start + at_once).min(num_rows);
                let (part, count) = (rows.slice_rows(start, end), end - start);
                lanes.product(
                    0,
                    [part, weight, logits.slice_rows(0, count)],
                    scale as f32,
                    0.0,
                    None,
                )?;
                let [labels, grad] = [labels, grad].map(|at| Arg::Pointer(at + 4 * start as u64));
                let (from, to) = (Arg::Pointer(logits_at), Arg::Pointer(d_logits_at));
                let args = [from, labels, grad, to, Arg::Int(classes), Arg::Float(scale)];
                lanes.launch(kernel, [count, 1], LOGIT_THREADS, 0, &args)?;
                let d_logits = d_logits.slice_rows(0, count);
                let beta = if start == 0 { 0.0 } else { 1.0 };
                lanes.product(0, [part.t(), d_logits, d_weight], 1.0, beta, None)?;
                lanes.product(
                    0,
                    [d_logits, weight.t(), d_rows.slice_rows(start, end)],
                    1.0,
                    0.0,
                    None,
                )?;
            }
            Ok(())
        },
    );
    (d_rows, d_weight)
}
