//! Gradients of the operations, by hand, for any backend.

use burn::backend::{
    Autodiff, TensorMetadata,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::Shape;

use super::{AdamWStep, YuanOps};

impl<B: YuanOps, C: CheckpointStrategy> YuanOps for Autodiff<B, C> {
    fn grouped_matmul(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        rows_per_group: Vec<usize>,
    ) -> FloatTensor<Self> {
        match GroupedMatmul.prepare::<C>([rows.node(), weight.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let inputs = [prep.checkpoint(&rows), prep.checkpoint(&weight)];
                let output =
                    B::grouped_matmul(rows.into_primitive(), weight.into_primitive(), rows_per_group.clone());
                prep.finish((inputs, rows_per_group), output)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::grouped_matmul(rows.into_primitive(), weight.into_primitive(), rows_per_group))
            }
        }
    }

    fn swiglu(gate_up: FloatTensor<Self>) -> FloatTensor<Self> {
        match Swiglu.prepare::<C>([gate_up.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let input = prep.checkpoint(&gate_up);
                prep.finish(input, B::swiglu(gate_up.into_primitive()))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::swiglu(gate_up.into_primitive())),
        }
    }

    fn gather_rows(
        source: FloatTensor<Self>,
        rows: IntTensor<Self>,
        inverse: IntTensor<Self>,
        copies: usize,
    ) -> FloatTensor<Self> {
        match GatherRows.prepare::<C>([source.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let output = B::gather_rows(source.into_primitive(), rows.clone(), inverse.clone(), copies);
                prep.finish((rows, inverse, copies), output)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::gather_rows(source.into_primitive(), rows, inverse, copies))
            }
        }
    }

    fn grouped_matmul_weight_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Vec<usize>,
    ) -> FloatTensor<Self> {
        unreachable!("a gradient is computed on the inner backend")
    }

    fn swiglu_backward(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("a gradient is computed on the inner backend")
    }

    fn adamw_update(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("an optimizer works on tensors without a graph")
    }
}

#[derive(Debug)]
struct GroupedMatmul;

impl<B: YuanOps> Backward<B, 2> for GroupedMatmul {
    type State = ([NodeId; 2], Vec<usize>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let ([rows, weight], rows_per_group) = ops.state;
        let rows: FloatTensor<B> = checkpointer.retrieve_node_output(rows);
        let weight: FloatTensor<B> = checkpointer.retrieve_node_output(weight);
        let grad = grads.consume::<B>(&ops.node);
        let [rows_parent, weight_parent] = ops.parents;
        if let Some(parent) = rows_parent {
            let transposed = B::float_swap_dims(weight, 1, 2);
            let grad = B::grouped_matmul(grad.clone(), transposed, rows_per_group.clone());
            grads.register::<B>(parent.id, grad);
        }
        if let Some(parent) = weight_parent {
            grads.register::<B>(parent.id, B::grouped_matmul_weight_backward(rows, grad, rows_per_group));
        }
    }
}

#[derive(Debug)]
struct Swiglu;

impl<B: YuanOps> Backward<B, 1> for Swiglu {
    type State = NodeId;

    fn backward(self, ops: Ops<NodeId, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let gate_up: FloatTensor<B> = checkpointer.retrieve_node_output(ops.state);
        let grad = grads.consume::<B>(&ops.node);
        if let [Some(parent)] = ops.parents {
            grads.register::<B>(parent.id, B::swiglu_backward(gate_up, grad));
        }
    }
}

#[derive(Debug)]
struct GatherRows;

impl<B: YuanOps> Backward<B, 1> for GatherRows {
    type State = (IntTensor<B>, IntTensor<B>, usize);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (rows, inverse, copies) = ops.state;
        let grad = grads.consume::<B>(&ops.node);
        let [Some(parent)] = ops.parents else { return };
        let (num_rows, width) = (grad.shape()[0] / copies, grad.shape()[1]);
        let gathered = B::gather_rows(grad, inverse, rows, 1);
        let grad = if copies == 1 {
            gathered
        } else {
            let copies_apart = B::float_reshape(gathered, Shape::from([num_rows, copies, width]));
            B::float_reshape(B::float_sum_dim(copies_apart, 1), Shape::from([num_rows, width]))
        };
        grads.register::<B>(parent.id, grad);
    }
}
