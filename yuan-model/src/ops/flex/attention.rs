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

/// Causal softmax of scaled scores, `[block, block.end]`; what is in the future is zero.
fn probabilities(query: &Float, key: &Float, block: Range<usize>) -> Float {
    let [_, d] = query.shape().dims();
    let (scale, end) = (1.0 / (d as f32).sqrt(), block.end);
    let keys = Flex::float_transpose(rows(key, 0..end));
    let mut scores = Flex::float_matmul(rows(query, block.clone()), keys).to_contiguous();
    for (i, row) in block.zip(scores.storage_mut::<f32>().chunks_mut(end)) {
        let (past, future) = row.split_at_mut(i + 1);
        let inverse = 1.0 / exponentials(past, maximum(past), scale);
        past.iter_mut().for_each(|p| *p *= inverse);
        future.fill(0.0);
    }
    scores
}

pub(super) fn forward(query: &Float, key: &Float, value: &Float) -> Float {
    let [batch, heads, seq, d] = value.shape().dims();
    let mut output = vec![0.0; batch * heads * seq * d];
    output.par_chunks_mut((seq * d).max(1)).enumerate().for_each(|(i, out)| {
        let [query, key, value] = [query, key, value].map(|x| head(x, i));
        for block in blocks(seq) {
            let p = probabilities(&query, &key, block.clone());
            let product = Flex::float_matmul(p, rows(&value, 0..block.end));
            copy_into(&mut out[block.start * d..block.end * d], &product);
        }
    });
    tensor(output, [batch, heads, seq, d])
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
            let p = probabilities(&query, &key, block.clone());
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
