//! How the gradient of an operation is written down: `step!` beside the operation says what it
//! keeps and what its gradients are, and `autodiff.rs` records it.

/// Declares a step: its state, and the gradients of its parents from the kept inputs.
macro_rules! step {
    (
        $step:ident, $parents:literal, kept $kept:literal, $state:ty,
        |$inputs:pat_param, $saved:pat_param, $grad:ident| $gradients:expr
    ) => {
        #[derive(Debug)]
        pub(super) struct $step;

        impl<B: YuanOps> burn::backend::autodiff::ops::Backward<B, $parents> for $step {
            type State = ([burn::backend::autodiff::NodeId; $kept], $state);

            fn backward(
                self,
                ops: burn::backend::autodiff::ops::Ops<Self::State, $parents>,
                grads: &mut burn::backend::autodiff::grads::Gradients,
                checkpointer: &mut burn::backend::autodiff::checkpoint::base::Checkpointer,
            ) {
                let (kept, $saved) = ops.state;
                let _ = &checkpointer;
                let $inputs: [burn::backend::tensor::FloatTensor<B>; $kept] =
                    kept.map(|node| checkpointer.retrieve_node_output(node));
                let $grad = grads.consume::<B>(&ops.node);
                let gradients: [burn::backend::tensor::FloatTensor<B>; $parents] = $gradients;
                for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, gradient);
                    }
                }
            }
        }
    };
}
