//! Fast versions for CUDA: products by cuBLAS, and kernels around them.
//!
//! The kernels are CUDA C++ that NVRTC, which CubeCL loads anyway, compiles at their first use, for
//! f32 and for bf16 activations. They read and write CubeCL's memory in place ([`queue`]). What
//! they do not take (another type, a width that is no multiple of eight, a machine without NVRTC or
//! cuBLASLt) goes the portable way.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, FloatDType};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use std::{ops::Range, sync::Arc};

use super::{
    AdamWStep, HostCounts, RowsToRanks, TensorList, YuanOps, host::HostMemory, packed, parts::part,
    portable,
};
use crate::ranks::Communicator;

mod attention;
mod blas;
mod context;
mod dispatch;
mod elementwise;
mod failure;
mod flash;
mod kernels;
mod nccl;
mod optimizer;
mod pinned;
mod products;
mod queue;
mod readback;
mod rows;
mod tensors;
mod tower;

use attention::Mask;
use nccl::{Half, Nccl, Way};
use tensors::{VECTOR, has_fast_rows, is_fast};

type Tensor = CubeTensor;

/// Indices as the kernels read them.
fn is_index(tensor: &Tensor) -> bool {
    tensor.dtype == DType::I32
}

fn is_f32(tensor: &Tensor) -> bool {
    tensor.dtype == DType::F32
}

/// Whether half of the last axis is a whole number of vectors.
fn has_fast_halves(tensor: &Tensor) -> bool {
    is_fast(tensor)
        && tensor.meta.shape().last().is_some_and(|width| width.is_multiple_of(2 * VECTOR))
}

/// NCCL for a group of ranks, if it can be used for tensors of this kind.
fn on_nccl(tensor: &Tensor, group: &Communicator, way: Way) -> Option<Arc<Nccl>> {
    // The same on all ranks, which therefore take the same way.
    if !tensors::is_cuda(tensor) || nccl::kind(tensor.dtype).is_none() {
        return None;
    }
    nccl::of_group(group, tensor, way)
}

fn same_type(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype == tensors[0].dtype)
}

fn takes_attention(tensors: &[&Tensor], first_keys: Option<&Tensor>) -> bool {
    is_fast(tensors[0]) && same_type(tensors) && first_keys.is_none_or(is_index)
}

impl YuanOps for CubeBackend {
    fn all_to_all(rows: Tensor, to: RowsToRanks) -> Tensor {
        match on_nccl(&rows, &to.group, Way::Main) {
            Some(nccl) => nccl::all_to_all(nccl, rows, &to),
            None => portable::all_to_all::<Self>(rows, &to),
        }
    }

    fn sum_over_ranks(x: Tensor, group: Communicator) -> Tensor {
        match on_nccl(&x, &group, Way::Main) {
            Some(nccl) => nccl::all_reduce(nccl, x),
            None => portable::all_reduce::<Self>(x, &group),
        }
    }

    fn reduce_scatter(tensors: TensorList<Self>, group: Communicator) -> TensorList<Self> {
        TensorList(match on_nccl(&tensors.0[0], &group, Way::Beside) {
            Some(nccl) => nccl::half(nccl, tensors.0, group.size(), Half::ReduceScatter),
            None => portable::reduce_scatter::<Self>(tensors.0, &group),
        })
    }

    fn arrived(list: TensorList<Self>) -> TensorList<Self> {
        if tensors::is_cuda(&list.0[0]) {
            nccl::arrived(&list.0[0]);
        }
        list
    }

    fn all_gather(tensors: TensorList<Self>, group: Communicator) -> TensorList<Self> {
        TensorList(match on_nccl(&tensors.0[0], &group, Way::Beside) {
            Some(nccl) => nccl::half(nccl, tensors.0, group.size(), Half::AllGather),
            None => portable::all_gather::<Self>(tensors.0, &group),
        })
    }

    fn dense(rows: Tensor, weight: Tensor) -> Tensor {
        if is_fast(&rows) && same_type(&[&rows, &weight]) {
            return products::product(rows, weight);
        }
        portable::dense::<Self>(rows, weight)
    }

