//! Gradients of the operations, by hand, for any backend.
//!
//! Each operation keeps its inputs and forms what else it needs again.

use burn::backend::{
    Autodiff,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};
use burn::{backend::TensorMetadata, tensor::FloatDType};

use super::{AdamWStep, Counts, Target, TensorList, YuanOps, exchange, portable};

/// Records a step with the inputs to keep (which become a list of nodes) and other state.
macro_rules! record {
    ($step:ident, [$($input:ident),+], keep [$($kept:ident),*], $state:expr, $forward:expr) => {
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
    fn transfer(x: FloatTensor<Self>, to: IntTensor<Self>) -> FloatTensor<Self> {
        let dtype = to.dtype().into();
        let back = B::int_zeros([1].into(), &x.device(), dtype);
        record!(Transfer, [x], keep [], back, B::transfer(x, to))
    }

    fn transfer_int(x: IntTensor<Self>, to: IntTensor<Self>) -> IntTensor<Self> {
        B::transfer_int(x, to)
    }

    fn exchange(sources: TensorList<Self>, targets: Vec<Target>) -> TensorList<Self> {
        exchange::recorded(sources, targets)
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

    fn embed_backward(_: FloatTensor<Self>, _: IntTensor<Self>, _: usize) -> FloatTensor<Self> {
        unreachable!("{INNER}")
    }

    fn dispatch_order(
        experts: IntTensor<Self>,
        num_experts: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        B::dispatch_order(experts, num_experts)
    }

    fn read_counts(counts: IntTensor<Self>) -> Counts {
        B::read_counts(counts)
    }

    fn dense_weight_backward(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{INNER}")
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
        use burn::backend::AutodiffBackend;
        let (cos, sin) = (Self::inner(cos), Self::inner(sin));
        let (inner_qk, inner_value) = (Self::inner(query_key.clone()), Self::inner(value.clone()));
        let [q, k, v] =
            portable::rotated_heads::<B>(inner_qk, inner_value, cos.clone(), sin.clone());
        let (output, log_sums) = B::causal_attention(q.clone(), k.clone(), v, first_keys.clone());
        let saved = ([q, k, cos, sin, output.clone(), log_sums], first_keys);
        record!(RotaryAttention, [query_key, value], keep[value], saved, {
            drop((query_key, value));
            B::float_swap_dims(output, 1, 2)
        })
    }

    fn rotate_pair(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        unreachable!("{INNER}")
    }

    fn causal_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        first_keys: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        use burn::backend::AutodiffBackend;
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

    fn linear_cross_entropy_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: IntTensor<Self>,
        _: f64,
        _: usize,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{INNER}")
    }

    fn grouped_matmul_weight_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Vec<usize>,
    ) -> FloatTensor<Self> {
        unreachable!("{INNER}")
    }

    fn swiglu_backward(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{INNER}")
    }

    fn gather_rows_backward(
        _: FloatTensor<Self>,
        _: IntTensor<Self>,
        _: usize,
    ) -> FloatTensor<Self> {
        unreachable!("{INNER}")
    }

    fn combine_rows_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: IntTensor<Self>,
        _: IntTensor<Self>,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{INNER}")
    }

    fn rms_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{INNER}")
    }

    fn add_previous_backward(_: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{INNER}")
    }

    fn cached_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        length: usize,
        first_keys: Vec<usize>,
    ) -> FloatTensor<Self> {
        use burn::backend::AutodiffBackend;
        let [query, key, value] = [query, key, value].map(Self::inner);
        Self::from_inner(B::cached_attention(query, key, value, length, first_keys))
    }

    fn causal_attention_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: IntTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{INNER}")
    }

    fn cross_entropy_backward(
        _: FloatTensor<Self>,
        _: IntTensor<Self>,
        _: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        unreachable!("{INNER}")
    }

    fn sum_of_squares(_: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{INNER}")
    }

    fn adamw_update(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{INNER}")
    }
}

/// Why these operations have no form under autodiff.
const INNER: &str = "gradients and updates are computed on tensors without a graph";

/// What attention keeps beside its inputs: first keys, output, logarithms of the sums.
type SavedAttention<B> = (IntTensor<B>, FloatTensor<B>, FloatTensor<B>);

/// Rotated queries and keys, cosines, sines, output and logarithms of the sums; first keys.
type SavedRotaryAttention<B> = ([FloatTensor<B>; 6], IntTensor<B>);

