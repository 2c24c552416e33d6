//! Attention without a mask, of queries, keys and values that lie side by side: read and written where
//! they are, one block of queries or one head at a time, in parallel.

use std::ops::Range;

use burn::backend::TensorMetadata;
use rayon::prelude::*;

use super::{
    Float, empty,
    matrix::Matrix,
    numeric::{exponentials, maximum, to_scores},
};

/// Queries of a block.
const BLOCK: usize = 64;

/// Queries, keys and values of one image.
#[derive(Clone, Copy)]
struct Image<'a> {
    /// `[seq, 3 · width]`
    values: &'a [f32],
    seq: usize,
    width: usize,
    heads: usize,
}

impl<'a> Image<'a> {
    fn head_dim(self) -> usize {
        self.width / self.heads
    }

    /// The `[seq, d]` matrices of a head.
    fn head(self, head: usize) -> [Matrix<'a>; 3] {
        [0, 1, 2].map(|part| {
            let first = part * self.width + head * self.head_dim();
            Matrix::strided(&self.values[first..], self.seq, self.head_dim(), 3 * self.width)
        })
    }
}

fn images<'a>(
    qkv: &'a Float,
    heads: usize,
) -> Option<impl IndexedParallelIterator<Item = Image<'a>>> {
    let [_, seq, triple] = qkv.shape().dims();
    let values = qkv.as_slice::<f32>()?.par_chunks((seq * triple).max(1));
    Some(values.map(move |values| Image { values, seq, width: triple / 3, heads }))
}

/// Softmax of the scaled scores of some queries, `[queries, seq]`.
fn probabilities(query: Matrix, key: Matrix, block: Range<usize>, scores: &mut Vec<f32>) {
    let (scale, keys) = (1.0 / (query.columns as f32).sqrt(), key.rows);
    scores.resize(block.len() * keys, 0.0);
    query.rows(block).times(key.transposed(), scores);
    for row in scores.chunks_mut(keys) {
        let inverse = 1.0 / exponentials(row, maximum(row), scale);
        row.iter_mut().for_each(|p| *p *= inverse);
    }
}

pub(super) fn forward(qkv: &Float, heads: usize) -> Option<Float> {
    let [batch, seq, triple] = qkv.shape().dims();
    let width = triple / 3;
    let mut output = empty([batch, seq, width]);
    let outputs = output.storage_mut::<f32>();
    let of_images = outputs.par_chunks_mut((seq * width).max(1)).zip(images(qkv, heads)?);
    of_images.for_each(|(output, image)| {
        let blocks = output.par_chunks_mut((BLOCK * width).max(1)).enumerate();
        blocks.for_each_init(<[Vec<f32>; 2]>::default, |[p, context], (number, output)| {
            let block = number * BLOCK..(number * BLOCK + BLOCK).min(seq);
            let d = image.head_dim();
            context.resize(block.len() * d, 0.0);
            for head in 0..heads {
                let [query, key, value] = image.head(head);
                probabilities(query, key, block.clone(), p);
                Matrix::dense(p, seq).times(value, context);
                scatter(context, d, &mut output[head * d..], width);
            }
        });
    });
    Some(output)
}

pub(super) fn backward(qkv: &Float, grad: &Float, heads: usize) -> Option<Float> {
    let [batch, seq, triple] = qkv.shape().dims();
    let width = triple / 3;
    let grads = grad.as_slice::<f32>()?.par_chunks((seq * width).max(1));
    let mut output = empty([batch, seq, triple]);
    let outputs = output.storage_mut::<f32>();
    let of_images = outputs.par_chunks_mut((seq * triple).max(1)).zip(images(qkv, heads)?);
    of_images.zip(grads).for_each(|((output, image), grad)| {
        let d = image.head_dim();
        let gradients: Vec<[Vec<f32>; 3]> = (0..heads)
            .into_par_iter()
            .map(|head| {
                let grad = Matrix::strided(&grad[head * d..], seq, d, width);
                head_gradients(image.head(head), grad)
            })
            .collect();
        for (head, parts) in gradients.iter().enumerate() {
            for (part, values) in parts.iter().enumerate() {
                scatter(values, d, &mut output[part * width + head * d..], triple);
            }
        }
    });
    Some(output)
}

/// Gradients of a head for its queries, keys and values, `[seq, d]` each.
fn head_gradients([query, key, value]: [Matrix; 3], grad: Matrix) -> [Vec<f32>; 3] {
    let (seq, d) = (query.rows, query.columns);
    let scale = 1.0 / (d as f32).sqrt();
    let [mut d_query, mut d_key, mut d_value] = [(); 3].map(|()| vec![0.0; seq * d]);
    let [mut p, mut d_scores] = [Vec::new(), Vec::new()];
    for start in (0..seq).step_by(BLOCK) {
        let block = start..(start + BLOCK).min(seq);
        probabilities(query, key, block.clone(), &mut p);
        let grad = grad.rows(block.clone());
        d_scores.resize(p.len(), 0.0);
        grad.times(value.transposed(), &mut d_scores);
        for (d_p, p) in d_scores.chunks_mut(seq).zip(p.chunks(seq)) {
            to_scores(d_p, p, scale);
        }
        let (p, d_scores) = (Matrix::dense(&p, seq), Matrix::dense(&d_scores, seq));
        p.transposed().add_times(grad, &mut d_value);
        d_scores.times(key, &mut d_query[block.start * d..block.end * d]);
        d_scores.transposed().add_times(query.rows(block), &mut d_key);
    }
    [d_query, d_key, d_value]
}

/// Puts rows of `d` values at the beginnings of rows of `width` values.
fn scatter(values: &[f32], d: usize, out: &mut [f32], width: usize) {
    for (row, out) in values.chunks_exact(d).zip(out.chunks_mut(width)) {
        out[..d].copy_from_slice(row);
    }
}