    fn dense_weight_backward(rows: Tensor, grad: Tensor) -> Tensor {
        if is_fast(&rows) && same_type(&[&rows, &grad]) {
            return products::weight_gradient(rows, grad);
        }
        portable::dense_weight_backward::<Self>(rows, grad)
    }

    fn embed(weight: Tensor, ids: Tensor, dtype: FloatDType) -> Tensor {
        let known = matches!(dtype, FloatDType::F32 | FloatDType::BF16);
        if has_fast_rows(&weight) && is_f32(&weight) && is_index(&ids) && known {
            return rows::embed(weight, ids, dtype.into());
        }
        portable::embed::<Self>(weight, ids, dtype)
    }

    fn embed_backward(grad: Tensor, ids: Tensor, vocab: usize) -> Tensor {
        if has_fast_rows(&grad) && is_index(&ids) && vocab <= dispatch::MOST_SORTED {
            return rows::embed_backward(grad, ids, vocab);
        }
        portable::embed_backward::<Self>(grad, ids, vocab)
    }

    fn grouped_matmul(rows: Tensor, weight: Tensor, rows_per_group: Vec<usize>) -> Tensor {
        if is_fast(&rows) && same_type(&[&rows, &weight]) {
            return products::grouped(rows, weight, rows_per_group);
        }
        portable::grouped_matmul::<Self>(rows, weight, &rows_per_group)
    }

    fn grouped_matmul_weight_backward(
        rows: Tensor,
        grad: Tensor,
        rows_per_group: Vec<usize>,
    ) -> Tensor {
        if is_fast(&rows) && same_type(&[&rows, &grad]) {
            return products::grouped_weight_gradient(rows, grad, rows_per_group);
        }
        portable::grouped_matmul_weight_backward::<Self>(rows, grad, &rows_per_group)
    }

    fn swiglu(gate_up: Tensor) -> Tensor {
        if has_fast_halves(&gate_up) {
            return elementwise::swiglu(gate_up);
        }
        portable::swiglu::<Self>(gate_up)
    }

    fn swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor {
        if has_fast_halves(&gate_up) && same_type(&[&gate_up, &grad]) {
            return elementwise::swiglu_backward(gate_up, grad);
        }
        portable::swiglu_backward::<Self>(gate_up, grad)
    }

    fn gather_rows(source: Tensor, rows: Tensor, _inverse: Tensor, _copies: usize) -> Tensor {
        if has_fast_rows(&source) && is_index(&rows) {
            return rows::gather(source, rows);
        }
        portable::gather_rows::<Self>(source, rows)
    }

    fn gather_rows_backward(grad: Tensor, inverse: Tensor, copies: usize) -> Tensor {
        if has_fast_rows(&grad) && is_index(&inverse) {
            return rows::gather_sum(grad, inverse, copies);
        }
        portable::gather_rows_backward::<Self>(grad, inverse, copies)
    }

    fn combine_rows(
        rows: Tensor,
        weights: Tensor,
        row_of_pair: Tensor,
        _pair_of_row: Tensor,
    ) -> Tensor {
        if has_fast_rows(&rows) && same_type(&[&rows, &weights]) && is_index(&row_of_pair) {
            return rows::combine(rows, weights, row_of_pair);
        }
        portable::combine_rows::<Self>(rows, weights, row_of_pair)
    }

    fn combine_rows_backward(
        rows: Tensor,
        weights: Tensor,
        row_of_pair: Tensor,
        pair_of_row: Tensor,
        grad: Tensor,
    ) -> (Tensor, Tensor) {
        if has_fast_rows(&rows) && same_type(&[&rows, &weights, &grad]) && is_index(&row_of_pair) {
            return rows::combine_backward(rows, weights, row_of_pair, grad);
        }
        portable::combine_rows_backward::<Self>(rows, weights, row_of_pair, pair_of_row, grad)
    }

