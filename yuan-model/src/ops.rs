//! The seam: operations that matter for speed.
//!
//! The model calls the functions of this module and knows nothing beneath them. Every
//! operation has a [`portable`] form in terms of Burn's own operations, which is the truth
//! and runs on every backend, and may have fast forms in `flex` and `cuda`. Its gradient is
//! written by hand beside it (`step!`), and `autodiff` records it: Burn's own would
//! differentiate a slice of the stacked weights into a full-size tensor per expert, a cost
//! that grows with E².

#![cfg_attr(
    feature = "ndarray",
    allow(
        deprecated,
        reason = "users ask for ndarray, which upstream deprecates in favour of flex"
    )
)]
#![cfg_attr(
    not(any(feature = "flex", feature = "ndarray", feature = "wgpu", feature = "cuda")),
    allow(unused_variables, reason = "there is no backend to hand the arguments to")
)]

use burn::backend::{
    Backend, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::FloatDType;
use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

#[macro_use]
mod step;

mod attention;
mod autodiff;
mod backward;
mod collective;
#[cfg(feature = "cuda")]
mod cuda;
mod dense;
mod filter;
#[cfg(feature = "flex")]
mod flex;
pub mod host;
mod loss;
mod moe;
mod norm;
mod optimizer;
mod parts;
mod rotary;
mod tower;

/// The portable forms of all operations: the truth, which runs on every backend.
#[doc(hidden)]
pub mod portable {
    pub use super::{
        attention::portable::*, backward::portable::*, collective::portable::*, dense::portable::*,
        filter::portable::*, loss::portable::*, moe::portable::*, norm::portable::*,
        optimizer::portable::*, rotary::portable::*, tower::portable::*,
    };
}

pub use attention::{cached_attention, causal_attention, rotary_attention};
pub use backward::continue_backward;
pub use collective::{
    Arriving, RowsToRanks, TensorList, all_gather, all_reduce, all_to_all, gather_counts,
    reduce_scatter,
};
pub use dense::{dense, embed};
pub use filter::add_previous;
pub use loss::{cross_entropy, linear_cross_entropy};
pub use moe::{
    HostCounts, arrival_order, combine_rows, dispatch_order, gather_rows, grouped_matmul,
    read_counts, swiglu,
};
pub use norm::rms_norm;
pub use optimizer::{AdamWStep, adamw_update, sum_of_squares};
pub use rotary::rotate;
pub use tower::{add_bias, add_scaled, full_attention, gelu, layer_norm};

use crate::ranks::Communicator;
use attention::packed;
use host::HostMemory;

static FAST_PATHS: AtomicBool = AtomicBool::new(true);

/// Whether the fast versions are used where there are any; they are by default.
pub fn fast_paths() -> bool {
    FAST_PATHS.load(Ordering::Relaxed)
}

/// Turns the fast versions of the whole process on or off: off, every operation takes its portable
/// form, which tells whether a fast one is to blame for something.
pub fn set_fast_paths(on: bool) {
    FAST_PATHS.store(on, Ordering::Relaxed);
}

/// Operations that a backend may replace; the defaults are the portable forms.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Autodiff
)]
pub trait YuanOps: Backend {
    /// See [`all_to_all`].
    fn all_to_all(rows: FloatTensor<Self>, to: RowsToRanks) -> FloatTensor<Self> {
        portable::all_to_all::<Self>(rows, &to)
    }

    /// See [`all_reduce`].
    fn sum_over_ranks(x: FloatTensor<Self>, group: Communicator) -> FloatTensor<Self> {
        portable::all_reduce::<Self>(x, &group)
    }

    /// See [`reduce_scatter`].
    fn reduce_scatter(
        #[extension_type] tensors: TensorList<Self>,
        group: Communicator,
    ) -> TensorList<Self> {
        TensorList(portable::reduce_scatter::<Self>(tensors.0, &group))
    }

    /// Where tensors that were on their way are there: see [`Arriving`].
    fn arrived(#[extension_type] tensors: TensorList<Self>) -> TensorList<Self> {
        tensors
    }

    /// See [`continue_backward`].
    fn continue_backward(x: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::continue_backward::<Self>(x, gradient)
    }

    /// See [`all_gather`].
    fn all_gather(
        #[extension_type] tensors: TensorList<Self>,
        group: Communicator,
    ) -> TensorList<Self> {
        TensorList(portable::all_gather::<Self>(tensors.0, &group))
    }

    /// See [`dense`].
    fn dense(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::dense::<Self>(rows, weight)
    }

    /// Gradient of [`dense`] for its weight: `rowsᵀ · grad`, in their type or in f32.
    fn dense_weight_backward(
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::dense_weight_backward::<Self>(rows, grad)
    }

