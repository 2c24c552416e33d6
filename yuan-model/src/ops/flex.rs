//! Fast versions for `flex` on a CPU: one pass over memory, all cores.
//!
//! Anything but contiguous `f32` falls back to the portable form. Sums are split at fixed
//! places, so results do not depend on the number of threads.

use burn::backend::{
    Flex, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, TensorData};

use super::{AdamWStep, YuanOps, fast_paths, packed, portable};

mod attention;
mod elementwise;
mod full;
mod grouped;
mod matrix;
mod numeric;
mod rows;
mod tower;

use matrix::Matrix;

type Float = FloatTensor<Flex>;
type Int = IntTensor<Flex>;

/// What the kernels take.
fn is_fast(tensor: &Float) -> bool {
    fast_paths() && tensor.dtype() == DType::F32
}

/// Tries a fast version; it declines what it does not take.
fn fast<T>(version: impl FnOnce() -> Option<T>) -> Option<T> {
    if fast_paths() { version() } else { None }
}

impl YuanOps for Flex {
    fn dense(rows: Float, weight: Float) -> Float {
        if !is_fast(&rows) || !is_fast(&weight) {
            return portable::dense::<Self>(rows, weight);
        }
        product(Matrix::of(&rows, []), Matrix::of(&weight, []))
    }

    fn dense_weight_backward(rows: Float, grad: Float) -> Float {
        if !is_fast(&rows) || !is_fast(&grad) {
            return portable::dense_weight_backward::<Self>(rows, grad);
        }
        product(Matrix::of(&rows, []).transposed(), Matrix::of(&grad, []))
    }

    fn grouped_matmul(rows: Float, weight: Float, rows_per_group: Vec<usize>) -> Float {
        if !is_fast(&rows) {
            return portable::grouped_matmul::<Self>(rows, weight, &rows_per_group);
        }
        grouped::product(&rows, &weight, &rows_per_group)
    }

    fn grouped_matmul_weight_backward(
        rows: Float,
        grad: Float,
        rows_per_group: Vec<usize>,
    ) -> Float {
        if !is_fast(&rows) {
            return portable::grouped_matmul_weight_backward::<Self>(rows, grad, &rows_per_group);
        }
        grouped::weight_gradient(&rows, &grad, &rows_per_group)
    }

    fn swiglu(gate_up: Float) -> Float {
        fast(|| elementwise::swiglu(&gate_up)).unwrap_or_else(|| portable::swiglu::<Self>(gate_up))
    }

    fn swiglu_backward(gate_up: Float, grad: Float) -> Float {
        let fast = fast(|| elementwise::swiglu_backward(&gate_up, &grad));
        fast.unwrap_or_else(|| portable::swiglu_backward::<Self>(gate_up, grad))
    }

    fn gather_rows(source: Float, rows: Int, _inverse: Int, _copies: usize) -> Float {
        fast(|| rows::gather(&source, &rows))
            .unwrap_or_else(|| portable::gather_rows::<Self>(source, rows))
    }

    fn gather_rows_backward(grad: Float, inverse: Int, copies: usize) -> Float {
        let fast = fast(|| rows::gather_sum(&grad, &inverse, copies));
        fast.unwrap_or_else(|| portable::gather_rows_backward::<Self>(grad, inverse, copies))
    }

    fn combine_rows(rows: Float, weights: Float, row_of_pair: Int, _pair_of_row: Int) -> Float {
        let fast = fast(|| rows::combine(&rows, &weights, &row_of_pair));
        fast.unwrap_or_else(|| portable::combine_rows::<Self>(rows, weights, row_of_pair))
    }

    fn combine_rows_backward(
        rows: Float,
        weights: Float,
        row_of_pair: Int,
        pair_of_row: Int,
        grad: Float,
    ) -> (Float, Float) {
        let fast =
            fast(|| rows::combine_backward(&rows, &weights, &row_of_pair, &pair_of_row, &grad));
        fast.unwrap_or_else(|| {
            portable::combine_rows_backward::<Self>(rows, weights, row_of_pair, pair_of_row, grad)
        })
    }

    fn rms_norm(x: Float, weight: Float, epsilon: f64) -> Float {
        fast(|| rows::rms_norm(&x, &weight, epsilon))
            .unwrap_or_else(|| portable::rms_norm::<Self>(x, weight, epsilon))
    }

    fn rms_norm_backward(x: Float, weight: Float, grad: Float, epsilon: f64) -> (Float, Float) {
        let fast = fast(|| rows::rms_norm_backward(&x, &weight, &grad, epsilon));
        fast.unwrap_or_else(|| portable::rms_norm_backward::<Self>(x, weight, grad, epsilon))
    }

    fn add_previous(taps: Float) -> Float {
        fast(|| elementwise::add_previous(&taps))
            .unwrap_or_else(|| portable::add_previous::<Self>(taps))
    }

    fn add_previous_backward(grad: Float) -> Float {
        let fast = fast(|| elementwise::add_previous_backward(&grad));
        fast.unwrap_or_else(|| portable::add_previous_backward::<Self>(grad))
    }

    fn rotate(x: Float, cos: Float, sin: Float) -> Float {
        // Queries and keys are parts of one product, so they come strided.
        let x = x.to_contiguous();
        fast(|| elementwise::rotate(&x, &cos, &sin))
            .unwrap_or_else(|| portable::rotate::<Self>(x, cos, sin))
    }

    fn causal_attention(query: Float, key: Float, value: Float, first_keys: Int) -> (Float, Float) {
        let first_keys = packed(first_keys);
        if !is_fast(&query) || first_keys.is_some() {
            return portable::causal_attention::<Self>(query, key, value, first_keys);
        }
        let [batch, _, seq, _] = query.shape().dims();
        (attention::forward(&query, &key, &value, seq, &vec![0; batch]), tensor(vec![0.0], [1]))
    }

