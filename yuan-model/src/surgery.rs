//! Cutting a model: which slices of which parameters remain after a prune.
//!
//! The cut keeps every parameter's id, so that whatever is tied to it (gradients, optimizer
//! moments) can be cut by the same [`Selection`]s.

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{Int, Tensor, TensorData},
};

use crate::{ModelError, YuanModel};

/// Slices of one parameter that remain, in their new order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The parameter.
    pub param: ParamId,
    /// Axis that is cut.
    pub axis: usize,
    /// Old indices along the axis, in the new order.
    pub kept: Vec<usize>,
}

impl Selection {
    /// The remaining slices of a tensor of the parameter's shape, on its device and without a graph.
    pub fn apply<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
        let tensor = tensor.inner();
        let indices: Vec<i64> = self.kept.iter().map(|&i| i as i64).collect();
        let indices = Tensor::<1, Int>::from_data(TensorData::from(indices.as_slice()), &tensor.device());
        tensor.select(self.axis, indices)
    }
}

impl YuanModel {
    /// Keeps the listed experts of every layer, in the listed order, and returns what was cut where.
    ///
    /// Expert weights and router are cut alike; parameter ids stay; the model's config says the new counts.
    ///
    /// # Errors
    ///
    /// If a layer is missing, or keeps an unknown expert, one twice, or fewer than `top_k`; the
    /// model is consumed only on success.
    pub fn keep_experts(mut self, kept: &[Vec<usize>]) -> Result<(Self, Vec<Selection>), (Self, ModelError)> {
        let selections = match self.selections(kept) {
            Ok(selections) => selections,
            Err(error) => return Err((self, error)),
        };
        self = self.map(&mut Cut { selections: &selections });
        self.config_mut().experts_per_layer = kept.iter().map(Vec::len).collect();
        Ok((self, selections))
    }

    fn selections(&self, kept: &[Vec<usize>]) -> Result<Vec<Selection>, ModelError> {
        if kept.len() != self.blocks.len() {
            return Err(ModelError::LayerCount { expected: self.blocks.len(), found: kept.len() });
        }
        let mut selections = Vec::with_capacity(3 * kept.len());
        for (layer, (block, kept)) in self.blocks.iter().zip(kept).enumerate() {
            let (router, experts) = (&block.moe.router, &block.moe.experts);
            check_kept(layer, kept, router.num_experts(), router.top_k())?;
            let columns =
                (0..router.blocks()).flat_map(|i| kept.iter().map(move |e| i * router.num_experts() + e));
            selections.push(Selection { param: router.weight.id, axis: 1, kept: columns.collect() });
            for param in [experts.gate_up.id, experts.down.id] {
                selections.push(Selection { param, axis: 0, kept: kept.clone() });
            }
        }
        Ok(selections)
    }
}

fn check_kept(layer: usize, kept: &[usize], num_experts: usize, top_k: usize) -> Result<(), ModelError> {
    let refuse = |reason| Err(ModelError::Experts { layer, reason });
    if kept.len() < top_k {
        return refuse(format!("{} experts are fewer than top_k = {top_k}", kept.len()));
    }
    let mut seen = vec![false; num_experts];
    for &expert in kept {
        match seen.get_mut(expert) {
            None => return refuse(format!("expert {expert} does not exist among {num_experts}")),
            Some(true) => return refuse(format!("expert {expert} is kept twice")),
            Some(fresh) => *fresh = true,
        }
    }
    Ok(())
}

struct Cut<'a> {
    selections: &'a [Selection],
}

impl ModuleMapper for Cut<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(selection) = self.selections.iter().find(|selection| selection.param == param.id) else {
            return param;
        };
        param.map(|tensor| {
            let (autodiff, strategy) =
                (tensor.device().is_autodiff(), tensor.gradient_checkpointing_strategy());
            let requires_grad = tensor.is_require_grad();
            let cut = selection.apply(tensor);
            match strategy {
                Some(strategy) if autodiff => cut
                    .autodiff()
                    .with_gradient_checkpointing_strategy(strategy)
                    .set_require_grad(requires_grad),
                _ => cut,
            }
        })
    }
}
