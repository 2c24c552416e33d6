//! The operations under autodiff, for any backend: what each records.
//!
//! An operation keeps its inputs and forms what else its gradient needs again. The gradients stand
//! beside the operations (`step!`). An operation that is not listed has no gradient of its own: its
//! portable form is differentiated, should anybody ask.

use burn::backend::{
    Autodiff, AutodiffBackend, TensorMetadata,
    autodiff::{
        checkpoint::strategy::CheckpointStrategy,
        ops::{Backward, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::FloatDType;
use std::ops::Range;

use crate::ranks::Communicator;

use super::{
    HostCounts, RowsToRanks, YuanOps,
    attention::{CausalAttention, RotaryAttention},
    backward::ContinueBackward,
    collective::{AllReduce, AllToAll},
    dense::{Dense, Embed},
    filter::AddPrevious,
    loss::{CrossEntropy, LinearCrossEntropy},
    moe::{CombineRows, GatherRows, GroupedMatmul, Swiglu},
    norm::RmsNorm,
    rotary::Rotate,
    tower::{AddBias, AddScaled, FullAttention, Gelu, LayerNorm},
};

/// Records a step with the inputs to keep (which become a list of nodes) and other state.
macro_rules! record {
    ($step:path, [$($input:ident),+], keep [$($kept:ident),*], $state:expr, $forward:expr) => {
        match $step.prepare::<C>([$($input.node()),+]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let _ = &mut prep;
                let kept = [$(prep.checkpoint(&$kept)),*];
                let state = $state;
                $(let $input = $input.into_primitive();)+
                prep.finish((kept, state), $forward)
            }
            OpsKind::UnTracked(prep) => {
                $(let $input = $input.into_primitive();)+
                prep.finish($forward)
            }
        }
    };
}

impl<B: YuanOps, C: CheckpointStrategy> YuanOps for Autodiff<B, C> {
    fn all_to_all(rows: FloatTensor<Self>, to: RowsToRanks) -> FloatTensor<Self> {
        record!(AllToAll, [rows], keep [], to.clone(), B::all_to_all(rows, to))
    }

    fn continue_backward(x: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        let gradient = gradient.into_primitive();
        record!(ContinueBackward, [x], keep [], gradient.clone(), {
            B::continue_backward(x, gradient)
        })
    }

    fn sum_over_ranks(x: FloatTensor<Self>, group: Communicator) -> FloatTensor<Self> {
        record!(AllReduce, [x], keep [], (), B::sum_over_ranks(x, group))
    }

    fn dense(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        record!(Dense, [rows, weight], keep [rows, weight], (), B::dense(rows, weight))
    }

    fn embed(
        weight: FloatTensor<Self>,
        ids: IntTensor<Self>,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        let vocab = weight.shape()[0];
        record!(Embed, [weight], keep [], (ids.clone(), vocab), B::embed(weight, ids, dtype))
    }

    fn dispatch_order(
        experts: IntTensor<Self>,
        num_experts: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        B::dispatch_order(experts, num_experts)
    }

    fn gather_counts(counts: IntTensor<Self>, group: Communicator) -> IntTensor<Self> {
        B::gather_counts(counts, group)
    }

    fn arrival_order(
        counts: IntTensor<Self>,
        num_experts: usize,
        experts: Range<usize>,
        arriving: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        B::arrival_order(counts, num_experts, experts, arriving)
    }

    fn read_counts(counts: IntTensor<Self>) -> HostCounts {
        B::read_counts(counts)
    }

    fn grouped_matmul(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        rows_per_group: Vec<usize>,
    ) -> FloatTensor<Self> {
        record!(GroupedMatmul, [rows, weight], keep [rows, weight], rows_per_group.clone(), {
            B::grouped_matmul(rows, weight, rows_per_group)
        })
    }

    fn swiglu(gate_up: FloatTensor<Self>) -> FloatTensor<Self> {
        record!(Swiglu, [gate_up], keep[gate_up], (), B::swiglu(gate_up))
    }

    fn gather_rows(
        source: FloatTensor<Self>,
        rows: IntTensor<Self>,
        inverse: IntTensor<Self>,
        copies: usize,
    ) -> FloatTensor<Self> {
        record!(GatherRows, [source], keep [], (inverse.clone(), copies), {
            B::gather_rows(source, rows, inverse, copies)
        })
    }

    fn combine_rows(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of_pair: IntTensor<Self>,
        pair_of_row: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let order = [row_of_pair.clone(), pair_of_row.clone()];
        record!(CombineRows, [rows, weights], keep [rows, weights], order, {
            B::combine_rows(rows, weights, row_of_pair, pair_of_row)
        })
    }

    fn rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        record!(RmsNorm, [x, weight], keep [x, weight], epsilon, B::rms_norm(x, weight, epsilon))
    }

    fn add_previous(taps: FloatTensor<Self>) -> FloatTensor<Self> {
        record!(AddPrevious, [taps], keep [], (), B::add_previous(taps))
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        record!(Rotate, [x], keep [], [cos.clone(), sin.clone()], B::rotate(x, cos, sin))
    }

    fn rotary_attention(
        query_key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        first_keys: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let (cos, sin) = (Self::inner(cos), Self::inner(sin));
        let (inner_qk, inner_value) = (Self::inner(query_key.clone()), Self::inner(value.clone()));
        let [q, k, v] =
            super::portable::rotated_heads::<B>(inner_qk, inner_value, cos.clone(), sin.clone());
        let (output, log_sums) = B::causal_attention(q.clone(), k.clone(), v, first_keys.clone());
        let saved = ([q, k, cos, sin, output.clone(), log_sums], first_keys);
        record!(RotaryAttention, [query_key, value], keep[value], saved, {
            drop((query_key, value));
            B::float_swap_dims(output, 1, 2)
        })
    }

    fn causal_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        first_keys: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let inner = |x: &FloatTensor<Self>| Self::inner(x.clone());
        let (output, log_sums) =
            B::causal_attention(inner(&query), inner(&key), inner(&value), first_keys.clone());
        let saved = (first_keys, output.clone(), log_sums.clone());
        let output = record!(CausalAttention, [query, key, value], keep [query, key, value], saved, {
            drop((query, key, value));
            output
        });
        (output, Self::from_inner(log_sums))
    }

    fn full_attention(qkv: FloatTensor<Self>, heads: usize) -> FloatTensor<Self> {
        record!(FullAttention, [qkv], keep[qkv], heads, B::full_attention(qkv, heads))
    }

    fn cross_entropy(logits: FloatTensor<Self>, labels: IntTensor<Self>) -> FloatTensor<Self> {
        record!(
            CrossEntropy,
            [logits],
            keep[logits],
            labels.clone(),
            B::cross_entropy(logits, labels)
        )
    }

    fn linear_cross_entropy(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        labels: IntTensor<Self>,
        scale: f64,
        rows_at_once: usize,
    ) -> FloatTensor<Self> {
        record!(LinearCrossEntropy, [rows, weight], keep [rows, weight], (labels.clone(), scale, rows_at_once), {
            B::linear_cross_entropy(rows, weight, labels, scale, rows_at_once)
        })
    }

    fn layer_norm_rows(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        record!(LayerNorm, [x, weight, bias], keep [x, weight], epsilon, {
            B::layer_norm_rows(x, weight, bias, epsilon)
        })
    }

    fn gelu_rows(x: FloatTensor<Self>) -> FloatTensor<Self> {
        record!(Gelu, [x], keep[x], (), B::gelu_rows(x))
    }

    fn add_bias(x: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        record!(AddBias, [x, bias], keep [], (), B::add_bias(x, bias))
    }

    fn add_scaled(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        record!(AddScaled, [x, branch, scale], keep [branch, scale], (), {
            B::add_scaled(x, branch, scale)
        })
    }

    fn cached_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        length: usize,
        first_keys: Vec<usize>,
    ) -> FloatTensor<Self> {
        let [query, key, value] = [query, key, value].map(Self::inner);
        Self::from_inner(B::cached_attention(query, key, value, length, first_keys))
    }
}
