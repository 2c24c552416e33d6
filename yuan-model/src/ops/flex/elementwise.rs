//! Operations whose elements hardly depend on each other.

use burn::backend::TensorMetadata;
use rayon::prelude::*;

use super::{
    AdamWStep, Float,
    numeric::{dot, sigmoid, vectorised},
    tensor,
};

/// Elements that one task takes: large enough to hide its cost, small enough for the cache.
const CHUNK: usize = 1 << 14;

pub(super) fn swiglu(gate_up: &Float) -> Option<Float> {
    let input = gate_up.as_slice::<f32>()?;
    let [rows, width] = gate_up.shape().dims();
    let half = width / 2;
    let mut output = vec![0.0; rows * half];
    output
        .par_chunks_mut(half.max(1))
        .zip(input.par_chunks(width.max(1)))
        .with_min_len(8)
        .for_each(|(out, row)| {
            let (gate, up) = row.split_at(half);
            vectorised(
                #[inline(always)]
                || {
                    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                        *out = gate * sigmoid(*gate) * up;
                    }
                },
            );
        });
    Some(tensor(output, [rows, half]))
}

pub(super) fn swiglu_backward(gate_up: &Float, grad: &Float) -> Option<Float> {
    let (input, grads) = (gate_up.as_slice::<f32>()?, grad.as_slice::<f32>()?);
    let [rows, width] = gate_up.shape().dims();
    let half = width / 2;
    let mut output = vec![0.0; rows * width];
    let rows_of = output.par_chunks_mut(width.max(1)).zip(input.par_chunks(width.max(1)));
    rows_of.zip(grads.par_chunks(half.max(1))).with_min_len(8).for_each(|((out, row), grad)| {
        let (gate, up) = row.split_at(half);
        let (d_gate, d_up) = out.split_at_mut(half);
        vectorised(
            #[inline(always)]
            || {
                let outputs = d_gate.iter_mut().zip(d_up).zip(grad);
                for (((d_gate, d_up), grad), (gate, up)) in outputs.zip(gate.iter().zip(up)) {
                    let s = sigmoid(*gate);
                    *d_gate = grad * up * s * (1.0 + gate * (1.0 - s));
                    *d_up = grad * gate * s;
                }
            },
        );
    });
    Some(tensor(output, [rows, width]))
}

pub(super) fn add_previous(taps: &Float) -> Option<Float> {
    let input = taps.as_slice::<f32>()?;
    let [batch, seq, width] = taps.shape().dims();
    let half = width / 2;
    let mut output = vec![0.0; batch * seq * half];
    output.par_chunks_mut(half.max(1)).enumerate().with_min_len(8).for_each(|(token, out)| {
        out.copy_from_slice(&input[token * width + half..(token + 1) * width]);
        if token % seq > 0 {
            let previous = &input[(token - 1) * width..][..half];
            out.iter_mut().zip(previous).for_each(|(out, previous)| *out += previous);
        }
    });
    Some(tensor(output, [batch, seq, half]))
}

pub(super) fn add_previous_backward(grad: &Float) -> Option<Float> {
    let input = grad.as_slice::<f32>()?;
    let [batch, seq, width] = grad.shape().dims();
    let mut output = vec![0.0; batch * seq * 2 * width];
    output.par_chunks_mut((2 * width).max(1)).enumerate().with_min_len(8).for_each(
        |(token, out)| {
            let (previous, current) = out.split_at_mut(width);
            current.copy_from_slice(&input[token * width..][..width]);
            if token % seq + 1 < seq {
                previous.copy_from_slice(&input[(token + 1) * width..][..width]);
            }
        },
    );
    Some(tensor(output, [batch, seq, 2 * width]))
}

pub(super) fn rotate(x: &Float, cos: &Float, sin: &Float) -> Option<Float> {
    let (input, cos_values, sin_values) =
        (x.as_slice::<f32>()?, cos.as_slice::<f32>()?, sin.as_slice::<f32>()?);
    let [batch, seq, heads, width] = x.shape().dims();
    let pairs = cos.shape()[3];
    let mut output = vec![0.0; batch * seq * heads * width];
    let tokens =
        output.par_chunks_mut((heads * width).max(1)).zip(input.par_chunks((heads * width).max(1)));
    tokens.enumerate().with_min_len(8).for_each(|(token, (out, x))| {
        // One table for all rows, or one per row.
        let at = (token * pairs) % cos_values.len();
        let (cos, sin) = (&cos_values[at..at + pairs], &sin_values[at..at + pairs]);
        for (out, x) in out.chunks_mut(width).zip(x.chunks(width)) {
            let (first, rest) = x.split_at(pairs);
            let (second, rest) = rest.split_at(pairs);
            let (out_first, out_rest) = out.split_at_mut(pairs);
            let (out_second, out_rest) = out_rest.split_at_mut(pairs);
            for i in 0..pairs {
                out_first[i] = first[i] * cos[i] - second[i] * sin[i];
                out_second[i] = second[i] * cos[i] + first[i] * sin[i];
            }
            out_rest.copy_from_slice(rest);
        }
    });
    Some(tensor(output, [batch, seq, heads, width]))
}

pub(super) fn sum_of_squares(x: &Float) -> Option<Float> {
    let squares = |chunk: &[f32]| dot(chunk, chunk);
    let sums: Vec<f32> = x.as_slice::<f32>()?.par_chunks(CHUNK).map(squares).collect();
    Some(tensor(vec![sums.iter().sum::<f32>()], [1]))
}

pub(super) fn adamw_update(
    [param, moment_1, moment_2]: [&mut Float; 3],
    grad: &Float,
    step: &AdamWStep,
) -> Option<()> {
    if ![&*param, &*moment_1, &*moment_2].into_iter().all(owns_whole_buffer) {
        return None;
    }
    let grads = grad.as_slice::<f32>()?;
    let [correction_1, correction_2] = step.bias_corrections();
    let [scale, beta_1, beta_2, epsilon, decay, rate, correction_2] = [
        step.gradient_scale,
        step.beta_1,
        step.beta_2,
        step.epsilon,
        1.0 - step.learning_rate * step.weight_decay,
        step.learning_rate / correction_1,
        1.0 / correction_2,
    ]
    .map(|x| x as f32);
    let values = param.storage_mut::<f32>().par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK));
    let firsts = moment_1.storage_mut::<f32>().par_chunks_mut(CHUNK);
    let moments = firsts.zip(moment_2.storage_mut::<f32>().par_chunks_mut(CHUNK));
    values.zip(moments).for_each(|((values, grads), (firsts, seconds))| {
        vectorised(
            #[inline(always)]
            || {
                let values = values.iter_mut().zip(grads);
                for (((value, grad), first), second) in values.zip(firsts).zip(seconds) {
                    let grad = grad * scale;
                    *first = *first * beta_1 + grad * (1.0 - beta_1);
                    *second = *second * beta_2 + grad * grad * (1.0 - beta_2);
                    let root = (*second * correction_2).sqrt() + epsilon;
                    *value = *value * decay - rate * *first / root;
                }
            },
        );
    });
    Some(())
}

fn owns_whole_buffer(tensor: &Float) -> bool {
    let elements = tensor.shape().num_elements();
    tensor.as_slice::<f32>().is_some_and(|slice| slice.len() == elements)
        && tensor.bytes().len() == elements * size_of::<f32>()
}
