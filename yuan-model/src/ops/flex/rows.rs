//! Operations on rows: gathering, combining, normalising, cross-entropy.

use burn::backend::TensorMetadata;
use rayon::prelude::*;

use super::{
    Float, Int, empty, indices,
    numeric::{dot, dot_of, exponentials, maximum, vectorised},
    tensor,
};

/// Rows whose sums form one partial sum of a weight's gradient.
pub(super) const BLOCK: usize = 64;

pub(super) fn gather(source: &Float, rows: &Int) -> Option<Float> {
    let (input, rows) = (source.as_slice::<f32>()?, indices(rows)?);
    let width = source.shape()[1];
    let mut output = vec![0.0; rows.len() * width];
    output.par_chunks_mut(width.max(1)).zip(&rows).with_min_len(16).for_each(|(out, &row)| {
        out.copy_from_slice(&input[row * width..][..width]);
    });
    Some(tensor(output, [rows.len(), width]))
}

pub(super) fn gather_sum(grad: &Float, inverse: &Int, copies: usize) -> Option<Float> {
    let (input, inverse) = (grad.as_slice::<f32>()?, indices(inverse)?);
    let [rows, width] = grad.shape().dims();
    let mut output = vec![0.0; rows / copies * width];
    output.par_chunks_mut(width.max(1)).zip(inverse.par_chunks(copies)).with_min_len(16).for_each(
        |(out, rows)| {
            vectorised(
                #[inline(always)]
                || {
                    for &row in rows {
                        let row = &input[row * width..][..width];
                        out.iter_mut().zip(row).for_each(|(out, x)| *out += x);
                    }
                },
            );
        },
    );
    Some(tensor(output, [rows / copies, width]))
}

pub(super) fn combine(rows: &Float, weights: &Float, row_of_pair: &Int) -> Option<Float> {
    let (input, weight, row_of_pair) =
        (rows.as_slice::<f32>()?, weights.as_slice::<f32>()?, indices(row_of_pair)?);
    let ([_, width], [tokens, top_k]) = (rows.shape().dims(), weights.shape().dims());
    let mut output = vec![0.0; tokens * width];
    let choices = row_of_pair.par_chunks(top_k).zip(weight.par_chunks(top_k));
    output.par_chunks_mut(width.max(1)).zip(choices).with_min_len(16).for_each(
        |(out, (rows, weights))| {
            vectorised(
                #[inline(always)]
                || {
                    for (&row, weight) in rows.iter().zip(weights) {
                        let row = &input[row * width..][..width];
                        out.iter_mut().zip(row).for_each(|(out, x)| *out += weight * x);
                    }
                },
            );
        },
    );
    Some(tensor(output, [tokens, width]))
}

pub(super) fn combine_backward(
    rows: &Float,
    weights: &Float,
    row_of_pair: &Int,
    pair_of_row: &Int,
    grad: &Float,
) -> Option<(Float, Float)> {
    let (input, weight, grads) =
        (rows.as_slice::<f32>()?, weights.as_slice::<f32>()?, grad.as_slice::<f32>()?);
    let (row_of_pair, pair_of_row) = (indices(row_of_pair)?, indices(pair_of_row)?);
    let ([pairs, width], [tokens, top_k]) = (rows.shape().dims(), weights.shape().dims());
    let mut d_rows = vec![0.0; pairs * width];
    d_rows.par_chunks_mut(width.max(1)).zip(&pair_of_row).with_min_len(16).for_each(
        |(out, &pair)| {
            let (weight, grad) = (weight[pair], &grads[pair / top_k * width..][..width]);
            vectorised(
                #[inline(always)]
                || out.iter_mut().zip(grad).for_each(|(out, grad)| *out = weight * grad),
            );
        },
    );
    let product = |(pair, &row): (usize, &usize)| {
        dot(&input[row * width..][..width], &grads[pair / top_k * width..][..width])
    };
    let d_weights: Vec<f32> =
        row_of_pair.par_iter().enumerate().with_min_len(64).map(product).collect();
    Some((tensor(d_rows, [pairs, width]), tensor(d_weights, [tokens, top_k])))
}

/// Makes every row of a result, `[rows, width]`; `each` is given its number and writes all of it.
pub(super) fn by_rows([rows, width]: [usize; 2], each: impl Fn(usize, &mut [f32]) + Sync) -> Float {
    let mut output = empty([rows, width]);
    let chunks = output.storage_mut::<f32>().par_chunks_mut(width.max(1)).enumerate();
    chunks.with_min_len(16).for_each(|(row, out)| {
        vectorised(
            #[inline(always)]
            || each(row, out),
        );
    });
    output
}

