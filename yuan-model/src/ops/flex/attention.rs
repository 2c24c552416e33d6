//! Causal attention and its gradient: one head of one row at a time, in parallel.

use burn::backend::{Flex, TensorMetadata, ops::FloatTensorOps};
use burn::tensor::{Shape, Slice};
use rayon::prelude::*;

use super::{Float, tensor};

/// The `[seq, d]` matrix of one head of one row.
fn head(x: &Float, index: usize) -> Float {
    let [_, heads, seq, d] = x.shape().dims();
    let (batch, head) = (index / heads, index % heads);
    let one = |i: usize| Slice::from(i..i + 1);
    let x = Flex::float_slice(x.clone(), &[one(batch), one(head), Slice::full(), Slice::full()]);
    Flex::float_reshape(x, Shape::from([seq, d]))
}

/// Causal softmax of scaled scores, in place; what is in the future becomes zero.
fn probabilities(query: &Float, key: &Float) -> Float {
    let [seq, d] = query.shape().dims();
    let scale = 1.0 / (d as f32).sqrt();
    let mut scores = Flex::float_matmul(query.clone(), Flex::float_transpose(key.clone())).to_contiguous();
    for (i, row) in scores.storage_mut::<f32>().chunks_mut(seq).enumerate() {
        let (past, future) = row.split_at_mut(i + 1);
        let max = past.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for score in past.iter_mut() {
            *score = ((*score - max) * scale).exp();
            sum += *score;
        }
        let inverse = 1.0 / sum;
        past.iter_mut().for_each(|p| *p *= inverse);
        future.fill(0.0);
    }
    scores
}

pub(super) fn forward(query: &Float, key: &Float, value: &Float) -> Float {
    let [batch, heads, seq, d] = value.shape().dims();
    let mut output = vec![0.0; batch * heads * seq * d];
    output.par_chunks_mut((seq * d).max(1)).enumerate().for_each(|(i, out)| {
        let p = probabilities(&head(query, i), &head(key, i));
        write(out, &Flex::float_matmul(p, head(value, i)));
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
        let p = probabilities(&query, &key);
        write(d_value, &Flex::float_matmul(Flex::float_transpose(p.clone()), grad.clone()));
        let mut d_scores = Flex::float_matmul(grad, Flex::float_transpose(value)).to_contiguous();
        let rows = d_scores.storage_mut::<f32>().chunks_mut(seq).zip(p.storage::<f32>().chunks(seq));
        for (d_p, p) in rows {
            let along: f32 = d_p.iter().zip(p).map(|(d_p, p)| d_p * p).sum();
            d_p.iter_mut().zip(p).for_each(|(d_p, p)| *d_p = p * (*d_p - along) * scale);
        }
        write(d_query, &Flex::float_matmul(d_scores.clone(), key));
        write(d_key, &Flex::float_matmul(Flex::float_transpose(d_scores), query));
    });
    let shape = [batch, heads, seq, d];
    (tensor(d_query, shape), tensor(d_key, shape), tensor(d_value, shape))
}

fn write(out: &mut [f32], product: &Float) {
    let product = product.to_contiguous();
    out.copy_from_slice(&product.storage::<f32>()[..out.len()]);
}
