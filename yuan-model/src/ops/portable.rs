//! Every operation in terms of Burn's own: what the fast versions are tested against.

use burn::backend::TensorMetadata;
use burn::backend::{Backend, tensor::FloatTensor};
use burn::tensor::{FloatDType, Shape, Slice};

use super::AdamWStep;

/// A product per group on its slice of rows; empty groups cost nothing.
pub fn grouped_matmul<B: Backend>(
    rows: FloatTensor<B>,
    weight: FloatTensor<B>,
    rows_per_group: &[usize],
) -> FloatTensor<B> {
    let (d_in, d_out) = (weight.shape()[1], weight.shape()[2]);
    let products: Vec<_> = groups(rows_per_group)
        .map(|(group, range)| {
            let weight = B::float_slice(weight.clone(), &[index(group), Slice::full(), Slice::full()]);
            let weight = B::float_reshape(weight, Shape::from([d_in, d_out]));
            B::float_matmul(B::float_slice(rows.clone(), &[range, Slice::full()]), weight)
        })
        .collect();
    if products.is_empty() {
        let (device, dtype) = (rows.device(), FloatDType::from(rows.dtype()));
        return B::float_zeros(Shape::from([0, d_out]), &device, dtype);
    }
    B::float_cat(products, 0)
}

/// `rowsᵀ · grad` of every group, stacked; zero where a group has no rows.
pub fn grouped_matmul_weight_backward<B: Backend>(
    rows: FloatTensor<B>,
    grad: FloatTensor<B>,
    rows_per_group: &[usize],
) -> FloatTensor<B> {
    let (d_in, d_out) = (rows.shape()[1], grad.shape()[1]);
    let (device, dtype) = (rows.device(), FloatDType::from(rows.dtype()));
    let shape = Shape::from([1, d_in, d_out]);
    let mut products = Vec::with_capacity(rows_per_group.len());
    let mut start = 0;
    for &count in rows_per_group {
        if count == 0 {
            products.push(B::float_zeros(shape.clone(), &device, dtype));
            continue;
        }
        let range = [Slice::from(start..start + count), Slice::full()];
        let rows = B::float_transpose(B::float_slice(rows.clone(), &range));
        let product = B::float_matmul(rows, B::float_slice(grad.clone(), &range));
        products.push(B::float_reshape(product, shape.clone()));
        start += count;
    }
    B::float_cat(products, 0)
}

/// `silu(gate) ⊙ up`.
pub fn swiglu<B: Backend>(gate_up: FloatTensor<B>) -> FloatTensor<B> {
    let (gate, up) = halves::<B>(gate_up);
    let sigmoid = B::sigmoid(gate.clone());
    B::float_mul(B::float_mul(gate, sigmoid), up)
}

/// With `s = σ(gate)`: `d gate = grad ⊙ up ⊙ s (1 + gate (1 − s))`, `d up = grad ⊙ gate ⊙ s`.
pub fn swiglu_backward<B: Backend>(gate_up: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let (gate, up) = halves::<B>(gate_up);
    let sigmoid = B::sigmoid(gate.clone());
    let silu = B::float_mul(gate.clone(), sigmoid.clone());
    let one_minus = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1.0.into());
    let slope = B::float_mul(sigmoid, B::float_add_scalar(B::float_mul(gate, one_minus), 1.0.into()));
    let d_gate = B::float_mul(B::float_mul(grad.clone(), up), slope);
    let d_up = B::float_mul(grad, silu);
    B::float_cat(vec![d_gate, d_up], 1)
}

/// AdamW as in Loshchilov and Hutter, "Decoupled Weight Decay Regularization", Algorithm 2.
pub fn adamw_update<B: Backend>(
    param: FloatTensor<B>,
    grad: FloatTensor<B>,
    moment_1: FloatTensor<B>,
    moment_2: FloatTensor<B>,
    step: &AdamWStep,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let scale = |tensor, by: f64| B::float_mul_scalar(tensor, by.into());
    let grad = scale(grad, step.gradient_scale);
    let squared = B::float_mul(grad.clone(), grad.clone());
    let moment_1 = B::float_add(scale(moment_1, step.beta_1), scale(grad, 1.0 - step.beta_1));
    let moment_2 = B::float_add(scale(moment_2, step.beta_2), scale(squared, 1.0 - step.beta_2));
    let [correction_1, correction_2] = step.bias_corrections();
    let root = B::float_sqrt(scale(moment_2.clone(), 1.0 / correction_2));
    let denominator = B::float_add_scalar(root, step.epsilon.into());
    let update = B::float_div(scale(moment_1.clone(), step.learning_rate / correction_1), denominator);
    let param = scale(param, 1.0 - step.learning_rate * step.weight_decay);
    (B::float_sub(param, update), moment_1, moment_2)
}

impl AdamWStep {
    /// `1 − β₁ᵗ` and `1 − β₂ᵗ`.
    pub(crate) fn bias_corrections(&self) -> [f64; 2] {
        [self.beta_1, self.beta_2].map(|beta| 1.0 - beta.powf(self.step as f64))
    }
}

fn halves<B: Backend>(gate_up: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let width = gate_up.shape()[1];
    let columns = |range: std::ops::Range<usize>| [Slice::full(), Slice::from(range)];
    let gate = B::float_slice(gate_up.clone(), &columns(0..width / 2));
    (gate, B::float_slice(gate_up, &columns(width / 2..width)))
}

/// Index and row range of every group that has rows.
fn groups(rows_per_group: &[usize]) -> impl Iterator<Item = (usize, Slice)> + '_ {
    let starts = rows_per_group.iter().scan(0, |start, &count| {
        *start += count;
        Some((*start - count)..*start)
    });
    starts
        .enumerate()
        .filter(|(_, range)| !range.is_empty())
        .map(|(group, range)| (group, Slice::from(range)))
}

fn index(group: usize) -> Slice {
    Slice::from(group..group + 1)
}
