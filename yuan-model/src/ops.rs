//! The seam: operations that matter for speed.
//!
//! The model calls the functions of this module and knows nothing beneath them. Every
//! operation has a [`portable`] form in terms of Burn's own operations, which is the truth
//! and runs on every backend, and may have a faster form for one backend beside it.
//! Gradients are written by hand in `autodiff`: Burn's own would differentiate a slice of
//! the stacked weights into a full-size tensor per expert, a cost that grows with E².

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
    Backend, Dispatch, TensorMetadata, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Device, FloatDType, Int, Tensor};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::ModelError;

mod autodiff;
#[cfg(feature = "cuda")]
mod cuda;
mod exchange;
#[cfg(feature = "flex")]
mod flex;
pub mod portable;
#[cfg(feature = "remote")]
mod remote;

pub use exchange::{Target, TensorList, exchange};
#[cfg(feature = "remote")]
pub(crate) use remote::{OPERATIONS, served_operations};

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

/// Scalars of one AdamW update of one tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment, β₁.
    pub beta_1: f64,
    /// Decay of the second moment, β₂.
    pub beta_2: f64,
    /// ε, added to the root of the corrected second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Updates of this tensor, this one included.
    pub step: u64,
    /// Multiplies the gradient first: the factor of global-norm clipping.
    pub gradient_scale: f64,
}

/// Numbers on the host, if they were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts(pub Option<Vec<usize>>);

/// Operations that a backend may replace; the defaults are the portable forms.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote"),
    Autodiff
)]
pub trait YuanOps: Backend {
    /// See [`transfer`]; `to` is any tensor on the device.
    fn transfer(x: FloatTensor<Self>, to: IntTensor<Self>) -> FloatTensor<Self> {
        portable::transfer::<Self>(x, to)
    }

    /// See [`transfer_int`]; `to` is any tensor on the device.
    fn transfer_int(x: IntTensor<Self>, to: IntTensor<Self>) -> IntTensor<Self> {
        portable::transfer_int::<Self>(x, to)
    }