/// Makes a result of two inputs of its shape, `[rows, width]`, some rows at a time; what `each` returns
/// comes in the order of the rows.
pub(super) fn by_blocks<T: Send>(
    [rows, width]: [usize; 2],
    [first, second]: [&[f32]; 2],
    each: impl Fn(&mut [f32], &[f32], &[f32]) -> T + Sync,
) -> (Float, Vec<T>) {
    let block = (BLOCK * width).max(1);
    let mut output = empty([rows, width]);
    let blocks = output
        .storage_mut::<f32>()
        .par_chunks_mut(block)
        .zip(first.par_chunks(block))
        .zip(second.par_chunks(block));
    let each = |((out, first), second): ((&mut [f32], &[f32]), &[f32])| {
        vectorised(
            #[inline(always)]
            || each(out, first, second),
        )
    };
    let returned = blocks.map(each).collect();
    (output, returned)
}

/// Partial sums added up in their order.
pub(super) fn summed<'a>(partial: impl IntoIterator<Item = &'a Vec<f32>>, width: usize) -> Float {
    let mut sums = vec![0.0; width];
    for partial in partial {
        sums.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
    }
    tensor(sums, [width])
}

pub(super) fn rms_norm(x: &Float, weight: &Float, epsilon: f64) -> Option<Float> {
    let (input, weight) = (x.as_slice::<f32>()?, weight.as_slice::<f32>()?);
    let [rows, width] = x.shape().dims();
    Some(by_rows(
        [rows, width],
        #[inline(always)]
        |row, out| {
            let x = &input[row * width..][..width];
            let inverse = inverse_root(x, epsilon);
            out.iter_mut()
                .zip(x)
                .zip(weight)
                .for_each(|((out, x), weight)| *out = x * inverse * weight);
        },
    ))
}

pub(super) fn rms_norm_backward(
    x: &Float,
    weight: &Float,
    grad: &Float,
    epsilon: f64,
) -> Option<(Float, Float)> {
    let (input, weight, grads) =
        (x.as_slice::<f32>()?, weight.as_slice::<f32>()?, grad.as_slice::<f32>()?);
    let [rows, width] = x.shape().dims();
    let (d_x, partial) = by_blocks(
        [rows, width],
        [input, grads],
        #[inline(always)]
        |d_x, x, grad| {
            let mut d_weight = vec![0.0; width];
            let rows = d_x.chunks_mut(width).zip(x.chunks(width)).zip(grad.chunks(width));
            for ((d_x, x), grad) in rows {
                let inverse = inverse_root(x, epsilon);
                let mut along = 0.0;
                for i in 0..width {
                    let normed = x[i] * inverse;
                    d_weight[i] += grad[i] * normed;
                    along += grad[i] * weight[i] * normed;
                }
                along /= width as f32;
                for i in 0..width {
                    d_x[i] = inverse * (grad[i] * weight[i] - x[i] * inverse * along);
                }
            }
            d_weight
        },
    );
    Some((d_x, summed(&partial, width)))
}

pub(super) fn cross_entropy(logits: &Float, labels: &Int) -> Option<Float> {
    let (input, labels) = (logits.as_slice::<f32>()?, indices(labels)?);
    let [rows, classes] = logits.shape().dims();
    let losses: Vec<f32> = (input.par_chunks(classes.max(1)), &labels)
        .into_par_iter()
        .map(|(logits, &label)| log_sum_exp(logits) - logits[label])
        .collect();
    Some(tensor(losses, [rows]))
}

pub(super) fn cross_entropy_backward(logits: &Float, labels: &Int, grad: &Float) -> Option<Float> {
    let (input, labels, grads) =
        (logits.as_slice::<f32>()?, indices(labels)?, grad.as_slice::<f32>()?);
    let [rows, classes] = logits.shape().dims();
    let mut output = vec![0.0; rows * classes];
    let row_pairs = output.par_chunks_mut(classes.max(1)).zip(input.par_chunks(classes.max(1)));
    row_pairs.zip(labels.par_iter().zip(grads)).for_each(|((out, logits), (&label, &grad))| {
        out.copy_from_slice(logits);
        let scale = grad / exponentials(out, maximum(logits), 1.0);
        out.iter_mut().for_each(|out| *out *= scale);
        out[label] -= grad;
    });
    Some(tensor(output, [rows, classes]))
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let max = maximum(row);
    // In pieces that stay in the first cache.
    let mut piece = [0.0; 512];
    let sums = row.chunks(piece.len()).map(|chunk| {
        let piece = &mut piece[..chunk.len()];
        piece.copy_from_slice(chunk);
        exponentials(piece, max, 1.0)
    });
    max + sums.sum::<f32>().ln()
}

#[inline(always)]
fn inverse_root(row: &[f32], epsilon: f64) -> f32 {
    1.0 / (dot_of(row, row) / row.len() as f32 + epsilon as f32).sqrt()
}