    fn rms_norm(x: Tensor, weight: Tensor, epsilon: f64) -> Tensor {
        if has_fast_rows(&x) && is_f32(&weight) {
            return rows::rms_norm(x, weight, epsilon);
        }
        portable::rms_norm::<Self>(x, weight, epsilon)
    }

    fn rms_norm_backward(
        x: Tensor,
        weight: Tensor,
        grad: Tensor,
        epsilon: f64,
    ) -> (Tensor, Tensor) {
        let fits = weight.meta.shape().num_elements() <= rows::WIDEST_NORM;
        if has_fast_rows(&x) && fits && is_f32(&weight) && same_type(&[&x, &grad]) {
            return rows::rms_norm_backward(x, weight, grad, epsilon);
        }
        portable::rms_norm_backward::<Self>(x, weight, grad, epsilon)
    }

    fn add_previous(taps: Tensor) -> Tensor {
        if has_fast_halves(&taps) {
            return elementwise::add_previous(taps);
        }
        portable::add_previous::<Self>(taps)
    }

    fn add_previous_backward(grad: Tensor) -> Tensor {
        if has_fast_rows(&grad) {
            return elementwise::add_previous_backward(grad);
        }
        portable::add_previous_backward::<Self>(grad)
    }

    fn rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor {
        if is_fast(&x) && same_type(&[&x, &cos, &sin]) && elementwise::can_rotate(&x, &cos) {
            return elementwise::rotate(x, cos, sin);
        }
        portable::rotate::<Self>(x, cos, sin)
    }

    fn rotate_pair(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor {
        let fast = |x: &Tensor| {
            is_fast(x) && same_type(&[x, &cos, &sin]) && elementwise::can_rotate(x, &cos)
        };
        if fast(&first) && fast(&second) {
            return elementwise::rotate_pair([first, second], cos, sin);
        }
        portable::rotate_pair::<Self>(first, second, cos, sin)
    }

    fn causal_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first_keys: Tensor,
    ) -> (Tensor, Tensor) {
        let first_keys = packed(first_keys);
        if !takes_attention(&[&query, &key, &value], first_keys.as_ref()) {
            return portable::causal_attention::<Self>(query, key, value, first_keys);
        }
        if flash::takes(&query) {
            return flash::forward(query, key, value, first_keys, Mask::Causal);
        }
        let nothing = tensors::empty(&query, [1], DType::F32);
        (attention::forward(query, key, value, first_keys, Mask::Causal), nothing)
    }