    /// See [`exchange`]; a target without rows gets some tensor that nobody reads.
    fn exchange(
        #[extension_type] sources: TensorList<Self>,
        targets: Vec<Target>,
    ) -> TensorList<Self> {
        TensorList(exchange::portable::<Self>(&sources.0, &targets))
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

    /// See [`read_counts`]: the numbers, if they are on the host already or on their way.
    fn read_counts(_counts: IntTensor<Self>) -> Counts {
        Counts(None)
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

/// A tensor on another device, with a gradient that travels back; on its own device, itself.
pub fn transfer<const D: usize>(x: Tensor<D>, device: &Device) -> Tensor<D> {
    if x.device() == *device {
        return x;
    }
    let to = Tensor::<1, Int>::empty([1], device);
    Tensor::from_dispatch(Dispatch::transfer(x.into_dispatch(), to.into_dispatch()))
}

/// [`transfer`] of integers.
pub fn transfer_int<const D: usize>(x: Tensor<D, Int>, device: &Device) -> Tensor<D, Int> {
    if x.device() == *device {
        return x;
    }
    let to = Tensor::<1, Int>::empty([1], device);
    Tensor::from_dispatch(Dispatch::transfer_int(x.into_dispatch(), to.into_dispatch()))
}

/// `rows · weight`: `[rows, d_in]` and `[d_in, d_out]` of one type → `[rows, d_out]`.
///
/// Where products are narrower than f32, the weight's gradient may come in f32: a weight that was
/// cast from f32 gets it unrounded.
///
/// # Panics
///
/// If the shapes do not fit.
pub fn dense(rows: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let ([_, d_in], [weight_in, _]) = (rows.dims(), weight.dims());
    assert_eq!(d_in, weight_in, "rows of width {d_in} against a weight of {weight_in} rows");
    Tensor::from_dispatch(Dispatch::dense(rows.into_dispatch(), weight.into_dispatch()))
}

/// Rows `ids` of a table, cast to `dtype`: `[vocab, d]` and `[rows]` → `[rows, d]`.
///
/// The gradient is added up in the order of the rows, whatever the backend.
pub fn embed(weight: Tensor<2>, ids: Tensor<1, Int>, dtype: FloatDType) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::embed(weight.into_dispatch(), ids.into_dispatch(), dtype))
}

/// One matrix product per group of rows, each with its own weight: the experts' product.
///
/// Row `i` of `rows` belongs to the group that `rows_per_group` says; groups follow each
/// other and may be empty. The cost follows the rows: nothing is padded to the busiest group.
///
/// # Shapes
///
/// - `rows`: `[num_rows, d_in]`, sorted by group
/// - `weight`: `[groups, d_in, d_out]`
/// - output: `[num_rows, d_out]`
///
/// # Panics
///
/// If the shapes do not fit, or `rows_per_group` does not sum to `num_rows`.
pub fn grouped_matmul(rows: Tensor<2>, weight: Tensor<3>, rows_per_group: &[usize]) -> Tensor<2> {
    let ([num_rows, d_in], [groups, weight_in, _]) = (rows.dims(), weight.dims());
    assert_eq!(d_in, weight_in, "rows of width {d_in} against weights of {weight_in} rows");
    assert_eq!(rows_per_group.len(), groups, "one row count for each of {groups} groups");
    assert_eq!(rows_per_group.iter().sum::<usize>(), num_rows, "row counts sum to the rows");
    let (rows, weight) = (rows.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::grouped_matmul(rows, weight, rows_per_group.to_vec()))
}

/// SwiGLU: `silu(gate) ⊙ up` of `[gate | up]` side by side.
///
/// # Shapes
///
/// - `gate_up`: `[num_rows, 2 · d]`
/// - output: `[num_rows, d]`
pub fn swiglu(gate_up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::swiglu(gate_up.into_dispatch()))
}

/// Rows of `source` in a new order, each `copies` times over all.
///
/// `inverse` lists, for source row `i`, the `copies` output rows that hold it; with it the
/// gradient is again a gather (and a sum over the copies), not a scatter.
///
/// # Shapes
///
/// - `source`: `[num_rows, d]`
/// - `rows`: `[num_rows · copies]`, source row of every output row
/// - `inverse`: `[num_rows · copies]`, output rows of source row 0, then of row 1, …
/// - output: `[num_rows · copies, d]`
pub fn gather_rows(
    source: Tensor<2>,
    rows: Tensor<1, Int>,
    inverse: Tensor<1, Int>,
    copies: usize,
) -> Tensor<2> {
    let (rows, inverse) = (rows.into_dispatch(), inverse.into_dispatch());
    Tensor::from_dispatch(Dispatch::gather_rows(source.into_dispatch(), rows, inverse, copies))
}

/// Adds up the rows of each token by weight: `y_t = Σ_j w_tj · rows[row_of_pair[t · top_k + j]]`.
///
/// # Shapes
///
/// - `rows`: `[tokens · top_k, d]` in any order
/// - `weights`: `[tokens, top_k]`
/// - `row_of_pair`: `[tokens · top_k]`, where the row of each (token, choice) pair is
/// - `pair_of_row`: `[tokens · top_k]`, its inverse
/// - output: `[tokens, d]`
pub fn combine_rows(
    rows: Tensor<2>,
    weights: Tensor<2>,
    row_of_pair: Tensor<1, Int>,
    pair_of_row: Tensor<1, Int>,
) -> Tensor<2> {
    let (rows, weights) = (rows.into_dispatch(), weights.into_dispatch());
    let (row_of_pair, pair_of_row) = (row_of_pair.into_dispatch(), pair_of_row.into_dispatch());
    Tensor::from_dispatch(Dispatch::combine_rows(rows, weights, row_of_pair, pair_of_row))
}

