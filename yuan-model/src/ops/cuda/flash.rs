//! Attention in Hopper's own kernels: bf16, heads of 64 to 256, scores never in memory on
//! the way forward.
//!
//! Backwards, one kernel forms the gradients of keys and values and leaves what the queries'
//! gradient is a product of, a square per head, to cuBLAS: no atomics, so results repeat.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{
    attention::Mask,
    blas::{Matrix, ProductBatch},
    kernels::{Arg, Kernel, KernelFile},
    queue::{capability, run},
    tensors::{FirstKeys, contiguous, dims, empty, empty_in_order, strides},
};

const HOPPER: i32 = 90;
/// Queries of a forward block, keys of either kind of block, queries of a product for their
/// gradient.
const QUERIES: usize = 128;
const KEYS: usize = 64;
const PRODUCT_QUERIES: usize = 256;
const THREADS: usize = 256;
/// Bytes of the squares that exist at a time.
const SQUARE_BYTES: usize = 1200 << 20;
/// What aligning a tile may cost.
const SLACK: usize = 1024;

/// Whether the kernels are made for these heads.
pub(super) fn takes(query: &CubeTensor) -> bool {
    let [_, _, seq, head_dim] = dims(query);
    query.dtype == DType::BF16
        && seq > 0
        && head_dim.is_multiple_of(64)
        && head_dim <= 256
        && capability(query) == HOPPER
}

fn kernel(name: &'static str, head_dim: usize, mask: Mask) -> Kernel {
    let causal = mask == Mask::Causal;
    Kernel { head_dim, causal, ..Kernel::new(KernelFile::Flash, name, true) }
}

/// Rows that 16-byte accesses can read in place.
fn aligned(tensor: CubeTensor) -> CubeTensor {
    let [batch, head, row, along] = strides::<4>(&tensor);
    let whole = [batch, head, row].iter().all(|stride| stride.is_multiple_of(8));
    if along == 1 && whole { tensor } else { contiguous(tensor) }
}

/// Distances that the kernels ask for: batch, sequence, head.
fn far(tensor: &CubeTensor) -> [Arg; 3] {
    let [batch, head, row, _] = strides::<4>(tensor);
    [batch, row, head].map(Arg::Long)
}

fn scale(head_dim: usize) -> f64 {
    1.0 / (head_dim as f64).sqrt()
}

/// The output lies as `[batch, seq, heads, head_dim]`, ready for the projection that follows;
/// beside it the logarithms to base 2 of the sums, `[batch, heads, seq]`.
pub(super) fn forward(
    query: CubeTensor,
    key: CubeTensor,
    value: CubeTensor,
    first_keys: Option<CubeTensor>,
    mask: Mask,
) -> (CubeTensor, CubeTensor) {
    let [query, key, value] = [query, key, value].map(aligned);
    let [batch, heads, seq, head_dim] = dims(&query);
    let out = empty_in_order(&query, [batch, heads, seq, head_dim], [0, 2, 1, 3], query.dtype);
    let log_sums = empty(&query, [batch, heads, seq], DType::F32);
    let first_keys = FirstKeys::new(first_keys, &log_sums);
    let shared = 2 * head_dim * (QUERIES + 4 * KEYS) + SLACK;
    let tensors = [&query, &key, &value, &out, &log_sums, &first_keys.tensor];
    let (first_key, far) = (first_keys.argument(), [&query, &key, &value, &out].map(far).concat());
    run(tensors, move |lanes, [q, k, v, o, log_sums, first]| {
        let places = [q, k, v, o, log_sums].map(Arg::Pointer);
        let sizes = [first_key(first), Arg::Int(seq), Arg::Int(heads), Arg::Float(scale(head_dim))];
        let args = [&places[..], &sizes, &far].concat();
        let grid = [seq.div_ceil(QUERIES), batch * heads];
        lanes.launch(kernel("flash_forward", head_dim, mask), grid, THREADS, shared, &args)
    });
    (out, log_sums)
}