    /// See [`embed`].
    fn embed(
        weight: FloatTensor<Self>,
        ids: IntTensor<Self>,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        portable::embed::<Self>(weight, ids, dtype)
    }

    /// Gradient of [`embed`] for its weight of `vocab` rows, in f32.
    fn embed_backward(
        grad: FloatTensor<Self>,
        ids: IntTensor<Self>,
        vocab: usize,
    ) -> FloatTensor<Self> {
        portable::embed_backward::<Self>(grad, ids, vocab)
    }

    /// See [`grouped_matmul`].
    fn grouped_matmul(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        rows_per_group: Vec<usize>,
    ) -> FloatTensor<Self> {
        portable::grouped_matmul::<Self>(rows, weight, &rows_per_group)
    }

    /// Gradient of [`grouped_matmul`] for the weights: `rowsᵀ · grad` of every group, in their type
    /// or in f32.
    fn grouped_matmul_weight_backward(
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        rows_per_group: Vec<usize>,
    ) -> FloatTensor<Self> {
        portable::grouped_matmul_weight_backward::<Self>(rows, grad, &rows_per_group)
    }

    /// See [`swiglu`].
    fn swiglu(gate_up: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::swiglu::<Self>(gate_up)
    }

    /// Gradient of [`swiglu`] for its input.
    fn swiglu_backward(gate_up: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::swiglu_backward::<Self>(gate_up, grad)
    }

    /// See [`gather_rows`].
    fn gather_rows(
        source: FloatTensor<Self>,
        rows: IntTensor<Self>,
        _inverse: IntTensor<Self>,
        _copies: usize,
    ) -> FloatTensor<Self> {
        portable::gather_rows::<Self>(source, rows)
    }

    /// Gradient of [`gather_rows`] for its source.
    fn gather_rows_backward(
        grad: FloatTensor<Self>,
        inverse: IntTensor<Self>,
        copies: usize,
    ) -> FloatTensor<Self> {
        portable::gather_rows_backward::<Self>(grad, inverse, copies)
    }

    /// See [`combine_rows`].
    fn combine_rows(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of_pair: IntTensor<Self>,
        _pair_of_row: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::combine_rows::<Self>(rows, weights, row_of_pair)
    }

    /// Gradients of [`combine_rows`] for the rows and for the weights.
    fn combine_rows_backward(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of_pair: IntTensor<Self>,
        pair_of_row: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::combine_rows_backward::<Self>(rows, weights, row_of_pair, pair_of_row, grad)
    }