/// `weight ⊙ x / sqrt(mean(x²) + ε)` of every row: `[rows, d]` and `[d]` → `[rows, d]`.
///
/// Computed in f32 whatever the type of `x`, which the result has too; the weight is in f32.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), epsilon))
}

/// `y_t = current_t + previous_{t−1}` of `[previous | current]` side by side, `previous_{−1} = 0`.
///
/// `[batch, seq, 2 · d]` → `[batch, seq, d]`.
pub fn add_previous(taps: Tensor<3>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::add_previous(taps.into_dispatch()))
}

/// Rotates the first `2 · pairs` dimensions of every head, halves paired; the rest pass through.
///
/// # Shapes
///
/// - `x`, output: `[batch, seq, heads, head_dim]`
/// - `cos`, `sin`: `[batch or 1, seq, 1, pairs]`; they carry no gradient
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    Tensor::from_dispatch(Dispatch::rotate(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
    ))
}

/// [`causal_attention`] of queries and keys that come side by side and are [rotated](rotate) first.
///
/// # Shapes
///
/// - `query_key`: `[batch, seq, heads, 2 · head_dim]`, in every head the query and then the key
/// - `value`, output: `[batch, seq, heads, head_dim]`
/// - `cos`, `sin`: `[batch or 1, seq, 1, pairs]`; they carry no gradient
/// - `first_keys`: `[batch, seq]`, see [`causal_attention`]
pub fn rotary_attention(
    query_key: Tensor<4>,
    value: Tensor<4>,
    cos: Tensor<4>,
    sin: Tensor<4>,
    first_keys: Option<Tensor<2, Int>>,
) -> Tensor<4> {
    let first_keys = or_unpacked(first_keys, &value.device()).into_dispatch();
    let (query_key, value) = (query_key.into_dispatch(), value.into_dispatch());
    let (cos, sin) = (cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::rotary_attention(query_key, value, cos, sin, first_keys))
}

/// `softmax(q kᵀ / sqrt(d)) v` where position `i` sees positions `j ≤ i`, in a packed row those of
/// its document only: `first_keys[i] ≤ j`.
///
/// The scores are formed again for the gradient instead of being kept.
///
/// # Shapes
///
/// - `query`, `key`, `value`, output: `[batch, heads, seq, d]`
/// - `first_keys`: `[batch, seq]`, where each position's document starts; it never falls along a
///   row
pub fn causal_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    first_keys: Option<Tensor<2, Int>>,
) -> Tensor<4> {
    let first_keys = or_unpacked(first_keys, &query.device()).into_dispatch();
    let (query, key, value) = (query.into_dispatch(), key.into_dispatch(), value.into_dispatch());
    Tensor::from_dispatch(Dispatch::causal_attention(query, key, value, first_keys).0)
}

/// An operation of a backend cannot leave a tensor out: `[1, 1]` stands for rows of one document.
fn or_unpacked(first_keys: Option<Tensor<2, Int>>, device: &Device) -> Tensor<2, Int> {
    first_keys.unwrap_or_else(|| Tensor::zeros([1, 1], device))
}

/// The first keys that [`causal_attention`] was given; to a row of one position it is all the same.
fn packed<T: TensorMetadata>(first_keys: T) -> Option<T> {
    (first_keys.shape()[..] != [1, 1]).then_some(first_keys)
}

/// Attention of the newest tokens over a cache: queries `length − num_queries ..` of every row see
/// the keys `first_key ..` up to themselves. What comes before a row's first key is padding; a
/// query there sees itself.
///
/// It has no gradient.
///
/// # Shapes
///
/// - `query`, output: `[batch, heads, num_queries, d]`
/// - `key`, `value`: `[batch, heads, capacity, d]`, of which the first `length` are filled
/// - `first_keys`: `[batch]`
///
/// # Panics
///
/// If the cache is shorter than `length`, that than the queries, or `first_keys` does not fit the
/// batch.
pub fn cached_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    length: usize,
    first_keys: &[usize],
) -> Tensor<4> {
    let ([batch, _, num_queries, _], [_, _, capacity, _]) = (query.dims(), key.dims());
    assert!(
        num_queries <= length && length <= capacity,
        "{num_queries} queries, {length} keys of {capacity}"
    );
    assert_eq!(first_keys.len(), batch, "a first key for every row");
    let (query, key, value) = (query.into_dispatch(), key.into_dispatch(), value.into_dispatch());
    Tensor::from_dispatch(Dispatch::cached_attention(
        query,
        key,
        value,
        length,
        first_keys.to_vec(),
    ))
}