/// Declares a step: its state, and the gradients of its parents from the kept inputs.
macro_rules! step {
    (
        $step:ident, $parents:literal, kept $kept:literal, $state:ty,
        |$inputs:pat_param, $saved:pat_param, $grad:ident| $gradients:expr
    ) => {
        #[derive(Debug)]
        struct $step;

        impl<B: YuanOps> Backward<B, $parents> for $step {
            type State = ([NodeId; $kept], $state);

            fn backward(
                self,
                ops: Ops<Self::State, $parents>,
                grads: &mut Gradients,
                checkpointer: &mut Checkpointer,
            ) {
                let (kept, $saved) = ops.state;
                let _ = &checkpointer;
                let $inputs: [FloatTensor<B>; $kept] =
                    kept.map(|node| checkpointer.retrieve_node_output(node));
                let $grad = grads.consume::<B>(&ops.node);
                let gradients: [FloatTensor<B>; $parents] = $gradients;
                for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, gradient);
                    }
                }
            }
        }
    };
}

step!(Transfer, 1, kept 0, IntTensor<B>, |[], back, grad| [B::transfer(grad, back)]);
step!(Embed, 1, kept 0, (IntTensor<B>, usize), |[], (ids, vocab), grad| [B::embed_backward(grad, ids, vocab)]);
step!(Dense, 2, kept 2, (), |[rows, weight], (), grad| {
    let d_rows = B::dense(grad.clone(), B::float_transpose(weight));
    [d_rows, B::dense_weight_backward(rows, grad)]
});
step!(GroupedMatmul, 2, kept 2, Vec<usize>, |[rows, weight], counts, grad| {
    let transposed = B::float_swap_dims(weight, 1, 2);
    let d_rows = B::grouped_matmul(grad.clone(), transposed, counts.clone());
    [d_rows, B::grouped_matmul_weight_backward(rows, grad, counts)]
});
step!(Swiglu, 1, kept 1, (), |[gate_up], (), grad| [B::swiglu_backward(gate_up, grad)]);
step!(GatherRows, 1, kept 0, (IntTensor<B>, usize), |[], (inverse, copies), grad| {
    [B::gather_rows_backward(grad, inverse, copies)]
});
step!(CombineRows, 2, kept 2, [IntTensor<B>; 2], |[rows, weights], [row_of_pair, pair_of_row], grad| {
    B::combine_rows_backward(rows, weights, row_of_pair, pair_of_row, grad).into()
});
step!(RmsNorm, 2, kept 2, f64, |[x, weight], epsilon, grad| {
    B::rms_norm_backward(x, weight, grad, epsilon).into()
});
step!(AddPrevious, 1, kept 0, (), |[], (), grad| [B::add_previous_backward(grad)]);
// The inverse of a rotation turns the other way.
step!(Rotate, 1, kept 0, [FloatTensor<B>; 2], |[], [cos, sin], grad| [B::rotate(grad, cos, B::float_neg(sin))]);
step!(RotaryAttention, 2, kept 1, SavedRotaryAttention<B>, |[value], (saved, first_keys), grad| {
    let [q, k, cos, sin, output, log_sums] = saved;
    let [v, grad] = [value, grad].map(|x| B::float_swap_dims(x, 1, 2));
    let (d_q, d_k, d_v) = B::causal_attention_backward(q, k, v, first_keys, output, log_sums, grad);
    let [d_q, d_k, d_v] = [d_q, d_k, d_v].map(|x| B::float_swap_dims(x, 1, 2));
    [B::rotate_pair(d_q, d_k, cos, B::float_neg(sin)), d_v]
});
step!(CausalAttention, 3, kept 3, SavedAttention<B>, |[query, key, value], (first_keys, output, log_sums), grad| {
    B::causal_attention_backward(query, key, value, first_keys, output, log_sums, grad).into()
});
step!(LinearCrossEntropy, 2, kept 2, (IntTensor<B>, f64, usize), |[rows, weight], (labels, scale, at_once), grad| {
    B::linear_cross_entropy_backward(rows, weight, labels, scale, at_once, grad).into()
});
step!(CrossEntropy, 1, kept 1, IntTensor<B>, |[logits], labels, grad| {
    [B::cross_entropy_backward(logits, labels, grad)]
});