    fn cached_attention(
        query: Float,
        key: Float,
        value: Float,
        length: usize,
        first_keys: Vec<usize>,
    ) -> Float {
        if !is_fast(&query) {
            return portable::cached_attention::<Self>(query, key, value, length, &first_keys);
        }
        attention::forward(&query, &key, &value, length, &first_keys)
    }

    fn causal_attention_backward(
        query: Float,
        key: Float,
        value: Float,
        first_keys: Int,
        _output: Float,
        _log_sums: Float,
        grad: Float,
    ) -> (Float, Float, Float) {
        let first_keys = packed(first_keys);
        if !is_fast(&query) || first_keys.is_some() {
            return portable::causal_attention_backward::<Self>(
                query, key, value, first_keys, grad,
            );
        }
        attention::backward(&query, &key, &value, &grad)
    }

    fn full_attention(qkv: Float, heads: usize) -> Float {
        fast(|| full::forward(&qkv, heads))
            .unwrap_or_else(|| portable::full_attention::<Self>(qkv, heads))
    }

    fn full_attention_backward(qkv: Float, grad: Float, heads: usize) -> Float {
        fast(|| full::backward(&qkv, &grad, heads))
            .unwrap_or_else(|| portable::full_attention_backward::<Self>(qkv, grad, heads))
    }

    fn cross_entropy(logits: Float, labels: Int) -> Float {
        let fast = fast(|| rows::cross_entropy(&logits, &labels));
        fast.unwrap_or_else(|| portable::cross_entropy::<Self>(logits, labels))
    }

    fn cross_entropy_backward(logits: Float, labels: Int, grad: Float) -> Float {
        let fast = fast(|| rows::cross_entropy_backward(&logits, &labels, &grad));
        fast.unwrap_or_else(|| portable::cross_entropy_backward::<Self>(logits, labels, grad))
    }

    fn layer_norm_rows(x: Float, weight: Float, bias: Float, epsilon: f64) -> Float {
        fast(|| tower::layer_norm(&x, &weight, &bias, epsilon))
            .unwrap_or_else(|| portable::layer_norm::<Self>(x, weight, bias, epsilon))
    }

    fn layer_norm_rows_backward(
        x: Float,
        weight: Float,
        grad: Float,
        epsilon: f64,
    ) -> (Float, Float, Float) {
        let fast = fast(|| tower::layer_norm_backward(&x, &weight, &grad, epsilon));
        fast.unwrap_or_else(|| portable::layer_norm_backward::<Self>(x, weight, grad, epsilon))
            .into()
    }

    fn gelu_rows(x: Float) -> Float {
        fast(|| tower::gelu(&x)).unwrap_or_else(|| portable::gelu::<Self>(x))
    }

    fn gelu_rows_backward(x: Float, grad: Float) -> Float {
        fast(|| tower::gelu_backward(&x, &grad))
            .unwrap_or_else(|| portable::gelu_backward::<Self>(x, grad))
    }

    fn add_bias(x: Float, bias: Float) -> Float {
        fast(|| tower::add_bias(&x, &bias)).unwrap_or_else(|| portable::add_bias::<Self>(x, bias))
    }

    fn sum_rows(grad: Float) -> Float {
        fast(|| tower::sum_rows(&grad)).unwrap_or_else(|| portable::sum_rows::<Self>(grad))
    }

    fn add_scaled(x: Float, branch: Float, scale: Float) -> Float {
        fast(|| tower::add_scaled(&x, &branch, &scale))
            .unwrap_or_else(|| portable::add_scaled::<Self>(x, branch, scale))
    }

    fn add_scaled_backward(branch: Float, scale: Float, grad: Float) -> (Float, Float) {
        let fast = fast(|| tower::add_scaled_backward(&branch, &scale, &grad));
        fast.unwrap_or_else(|| portable::add_scaled_backward::<Self>(branch, scale, grad).into())
    }

    fn sum_of_squares(x: Float) -> Float {
        let x = x.to_contiguous();
        fast(|| elementwise::sum_of_squares(&x))
            .unwrap_or_else(|| portable::sum_of_squares::<Self>(x))
    }

    fn adamw_update(
        mut param: Float,
        grad: Float,
        mut moment_1: Float,
        mut moment_2: Float,
        step: AdamWStep,
    ) -> (Float, Float, Float) {
        let done = fast(|| {
            elementwise::adamw_update([&mut param, &mut moment_1, &mut moment_2], &grad, &step)
        });
        match done {
            Some(()) => (param, moment_1, moment_2),
            None => portable::adamw_update::<Self>(param, grad, moment_1, moment_2, &step),
        }
    }
}

/// A product as a tensor.
fn product(left: Matrix, right: Matrix) -> Float {
    let shape = [left.rows, right.columns];
    tensor(left.product(right), shape)
}

/// A tensor of these values.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Float {
    Float::from_data(TensorData::new(values, shape))
}

/// A tensor whose values are yet to be written. Burn's own empty tensor begins as bytes, which are
/// copied where they are not aligned.
fn empty<const D: usize>(shape: [usize; D]) -> Float {
    tensor(vec![0.0; shape.iter().product()], shape)
}

/// Indices in host memory, whatever their width.
fn indices(tensor: &Int) -> Option<Vec<usize>> {
    if let Some(values) = tensor.as_slice::<i64>() {
        return Some(values.iter().map(|&i| i as usize).collect());
    }
    tensor.as_slice::<i32>().map(|values| values.iter().map(|&i| i as usize).collect())
}
