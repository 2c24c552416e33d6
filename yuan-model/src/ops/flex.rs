//! Fast versions for `flex` on a CPU: one pass over memory, all cores.

use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{DType, Shape};
use rayon::prelude::*;

use super::{AdamWStep, YuanOps, portable};

/// Elements that one task takes: large enough to hide its cost, small enough for the cache.
const CHUNK: usize = 1 << 14;

impl YuanOps for Flex {
    fn swiglu(gate_up: FloatTensor<Self>) -> FloatTensor<Self> {
        let Some(input) = gate_up.as_slice::<f32>() else {
            return portable::swiglu::<Self>(gate_up);
        };
        let [rows, width] = gate_up.shape().dims();
        let mut output = zeros(rows, width / 2);
        let out = output.storage_mut::<f32>();
        out.par_chunks_mut((width / 2).max(1)).zip(input.par_chunks(width.max(1))).for_each(|(out, row)| {
            let (gate, up) = row.split_at(row.len() / 2);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * sigmoid(*gate) * up;
            }
        });
        output
    }

    fn swiglu_backward(gate_up: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let slices = (gate_up.as_slice::<f32>(), grad.as_slice::<f32>());
        let (Some(input), Some(grads)) = slices else {
            return portable::swiglu_backward::<Self>(gate_up, grad);
        };
        let [rows, width] = gate_up.shape().dims();
        let mut output = zeros(rows, width);
        let out = output.storage_mut::<f32>();
        let rows = out.par_chunks_mut(width.max(1)).zip(input.par_chunks(width.max(1)));
        rows.zip(grads.par_chunks((width / 2).max(1))).for_each(|((out, row), grad)| {
            let (gate, up) = row.split_at(row.len() / 2);
            let (d_gate, d_up) = out.split_at_mut(gate.len());
            for (i, grad) in grad.iter().enumerate() {
                let s = sigmoid(gate[i]);
                d_gate[i] = grad * up[i] * s * (1.0 + gate[i] * (1.0 - s));
                d_up[i] = grad * gate[i] * s;
            }
        });
        output
    }

    fn adamw_update(
        mut param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        mut moment_1: FloatTensor<Self>,
        mut moment_2: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let whole = [&param, &moment_1, &moment_2].iter().all(|tensor| owns_whole_buffer(tensor));
        let Some(grads) = grad.as_slice::<f32>().filter(|_| whole) else {
            return portable::adamw_update::<Self>(param, grad, moment_1, moment_2, &step);
        };
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
        let moments = moment_1.storage_mut::<f32>().par_chunks_mut(CHUNK);
        let moments = moments.zip(moment_2.storage_mut::<f32>().par_chunks_mut(CHUNK));
        values.zip(moments).for_each(|((values, grads), (firsts, seconds))| {
            for (((value, grad), first), second) in values.iter_mut().zip(grads).zip(firsts).zip(seconds) {
                let grad = grad * scale;
                *first = *first * beta_1 + grad * (1.0 - beta_1);
                *second = *second * beta_2 + grad * grad * (1.0 - beta_2);
                *value = *value * decay - rate * *first / ((*second * correction_2).sqrt() + epsilon);
            }
        });
        (param, moment_1, moment_2)
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn owns_whole_buffer(tensor: &FloatTensor<Flex>) -> bool {
    let elements = tensor.shape().num_elements();
    tensor.as_slice::<f32>().is_some_and(|slice| slice.len() == elements)
        && tensor.bytes().len() == elements * size_of::<f32>()
}

fn zeros(rows: usize, width: usize) -> FloatTensor<Flex> {
    FloatTensor::<Flex>::zeros(Shape::from([rows, width]), DType::F32)
}
