//! Causal attention and its gradient: one head of one row at a time, in parallel.
//!
//! Queries go in blocks against the keys up to the block's end: what lies in the future of a whole
//! block is never computed, and of the scores only a block's are ever in memory.

use std::ops::Range;

use burn::backend::{Flex, TensorMetadata, ops::FloatTensorOps};
use burn::tensor::{Shape, Slice};
use rayon::prelude::*;

use super::{
    Float, copy_into,
    numeric::{dot, exponentials, maximum},
    tensor,
};

/// Queries of a block: small enough to spare most of the future, large enough for fast products.
const BLOCK: usize = 64;

/// The `[seq, d]` matrix of one head of one row.
fn head(x: &Float, index: usize) -> Float {
    let [_, heads, seq, d] = x.shape().dims();
    let (batch, head) = (index / heads, index % heads);
    let one = |i: usize| Slice::from(i..i + 1);
    let x = Flex::float_slice(x.clone(), &[one(batch), one(head), Slice::full(), Slice::full()]);
    Flex::float_reshape(x, Shape::from([seq, d]))
}

fn rows(x: &Float, range: Range<usize>) -> Float {
    Flex::float_slice(x.clone(), &[Slice::from(range), Slice::full()])
}

fn blocks(seq: usize) -> impl Iterator<Item = Range<usize>> {
    (0..seq).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(seq))
}

/// Causal softmax of scaled scores, `[block, end of the block]`, of queries that stand `past` keys further on;
/// what is in the future or before the first key is zero.
fn probabilities(query: &Float, key: &Float, block: Range<usize>, past: usize, first: usize) -> Float {
    let [_, d] = query.shape().dims();
    let (scale, end) = (1.0 / (d as f32).sqrt(), past + block.end);
    let keys = Flex::float_transpose(rows(key, 0..end));
    let mut scores = Flex::float_matmul(rows(query, block.clone()), keys).to_contiguous();
    for (i, row) in block.zip(scores.storage_mut::<f32>().chunks_mut(end)) {
        softmax(row, past + i, first, scale);
    }
    scores
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

/// Attention of the last queries of `length` tokens; see [`cached_attention`](crate::ops::cached_attention).
pub(super) fn forward(
    query: &Float,
    key: &Float,
    value: &Float,
    length: usize,
    first_keys: &[usize],
) -> Float {
    let [batch, heads, queries, d] = query.shape().dims();
    let past = length - queries;
    let mut output = vec![0.0; batch * heads * queries * d];
    output.par_chunks_mut((queries * d).max(1)).enumerate().for_each(|(i, out)| {
        let [query, key, value] = [query, key, value].map(|x| head(x, i));
        let first = first_keys[i / heads];
        if queries == 1 {
            return attend_one(&query, &key, &value, length, first, out);
        }
        for block in blocks(queries) {
            let p = probabilities(&query, &key, block.clone(), past, first);
            let product = Flex::float_matmul(p, rows(&value, 0..past + block.end));
            copy_into(&mut out[block.start * d..block.end * d], &product);
        }
    });
    tensor(output, [batch, heads, queries, d])
}

/// One query of one head: two passes over the cache, without the set-up of a product.
fn attend_one(query: &Float, key: &Float, value: &Float, length: usize, first: usize, out: &mut [f32]) {
    let d = out.len();
    let [query, key, value] =
        [(query, 1), (key, length), (value, length)].map(|(x, length)| contiguous(rows(x, 0..length)));
    let keys = values(&key).chunks_exact(d);
    let mut p: Vec<f32> = keys.map(|key| dot(values(&query), key)).collect();
    softmax(&mut p, length - 1, first, 1.0 / (d as f32).sqrt());
    for (p, value) in p.iter().zip(values(&value).chunks_exact(d)) {
        out.iter_mut().zip(value).for_each(|(out, value)| *out += p * value);
    }
}

/// A matrix whose rows follow each other, where it is already one without a copy.
fn contiguous(x: Float) -> Float {
    let width = x.shape()[1] as isize;
    if x.layout().strides() == [width, 1] { x } else { x.to_contiguous() }
}

/// The elements of a contiguous tensor, which may be part of a larger one.
fn values(x: &Float) -> &[f32] {
    let start = x.layout().start_offset();
    &x.storage::<f32>()[start..start + x.shape().num_elements()]
}

pub(super) fn backward(query: &Float, key: &Float, value: &Float, grad: &Float) -> (Float, Float, Float) {
    let [batch, heads, seq, d] = query.shape().dims();
    let scale = 1.0 / (d as f32).sqrt();
    let outputs = || vec![0.0; batch * heads * seq * d];
    let (mut d_query, mut d_key, mut d_value) = (outputs(), outputs(), outputs());
    let size = (seq * d).max(1);
    let out = d_query.par_chunks_mut(size).zip(d_key.par_chunks_mut(size)).zip(d_value.par_chunks_mut(size));
    out.enumerate().for_each(|(i, ((d_query, d_key), d_value))| {
        let [query, key, value, grad] = [query, key, value, grad].map(|x| head(x, i));
        for block in blocks(seq) {
            let end = block.end;
            let p = probabilities(&query, &key, block.clone(), 0, 0);
            let grad = rows(&grad, block.clone());
            let values = Flex::float_transpose(rows(&value, 0..end));
            let mut d_scores = Flex::float_matmul(grad.clone(), values).to_contiguous();
            let pairs = d_scores.storage_mut::<f32>().chunks_mut(end).zip(p.storage::<f32>().chunks(end));
            for (d_p, p) in pairs {
                let along = dot(d_p, p);
                d_p.iter_mut().zip(p).for_each(|(d_p, p)| *d_p = p * (*d_p - along) * scale);
            }
            add(d_value, &Flex::float_matmul(Flex::float_transpose(p), grad));
            copy_into(
                &mut d_query[block.start * d..end * d],
                &Flex::float_matmul(d_scores.clone(), rows(&key, 0..end)),
            );
            add(d_key, &Flex::float_matmul(Flex::float_transpose(d_scores), rows(&query, block)));
        }
    });
    let shape = [batch, heads, seq, d];
    (tensor(d_query, shape), tensor(d_key, shape), tensor(d_value, shape))
}

/// Adds a product to the first rows of `out`.
fn add(out: &mut [f32], product: &Float) {
    let product = product.to_contiguous();
    let (values, length) = (product.storage::<f32>(), product.shape().num_elements());
    out.iter_mut().zip(&values[..length]).for_each(|(sum, value)| *sum += value);
}