/// `log Σ exp(logits) − logits[label]` of every row: `[rows, classes]` and `[rows]` → `[rows]`.
pub fn cross_entropy(logits: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::cross_entropy(logits.into_dispatch(), labels.into_dispatch()))
}

/// [`cross_entropy`] of the logits `scale · rows · weight`, some rows at a time: all logits at once
/// never exist, neither here nor in the gradient, which forms them again.
///
/// # Shapes
///
/// - `rows`: `[num_rows, d]`, `weight`: `[d, classes]`, of one type; `labels`: `[num_rows]`
/// - output: `[num_rows]` in f32
pub fn linear_cross_entropy(
    rows: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: f64,
    rows_at_once: usize,
) -> Tensor<1> {
    let (rows, weight, labels) =
        (rows.into_dispatch(), weight.into_dispatch(), labels.into_dispatch());
    Tensor::from_dispatch(Dispatch::linear_cross_entropy(rows, weight, labels, scale, rows_at_once))
}

/// The order in which (token, expert) pairs are computed: by expert, pairs of one expert as they
/// come.
///
/// # Shapes
///
/// - `experts`: `[tokens, top_k]`, all below `num_experts`
/// - output: the row of every pair `[tokens · top_k]`, the pair in every row `[tokens · top_k]`,
///   the pairs of every expert `[num_experts]`
pub fn dispatch_order(
    experts: Tensor<2, Int>,
    num_experts: usize,
) -> (Tensor<1, Int>, Tensor<1, Int>, Tensor<1, Int>) {
    let (rows, pairs, counts) = Dispatch::dispatch_order(experts.into_dispatch(), num_experts);
    (Tensor::from_dispatch(rows), Tensor::from_dispatch(pairs), Tensor::from_dispatch(counts))
}

/// Brings the counts of [`dispatch_order`] to the host: the one place of a forward pass that waits
/// for the device.
///
/// What is launched between the two runs while they travel.
///
/// # Errors
///
/// If the device fails to hand over its data.
pub fn read_counts(counts: Tensor<1, Int>) -> Result<Vec<usize>, ModelError> {
    match Dispatch::read_counts(counts.clone().into_dispatch()).0 {
        Some(counts) => Ok(counts),
        None => {
            let counts = counts.try_into_data().map_err(ModelError::device)?.convert::<i64>();
            Ok(counts.iter::<i64>().map(|count| count as usize).collect())
        }
    }
}

/// Sum of the squares of all elements, `[1]`; no gradient.
pub fn sum_of_squares<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::sum_of_squares(x.into_dispatch()))
}

/// One AdamW update in place of the ten passes of its formula; bias-corrected, decay decoupled.
///
/// The tensors carry no autodiff graph and have one shape. Returns the new parameter and moments.
pub fn adamw_update<const D: usize>(
    param: Tensor<D>,
    grad: Tensor<D>,
    [moment_1, moment_2]: [Tensor<D>; 2],
    step: AdamWStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let (param, moment_1, moment_2) = Dispatch::adamw_update(
        param.into_dispatch(),
        grad.into_dispatch(),
        moment_1.into_dispatch(),
        moment_2.into_dispatch(),
        step,
    );
    let [moment_1, moment_2] = [moment_1, moment_2].map(Tensor::from_dispatch);
    (Tensor::from_dispatch(param), [moment_1, moment_2])
}