    /// See [`rms_norm`].
    fn rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        portable::rms_norm::<Self>(x, weight, epsilon)
    }

    /// Gradients of [`rms_norm`] for its input and its weight.
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::rms_norm_backward::<Self>(x, weight, grad, epsilon)
    }

    /// See [`add_previous`].
    fn add_previous(taps: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::add_previous::<Self>(taps)
    }

    /// Gradient of [`add_previous`] for its input.
    fn add_previous_backward(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::add_previous_backward::<Self>(grad)
    }

    /// See [`rotate`].
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::rotate::<Self>(x, cos, sin)
    }

    /// [`rotate`] of two tensors, the results side by side in every head: `[batch, seq, heads, 2 ·
    /// head_dim]`.
    fn rotate_pair(
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::rotate_pair::<Self>(first, second, cos, sin)
    }

    /// See [`rotary_attention`]; `first_keys` is `[1, 1]` where no row is packed.
    fn rotary_attention(
        query_key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        first_keys: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let [query, key, value] = portable::rotated_heads::<Self>(query_key, value, cos, sin);
        Self::float_swap_dims(Self::causal_attention(query, key, value, first_keys).0, 1, 2)
    }

    /// See [`causal_attention`]; `first_keys` is `[1, 1]` where no row is packed. Also what the
    /// gradient may want to know again: the logarithms of the sums of every row's exponentials,
    /// `[batch, heads, seq]`, or nothing of use, `[1]`.
    fn causal_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        first_keys: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::causal_attention::<Self>(query, key, value, packed(first_keys))
    }

    /// See [`cached_attention`].
    fn cached_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        length: usize,
        first_keys: Vec<usize>,
    ) -> FloatTensor<Self> {
        portable::cached_attention::<Self>(query, key, value, length, &first_keys)
    }

    /// Gradients of [`causal_attention`] for queries, keys and values, given its output and what
    /// came with that.
    fn causal_attention_backward(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        first_keys: IntTensor<Self>,
        _output: FloatTensor<Self>,
        _log_sums: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        portable::causal_attention_backward::<Self>(query, key, value, packed(first_keys), grad)
    }

    /// See [`full_attention`].
    fn full_attention(qkv: FloatTensor<Self>, heads: usize) -> FloatTensor<Self> {
        portable::full_attention::<Self>(qkv, heads)
    }

    /// Gradient of [`full_attention`] for its input.
    fn full_attention_backward(
        qkv: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        heads: usize,
    ) -> FloatTensor<Self> {
        portable::full_attention_backward::<Self>(qkv, grad, heads)
    }

    /// See [`cross_entropy`].
    fn cross_entropy(logits: FloatTensor<Self>, labels: IntTensor<Self>) -> FloatTensor<Self> {
        portable::cross_entropy::<Self>(logits, labels)
    }

    /// Gradient of [`cross_entropy`] for the logits.
    fn cross_entropy_backward(
        logits: FloatTensor<Self>,
        labels: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::cross_entropy_backward::<Self>(logits, labels, grad)
    }

    /// See [`linear_cross_entropy`].
    fn linear_cross_entropy(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: IntTensor<Self>,
        scale: f64,
        rows_at_once: usize,
    ) -> FloatTensor<Self> {
        portable::linear_cross_entropy::<Self>(rows, weight, labels, scale, rows_at_once)
    }

    /// Gradients of [`linear_cross_entropy`] for its rows and its weight.
    fn linear_cross_entropy_backward(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: IntTensor<Self>,
        scale: f64,
        rows_at_once: usize,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::linear_cross_entropy_backward::<Self>(
            rows,
            weight,
            labels,
            scale,
            rows_at_once,
            grad,
        )
    }

    /// See [`dispatch_order`].
    fn dispatch_order(
        experts: IntTensor<Self>,
        num_experts: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        portable::dispatch_order::<Self>(experts, num_experts)
    }

    /// See [`gather_counts`].
    fn gather_counts(counts: IntTensor<Self>, group: Communicator) -> IntTensor<Self> {
        portable::gather_counts::<Self>(counts, &group)
    }

    /// See [`arrival_order`].
    fn arrival_order(
        counts: IntTensor<Self>,
        num_experts: usize,
        experts: Range<usize>,
        arriving: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        portable::arrival_order::<Self>(counts, num_experts, experts, arriving)
    }

    /// See [`HostCopies::reserve`](host::HostCopies::reserve).
    fn host_memory(_like: FloatTensor<Self>, _bytes: usize) -> HostMemory {
        HostMemory(None)
    }

    /// See [`HostCopies::push`](host::HostCopies::push): whether it is done.
    fn copy_to_host(_x: FloatTensor<Self>, _memory: HostMemory, _at: usize) -> bool {
        false
    }

    /// See [`HostCopies::finish`](host::HostCopies::finish): whether they are there.
    fn wait_for_copies(_like: FloatTensor<Self>) -> bool {
        false
    }

    /// See [`read_counts`]: the numbers, if they are on the host already or on their way.
    fn read_counts(_counts: IntTensor<Self>) -> HostCounts {
        HostCounts(None)
    }

    /// See [`layer_norm`].
    fn layer_norm_rows(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        portable::layer_norm::<Self>(x, weight, bias, epsilon)
    }

    /// Gradients of [`layer_norm`] for its input, its weight and its bias.
    fn layer_norm_rows_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        portable::layer_norm_backward::<Self>(x, weight, grad, epsilon).into()
    }

    /// See [`gelu`].
    fn gelu_rows(x: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::gelu::<Self>(x)
    }

    /// Gradient of [`gelu`] for its input.
    fn gelu_rows_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::gelu_backward::<Self>(x, grad)
    }

    /// See [`add_bias`].
    fn add_bias(x: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::add_bias::<Self>(x, bias)
    }

    /// Gradient of [`add_bias`] for its bias.
    fn sum_rows(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::sum_rows::<Self>(grad)
    }

    /// See [`add_scaled`].
    fn add_scaled(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::add_scaled::<Self>(x, branch, scale)
    }

    /// Gradients of [`add_scaled`] for the branch and its scale.
    fn add_scaled_backward(
        branch: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::add_scaled_backward::<Self>(branch, scale, grad).into()
    }

    /// See [`sum_of_squares`].
    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::sum_of_squares::<Self>(x)
    }

    /// See [`adamw_update`]; returns parameter, first and second moment.
    fn adamw_update(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moment_1: FloatTensor<Self>,
        moment_2: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        portable::adamw_update::<Self>(param, grad, moment_1, moment_2, &step)
    }
}

#[cfg(feature = "ndarray")]
mod ndarray {
    impl super::YuanOps for burn::backend::NdArray {}
}

#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
mod cube {
    impl super::YuanOps for burn_cubecl::CubeBackend {}
}
