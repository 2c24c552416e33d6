//! The optimizer's passes over parameters: each reads and writes memory once.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl_environment::stream::StreamId;

use super::{
    kernels::{Arg, Kernel, KernelFile},
    queue::run,
    tensors::{contiguous, empty},
};
use crate::ops::AdamWStep;

const THREADS: usize = 256;
/// Enough blocks to fill the card; each thread takes many elements.
const BLOCKS: usize = 132 * 8;

fn kernel(name: &'static str) -> Kernel {
    Kernel::new(KernelFile::Optimizer, name, false)
}

fn elements(tensor: &CubeTensor) -> usize {
    tensor.meta.shape().num_elements()
}

pub(super) fn sum_of_squares(x: CubeTensor) -> CubeTensor {
    let x = contiguous(x);
    let count = elements(&x);
    let blocks = count.div_ceil(THREADS).clamp(1, BLOCKS);
    let (partial, sum) = (empty(&x, [blocks], DType::F32), empty(&x, [1], DType::F32));
    run([&x, &partial, &sum], move |lanes, pointers| {
        let [x, partial, sum] = pointers.map(Arg::Pointer);
        lanes.launch(
            kernel("squares"),
            [blocks, 1],
            THREADS,
            0,
            &[x, partial, Arg::Long(count)],
        )?;
        lanes.launch(kernel("total"), [1, 1], 1024, 0, &[partial, sum, Arg::Int(blocks)])
    });
    sum
}

/// In place where nobody else holds a tensor.
pub(super) fn adamw(
    param: CubeTensor,
    grad: CubeTensor,
    moment_1: CubeTensor,
    moment_2: CubeTensor,
    step: &AdamWStep,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [param, grad, moment_1, moment_2] = [param, grad, moment_1, moment_2].map(contiguous);
    // Readers on the stream of another thread would not know that it was written on this one.
    let is_own = |tensor: &CubeTensor| tensor.handle.stream == StreamId::current();
    let target = |tensor: &CubeTensor| match tensor.handle.can_mut() && is_own(tensor) {
        true => tensor.clone(),
        false => empty(tensor, tensor.meta.shape().clone(), DType::F32),
    };
    let out = [target(&param), target(&moment_1), target(&moment_2)];
    let count = elements(&param);
    let (step, [correction_1, correction_2]) = (*step, step.bias_corrections());
    let tensors = [&param, &grad, &moment_1, &moment_2, &out[0], &out[1], &out[2]];
    run(tensors, move |lanes, pointers| {
        let numbers = [
            step.gradient_scale,
            step.beta_1,
            step.beta_2,
            1.0 - step.learning_rate * step.weight_decay,
            step.learning_rate / correction_1,
            1.0 / correction_2,
            step.epsilon,
        ];
        let [param, grad, m1, m2, to_param, to_m1, to_m2] = pointers.map(Arg::Pointer);
        let places = [param, grad, m1, m2, to_param, to_m1, to_m2, Arg::Long(count)];
        let args = [&places[..], &numbers.map(Arg::Float)].concat();
        lanes.launch(kernel("adamw"), [count.div_ceil(THREADS).min(BLOCKS), 1], THREADS, 0, &args)
    });
    let [param, moment_1, moment_2] = out;
    (param, moment_1, moment_2)
}