    fn cached_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: usize,
        first_keys: Vec<usize>,
    ) -> Tensor {
        if takes_attention(&[&query, &key, &value], None) {
            return attention::cached(query, key, value, length, &first_keys);
        }
        portable::cached_attention::<Self>(query, key, value, length, &first_keys)
    }

    fn causal_attention_backward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first_keys: Tensor,
        output: Tensor,
        log_sums: Tensor,
        grad: Tensor,
    ) -> (Tensor, Tensor, Tensor) {
        let first_keys = packed(first_keys);
        if !takes_attention(&[&query, &key, &value, &grad], first_keys.as_ref()) {
            return portable::causal_attention_backward::<Self>(
                query, key, value, first_keys, grad,
            );
        }
        // Sums are there if the fast version was on when the output was made.
        if flash::takes(&query) && log_sums.meta.shape().len() == 3 {
            let known = [output, log_sums];
            return flash::backward([query, key, value], first_keys, known, grad, Mask::Causal);
        }
        attention::backward(query, key, value, first_keys, grad, Mask::Causal)
    }

    fn full_attention(qkv: Tensor, heads: usize) -> Tensor {
        if !is_fast(&qkv) {
            return portable::full_attention::<Self>(qkv, heads);
        }
        let [query, key, value] = portable::split_heads::<Self>(qkv, heads);
        portable::join_heads::<Self>(if flash::takes(&query) {
            flash::forward(query, key, value, None, Mask::None).0
        } else {
            attention::forward(query, key, value, None, Mask::None)
        })
    }

    fn full_attention_backward(qkv: Tensor, grad: Tensor, heads: usize) -> Tensor {
        if !is_fast(&qkv) || !same_type(&[&qkv, &grad]) {
            return portable::full_attention_backward::<Self>(qkv, grad, heads);
        }
        let [query, key, value] = portable::split_heads::<Self>(qkv, heads);
        let grad = portable::by_head::<Self>(grad, heads);
        let (d_query, d_key, d_value) = if flash::takes(&query) {
            let qkv = [query.clone(), key.clone(), value.clone()];
            let (out, log_sums) = flash::forward(query, key, value, None, Mask::None);
            flash::backward(qkv, None, [out, log_sums], grad, Mask::None)
        } else {
            attention::backward(query, key, value, None, grad, Mask::None)
        };
        let gradients = [d_query, d_key, d_value].map(portable::join_heads::<Self>);
        Self::float_cat(gradients.into(), 2)
    }

    fn cross_entropy(logits: Tensor, labels: Tensor) -> Tensor {
        if is_fast(&logits) && is_f32(&logits) && is_index(&labels) {
            return rows::cross_entropy(logits, labels);
        }
        portable::cross_entropy::<Self>(logits, labels)
    }

    fn cross_entropy_backward(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor {
        if is_fast(&logits) && is_f32(&logits) && is_f32(&grad) && is_index(&labels) {
            return rows::cross_entropy_backward(logits, labels, grad);
        }
        portable::cross_entropy_backward::<Self>(logits, labels, grad)
    }

    fn linear_cross_entropy(
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: f64,
        rows_at_once: usize,
    ) -> Tensor {
        if is_fast(&rows) && same_type(&[&rows, &weight]) && is_index(&labels) {
            return rows::linear_cross_entropy(rows, weight, labels, scale, rows_at_once);
        }
        portable::linear_cross_entropy::<Self>(rows, weight, labels, scale, rows_at_once)
    }

    fn linear_cross_entropy_backward(
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: f64,
        rows_at_once: usize,
        grad: Tensor,
    ) -> (Tensor, Tensor) {
        if is_fast(&rows) && same_type(&[&rows, &weight]) && is_index(&labels) && is_f32(&grad) {
            return rows::linear_cross_entropy_backward(
                rows,
                weight,
                labels,
                scale,
                rows_at_once,
                grad,
            );
        }
        portable::linear_cross_entropy_backward::<Self>(
            rows,
            weight,
            labels,
            scale,
            rows_at_once,
            grad,
        )
    }

    fn dispatch_order(experts: Tensor, num_experts: usize) -> (Tensor, Tensor, Tensor) {
        if dispatch::is_fast(&experts, num_experts) {
            return dispatch::order(experts, num_experts);
        }
        portable::dispatch_order::<Self>(experts, num_experts)
    }

    fn gather_counts(counts: Tensor, group: Communicator) -> Tensor {
        // The same on all ranks, which therefore take the same way.
        let nccl = match tensors::is_cuda(&counts) && is_index(&counts) {
            true => nccl::of_group(&group, &counts, Way::Main),
            false => None,
        };
        match nccl {
            Some(nccl) => nccl::gather_counts(nccl, counts, group.size()),
            None => {
                // They may be on their way to the host, where nobody asks for them any more.
                Self::read_counts(counts.clone());
                portable::gather_counts::<Self>(counts, &group)
            }
        }
    }

    fn arrival_order(
        counts: Tensor,
        num_experts: usize,
        experts: Range<usize>,
        arriving: usize,
    ) -> (Tensor, Tensor) {
        if dispatch::takes_arrivals(&counts, num_experts, &experts) {
            return dispatch::arrivals(counts, num_experts, experts, arriving);
        }
        portable::arrival_order::<Self>(counts, num_experts, experts, arriving)
    }

    fn host_memory(like: Tensor, bytes: usize) -> HostMemory {
        match tensors::is_cuda(&like) {
            true => pinned::reserve(&like, bytes),
            false => HostMemory(None),
        }
    }

    fn copy_to_host(x: Tensor, memory: HostMemory, at: usize) -> bool {
        pinned::copy(x, memory, at);
        true
    }

    fn wait_for_copies(like: Tensor) -> bool {
        pinned::wait(&like);
        true
    }

    fn read_counts(counts: Tensor) -> HostCounts {
        let experts = counts.meta.shape().num_elements();
        HostCounts(if dispatch::is_fast(&counts, experts) {
            dispatch::counts(&counts)
        } else {
            None
        })
    }

    fn layer_norm_rows(x: Tensor, weight: Tensor, bias: Tensor, epsilon: f64) -> Tensor {
        if has_fast_rows(&x) && is_f32(&weight) && is_f32(&bias) {
            return tower::layer_norm(x, weight, bias, epsilon);
        }
        portable::layer_norm::<Self>(x, weight, bias, epsilon)
    }

    fn layer_norm_rows_backward(
        x: Tensor,
        weight: Tensor,
        grad: Tensor,
        epsilon: f64,
    ) -> (Tensor, Tensor, Tensor) {
        let width = weight.meta.shape().num_elements();
        let fits = width <= rows::WIDEST_NORM;
        if has_fast_rows(&x) && fits && is_f32(&weight) && same_type(&[&x, &grad]) {
            let (d_x, sums) = tower::layer_norm_backward(x, weight, grad, epsilon);
            let d_weight = part::<Self>(sums.clone(), 0, 0..width);
            return (d_x, d_weight, part::<Self>(sums, 0, width..2 * width));
        }
        portable::layer_norm_backward::<Self>(x, weight, grad, epsilon).into()
    }

    fn gelu_rows(x: Tensor) -> Tensor {
        if has_fast_rows(&x) {
            return tower::gelu(x);
        }
        portable::gelu::<Self>(x)
    }

    fn gelu_rows_backward(x: Tensor, grad: Tensor) -> Tensor {
        if has_fast_rows(&x) && same_type(&[&x, &grad]) {
            return tower::gelu_backward(x, grad);
        }
        portable::gelu_backward::<Self>(x, grad)
    }

    fn add_bias(x: Tensor, bias: Tensor) -> Tensor {
        if has_fast_rows(&x) && same_type(&[&x, &bias]) {
            return tower::add_bias(x, bias);
        }
        portable::add_bias::<Self>(x, bias)
    }

    fn sum_rows(grad: Tensor) -> Tensor {
        if has_fast_rows(&grad) {
            let dtype = grad.dtype;
            return Self::float_cast(tower::sum_rows(grad), dtype.into());
        }
        portable::sum_rows::<Self>(grad)
    }

    fn add_scaled(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor {
        if has_fast_rows(&x) && same_type(&[&x, &branch, &scale]) {
            return tower::add_scaled(x, branch, scale);
        }
        portable::add_scaled::<Self>(x, branch, scale)
    }

    fn add_scaled_backward(branch: Tensor, scale: Tensor, grad: Tensor) -> (Tensor, Tensor) {
        if has_fast_rows(&branch) && same_type(&[&branch, &scale, &grad]) {
            let dtype = scale.dtype;
            let (d_branch, d_scale) = tower::add_scaled_backward(branch, scale, grad);
            return (d_branch, Self::float_cast(d_scale, dtype.into()));
        }
        portable::add_scaled_backward::<Self>(branch, scale, grad).into()
    }

    fn sum_of_squares(x: Tensor) -> Tensor {
        if is_fast(&x) && is_f32(&x) {
            return optimizer::sum_of_squares(x);
        }
        portable::sum_of_squares::<Self>(x)
    }

    fn adamw_update(
        param: Tensor,
        grad: Tensor,
        moment_1: Tensor,
        moment_2: Tensor,
        step: AdamWStep,
    ) -> (Tensor, Tensor, Tensor) {
        if is_fast(&param) && is_f32(&param) && same_type(&[&param, &grad, &moment_1, &moment_2]) {
            return optimizer::adamw(param, grad, moment_1, moment_2, &step);
        }
        portable::adamw_update::<Self>(param, grad, moment_1, moment_2, &step)
    }
}