/// Gradients for queries, keys and values.
pub(super) fn backward(
    [query, key, value]: [CubeTensor; 3],
    first_keys: Option<CubeTensor>,
    [out, log_sums]: [CubeTensor; 2],
    grad: CubeTensor,
    mask: Mask,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [query, value, out, grad] = [query, value, out, grad].map(aligned);
    let [batch, heads, seq, head_dim] = dims(&query);
    let planes = batch * heads;
    // Products over many heads want one distance from head to head, across sequences too.
    let key = aligned(key);
    let [far_apart, apart, _, _] = strides::<4>(&key);
    let key =
        if batch == 1 || heads == 1 || far_apart == heads * apart { key } else { contiguous(key) };
    let [far_apart, apart, key_row, _] = strides::<4>(&key);
    let apart = if heads == 1 { far_apart } else { apart };
    let pitch = seq.next_multiple_of(KEYS);
    let at_once = (SQUARE_BYTES / (2 * seq * pitch)).clamp(1, planes.max(1));
    let shape = [batch, heads, seq, head_dim];
    let (d_query, d_key) = (empty(&query, shape, query.dtype), empty(&query, shape, query.dtype));
    let d_value = empty_in_order(&query, shape, [0, 2, 1, 3], query.dtype);
    let delta = empty(&query, [planes, seq], DType::F32);
    let squares = empty(&query, [at_once, seq, pitch], query.dtype);
    let first_keys = FirstKeys::new(first_keys, &delta);
    let shared = 2 * head_dim * 6 * KEYS + 2 * KEYS * 128 + 2 * 4 * KEYS + SLACK;
    let tensors = [
        &query,
        &key,
        &value,
        &grad,
        &out,
        &log_sums,
        &first_keys.tensor,
        &d_query,
        &d_key,
        &d_value,
        &delta,
        &squares,
    ];
    let (first_key, has_documents) = (first_keys.argument(), first_keys.given);
    let far_rows = [&grad, &out].map(far).concat();
    let far = [&query, &key, &value, &grad, &d_key, &d_value].map(far).concat();
    run(tensors, move |lanes, pointers| {
        let [q, k, v, g, o, log_sums, first, d_q, d_k, d_v, delta, squares] = pointers;
        let rows = planes * seq;
        let sizes = [Arg::Int(rows), Arg::Int(seq), Arg::Int(heads)];
        let args = [&[g, o, delta].map(Arg::Pointer)[..], &sizes, &far_rows].concat();
        lanes.launch(
            kernel("flash_delta", head_dim, mask),
            [rows.div_ceil(8), 1],
            THREADS,
            0,
            &args,
        )?;
        for plane in (0..planes).step_by(at_once) {
            let count = at_once.min(planes - plane);
            if has_documents {
                // Documents that have ended are not visited.
                lanes.zero(squares, 2 * count * seq * pitch)?;
            }
            let places = [q, k, v, g, log_sums, delta, d_k, d_v, squares].map(Arg::Pointer);
            let starts = [first_key(first)];
            let sizes = [seq, heads, plane, PRODUCT_QUERIES].map(Arg::Int);
            let scale = [Arg::Float(scale(head_dim)), Arg::Long(pitch)];
            let args = [&places[..], &starts, &sizes, &scale, &far].concat();
            let grid = [seq.div_ceil(KEYS), count];
            lanes.launch(kernel("flash_backward", head_dim, mask), grid, THREADS, shared, &args)?;

            for start in (0..seq).step_by(PRODUCT_QUERIES) {
                let end = (start + PRODUCT_QUERIES).min(seq);
                let at =
                    |pointer: u64, elements: usize, rows: usize, columns: usize, pitch: usize| {
                        Matrix {
                            pointer: pointer + 2 * elements as u64,
                            rows,
                            columns,
                            pitch,
                            transposed: false,
                            bf16: true,
                        }
                    };
                let seen = mask.seen(end, seq);
                let part = at(squares, start, seen, end - start, pitch).t();
                let keys = at(k, plane * apart, seen, head_dim, key_row);
                let to = at(d_q, (plane * seq + start) * head_dim, end - start, head_dim, head_dim);
                let batch = ProductBatch { count, strides: [seq * pitch, apart, seq * head_dim] };
                lanes.product(0, [part, keys, to], 1.0, 0.0, Some(batch))?;
            }
        }
        Ok(())
    });
    (d_query, d_key, d_value)
}
