//! Operations of the image tower.

use burn::backend::TensorMetadata;
use rayon::prelude::*;

use super::{
    Float, empty,
    numeric::{exp, vectorised},
    rows::{BLOCK, by_blocks, by_rows, summed},
};

/// Elements that one task takes.
const CHUNK: usize = 1 << 13;

/// Φ(x) and the density φ(x) · √(2π), by formula 7.1.26 of Abramowitz and Stegun, which is within
/// 1.5e-7.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let density = exp(-0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let p = 1.061_405_4_f32;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_74;
    let p = p * t + 0.254_829_6;
    let upper = 0.5 * p * t * density;
    (if x < 0.0 { upper } else { 1.0 - upper }, density)
}

pub(super) fn gelu(x: &Float) -> Option<Float> {
    let input = x.as_slice::<f32>()?;
    let mut output = empty(x.shape().dims::<2>());
    let chunks = output.storage_mut::<f32>().par_chunks_mut(CHUNK).zip(input.par_chunks(CHUNK));
    chunks.for_each(|(out, x)| {
        vectorised(
            #[inline(always)]
            || out.iter_mut().zip(x).for_each(|(out, &x)| *out = x * normal(x).0),
        );
    });
    Some(output)
}

pub(super) fn gelu_backward(x: &Float, grad: &Float) -> Option<Float> {
    /// 1 / √(2π)
    const SCALE: f32 = 0.398_942_3;
    let (input, grads) = (x.as_slice::<f32>()?, grad.as_slice::<f32>()?);
    let mut output = empty(x.shape().dims::<2>());
    let chunks = output.storage_mut::<f32>().par_chunks_mut(CHUNK).zip(input.par_chunks(CHUNK));
    chunks.zip(grads.par_chunks(CHUNK)).for_each(|((out, x), grad)| {
        vectorised(
            #[inline(always)]
            || {
                for ((out, &x), grad) in out.iter_mut().zip(x).zip(grad) {
                    let (distribution, density) = normal(x);
                    *out = grad * (distribution + x * density * SCALE);
                }
            },
        );
    });
    Some(output)
}

/// Mean, and inverse of the deviation.
#[inline(always)]
fn moments(x: &[f32], epsilon: f64) -> (f32, f32) {
    let mean = sum_of(
        x,
        #[inline(always)]
        |x| x,
    ) / x.len() as f32;
    let variance = sum_of(
        x,
        #[inline(always)]
        |x| (x - mean) * (x - mean),
    ) / x.len() as f32;
    (mean, 1.0 / (variance + epsilon as f32).sqrt())
}

/// The sum of something over all values, in eight running sums.
#[inline(always)]
fn sum_of(values: &[f32], what: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for chunk in chunks {
        for i in 0..8 {
            lanes[i] += what(chunk[i]);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|&x| what(x)).sum::<f32>()
}

pub(super) fn layer_norm(x: &Float, weight: &Float, bias: &Float, epsilon: f64) -> Option<Float> {
    let (input, weight, bias) =
        (x.as_slice::<f32>()?, weight.as_slice::<f32>()?, bias.as_slice::<f32>()?);
    let [rows, width] = x.shape().dims();
    Some(by_rows(
        [rows, width],
        #[inline(always)]
        |row, out| {
            let x = &input[row * width..][..width];
            let (mean, inverse) = moments(x, epsilon);
            for i in 0..width {
                out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
            }
        },
    ))
}

pub(super) fn layer_norm_backward(
    x: &Float,
    weight: &Float,
    grad: &Float,
    epsilon: f64,
) -> Option<[Float; 3]> {
    let (input, weight, grads) =
        (x.as_slice::<f32>()?, weight.as_slice::<f32>()?, grad.as_slice::<f32>()?);
    let [rows, width] = x.shape().dims();
    let (d_x, partial) = by_blocks(
        [rows, width],
        [input, grads],
        #[inline(always)]
        |d_x, x, grad| {
            let [mut d_weight, mut d_bias] = [vec![0.0; width], vec![0.0; width]];
            let rows = d_x.chunks_mut(width).zip(x.chunks(width)).zip(grad.chunks(width));
            for ((d_x, x), grad) in rows {
                let (mean, inverse) = moments(x, epsilon);
                let [mut of_grad, mut along] = [[0.0_f32; 8]; 2];
                for i in 0..width {
                    let (normed, scaled) = ((x[i] - mean) * inverse, grad[i] * weight[i]);
                    d_weight[i] += grad[i] * normed;
                    d_bias[i] += grad[i];
                    of_grad[i % 8] += scaled;
                    along[i % 8] += scaled * normed;
                }
                let [of_grad, along] =
                    [of_grad, along].map(|lanes| lanes.iter().sum::<f32>() / width as f32);
                for i in 0..width {
                    let normed = (x[i] - mean) * inverse;
                    d_x[i] = inverse * (grad[i] * weight[i] - of_grad - normed * along);
                }
            }
            [d_weight, d_bias]
        },
    );
    let [d_weight, d_bias] =
        [0, 1].map(|part| summed(partial.iter().map(|sums| &sums[part]), width));
    Some([d_x, d_weight, d_bias])
}

pub(super) fn add_bias(x: &Float, bias: &Float) -> Option<Float> {
    let (input, bias) = (x.as_slice::<f32>()?, bias.as_slice::<f32>()?);
    let [rows, width] = x.shape().dims();
    Some(by_rows(
        [rows, width],
        #[inline(always)]
        |row, out| {
            let x = &input[row * width..][..width];
            for i in 0..width {
                out[i] = x[i] + bias[i];
            }
        },
    ))
}

pub(super) fn sum_rows(grad: &Float) -> Option<Float> {
    let (grads, width) = (grad.as_slice::<f32>()?, grad.shape()[1]);
    let sum = |block: &[f32]| {
        let mut sum = vec![0.0; width];
        vectorised(
            #[inline(always)]
            || {
                for row in block.chunks(width) {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
            },
        );
        sum
    };
    let partial: Vec<Vec<f32>> = grads.par_chunks((BLOCK * width).max(1)).map(sum).collect();
    Some(summed(&partial, width))
}

pub(super) fn add_scaled(x: &Float, branch: &Float, scale: &Float) -> Option<Float> {
    let (input, branch, scale) =
        (x.as_slice::<f32>()?, branch.as_slice::<f32>()?, scale.as_slice::<f32>()?);
    let [rows, width] = x.shape().dims();
    Some(by_rows(
        [rows, width],
        #[inline(always)]
        |row, out| {
            let [x, branch] = [input, branch].map(|values| &values[row * width..][..width]);
            for i in 0..width {
                out[i] = x[i] + branch[i] * scale[i];
            }
        },
    ))
}

pub(super) fn add_scaled_backward(
    branch: &Float,
    scale: &Float,
    grad: &Float,
) -> Option<(Float, Float)> {
    let (input, scale, grads) =
        (branch.as_slice::<f32>()?, scale.as_slice::<f32>()?, grad.as_slice::<f32>()?);
    let [rows, width] = branch.shape().dims();
    let (d_branch, partial) = by_blocks(
        [rows, width],
        [input, grads],
        #[inline(always)]
        |d_branch, branch, grad| {
            let mut d_scale = vec![0.0; width];
            let rows = d_branch.chunks_mut(width).zip(branch.chunks(width));
            for ((d_branch, branch), grad) in rows.zip(grad.chunks(width)) {
                for i in 0..width {
                    d_branch[i] = grad[i] * scale[i];
                    d_scale[i] += grad[i] * branch[i];
                }
            }
            d_scale
        },
    );
    Some((d_branch, summed(&partial, width)))
}
