//! Causal attention and its gradient: one head of one row at a time, in parallel.
//!
//! Queries go in blocks against the keys up to the block's end: what lies in the future of a whole
//! block is never computed, and of the scores only a block's are ever in memory.

use std::ops::Range;

use burn::backend::TensorMetadata;
use rayon::prelude::*;

use super::{
    Float, empty,
    matrix::Matrix,
    numeric::{dot, exponentials, maximum, to_scores},
};

/// Queries of a block: small enough to spare most of the future, large enough for fast products.
const BLOCK: usize = 64;

/// The `[seq, d]` matrix of one head of one row.
fn head(x: &Float, index: usize) -> Matrix<'_> {
    let heads = x.shape()[1];
    Matrix::of(x, [index / heads, index % heads])
}

fn blocks(seq: usize) -> impl Iterator<Item = Range<usize>> {
    (0..seq).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(seq))
}

/// Causal softmax of scaled scores, `[block, end of the block]`, of queries that stand `past` keys
/// further on; what is in the future or before the first key is zero.
fn probabilities(
    query: Matrix,
    key: Matrix,
    block: Range<usize>,
    past: usize,
    first: usize,
    scores: &mut Vec<f32>,
) {
    let (scale, end) = (1.0 / (query.columns as f32).sqrt(), past + block.end);
    scores.resize(block.len() * end, 0.0);
    query.rows(block.clone()).times(key.rows(0..end).transposed(), scores);
    for (i, row) in block.zip(scores.chunks_mut(end)) {
        softmax(row, past + i, first, scale);
    }
}

/// Softmax over the keys `first..=last`, zero elsewhere; a query before the first key sees itself.
fn softmax(row: &mut [f32], last: usize, first: usize, scale: f32) {
    let (seen, future) = row.split_at_mut(last + 1);
    let (padding, seen) = seen.split_at_mut(first.min(last));
    let inverse = 1.0 / exponentials(seen, maximum(seen), scale);
    seen.iter_mut().for_each(|p| *p *= inverse);
    padding.fill(0.0);
    future.fill(0.0);
}

/// Attention of the last queries of `length` tokens; see
/// [`cached_attention`](crate::ops::cached_attention).
pub(super) fn forward(
    query: &Float,
    key: &Float,
    value: &Float,
    length: usize,
    first_keys: &[usize],
) -> Float {
    let [batch, heads, queries, d] = query.shape().dims();
    let past = length - queries;
    let mut output = empty([batch, heads, queries, d]);
    let outputs = output.storage_mut::<f32>().par_chunks_mut((queries * d).max(1)).enumerate();
    outputs.for_each_init(Vec::new, |p, (i, out)| {
        let [query, key, value] = [query, key, value].map(|x| head(x, i));
        let first = first_keys[i / heads];
        if queries == 1 {
            return attend_one(query, key, value, length, first, out);
        }
        for block in blocks(queries) {
            probabilities(query, key, block.clone(), past, first, p);
            let end = past + block.end;
            Matrix::dense(p, end)
                .times(value.rows(0..end), &mut out[block.start * d..block.end * d]);
        }
    });
    output
}

/// One query of one head: two passes over the cache, without the set-up of a product.
fn attend_one(
    query: Matrix,
    key: Matrix,
    value: Matrix,
    length: usize,
    first: usize,
    out: &mut [f32],
) {
    let scale = 1.0 / (query.columns as f32).sqrt();
    let (Some(query), Some(_), Some(_)) = (query.row(0), key.row(0), value.row(0)) else {
        let mut p = Vec::new();
        probabilities(query, key, 0..1, length - 1, first, &mut p);
        return Matrix::dense(&p, length).times(value.rows(0..length), out);
    };
    let mut p: Vec<f32> =
        (0..length).filter_map(|i| key.row(i)).map(|key| dot(query, key)).collect();
    softmax(&mut p, length - 1, first, scale);
    out.fill(0.0);
    for (p, value) in p.iter().zip((0..length).filter_map(|i| value.row(i))) {
        out.iter_mut().zip(value).for_each(|(out, value)| *out += p * value);
    }
}

pub(super) fn backward(
    query: &Float,
    key: &Float,
    value: &Float,
    grad: &Float,
) -> (Float, Float, Float) {
    let [batch, heads, seq, d] = query.shape().dims();
    let scale = 1.0 / (d as f32).sqrt();
    let [mut d_query, mut d_key, mut d_value] = [(); 3].map(|()| empty([batch, heads, seq, d]));
    let size = (seq * d).max(1);
    let [out_query, out_key, out_value] = [&mut d_query, &mut d_key, &mut d_value]
        .map(|x| x.storage_mut::<f32>().par_chunks_mut(size));
    let out = out_query.zip(out_key).zip(out_value).enumerate();
    out.for_each_init(
        <[Vec<f32>; 2]>::default,
        |[p, d_scores], (i, ((d_query, d_key), d_value))| {
            let [query, key, value, grad] = [query, key, value, grad].map(|x| head(x, i));
            d_key.fill(0.0);
            d_value.fill(0.0);
            for block in blocks(seq) {
                let end = block.end;
                probabilities(query, key, block.clone(), 0, 0, p);
                let grad = grad.rows(block.clone());
                d_scores.resize(p.len(), 0.0);
                grad.times(value.rows(0..end).transposed(), d_scores);
                for (d_p, p) in d_scores.chunks_mut(end).zip(p.chunks(end)) {
                    to_scores(d_p, p, scale);
                }
                let (p, d_scores) = (Matrix::dense(p, end), Matrix::dense(d_scores, end));
                p.transposed().add_times(grad, &mut d_value[..end * d]);
                d_scores.times(key.rows(0..end), &mut d_query[block.start * d..end * d]);
                d_scores.transposed().add_times(query.rows(block), &mut d_key[..end * d]);
            }
        },
    );
    (d_query, d_key, d_value)
}
