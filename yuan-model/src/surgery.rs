//! Cutting a model: which slices of which parameters remain after a prune.
//!
//! [`PrunableExperts`] is all that a model must tell about itself; what is done with it knows no Yuan. The
//! cut keeps every parameter's id, so that whatever is tied to it (gradients, optimizer moments) can be cut
//! by the same [`Selection`]s.

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{Int, Tensor, TensorData},
};

use crate::{ModelError, YuanModel, named};

/// A parameter with an axis along which the experts of one layer lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertAxis {
    /// The parameter.
    pub param: ParamId,
    /// The axis.
    pub axis: usize,
    /// Blocks along the axis that each hold every expert once, one after the other; usually 1.
    pub blocks: usize,
}

/// A model whose experts can be pruned and rearranged; it need not be a Yuan model.
pub trait PrunableExperts: Module {
    /// Experts of every mixture-of-experts layer.
    fn experts_per_layer(&self) -> Vec<usize>;

    /// Experts that each token visits.
    fn top_k(&self) -> usize;

    /// For every layer: the parameters in which its experts lie, the router's included.
    fn expert_axes(&self) -> Vec<Vec<ExpertAxis>>;

    /// Takes note of the number of experts that every layer has after its parameters were cut.
    fn set_experts_per_layer(&mut self, experts_per_layer: Vec<usize>);

    /// Keeps the listed experts of every layer, in the listed order, and returns what was cut where.
    ///
    /// # Errors
    ///
    /// If a layer is missing, or keeps an unknown expert, one twice, or fewer than `top_k`; the model comes
    /// back unchanged with what is wrong.
    fn keep_experts(self, kept: &[Vec<usize>]) -> Result<(Self, Vec<Selection>), (Self, ModelError)> {
        let selections = match selections(&self, kept) {
            Ok(selections) => selections,
            Err(error) => return Err((self, error)),
        };
        let mut model = self.map(&mut Cut { selections: &selections });
        model.set_experts_per_layer(kept.iter().map(Vec::len).collect());
        Ok((model, selections))
    }
}

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

impl PrunableExperts for YuanModel {
    fn experts_per_layer(&self) -> Vec<usize> {
        self.config().experts_per_layer.clone()
    }

    fn top_k(&self) -> usize {
        self.config().moe_top_k
    }

    fn expert_axes(&self) -> Vec<Vec<ExpertAxis>> {
        let layer = |block: &crate::Block| {
            let (router, experts) = (&block.moe.router, &block.moe.experts);
            let whole = |param, axis| ExpertAxis { param, axis, blocks: 1 };
            let bias = router.selection_bias.as_ref().map(|bias| whole(bias.id, 0));
            let weight = ExpertAxis { param: router.weight.id, axis: 1, blocks: router.blocks() };
            let experts = [whole(experts.gate_up.id, 0), whole(experts.down.id, 0)];
            std::iter::once(weight).chain(bias).chain(experts).collect()
        };
        self.blocks.iter().map(layer).collect()
    }

    fn set_experts_per_layer(&mut self, experts_per_layer: Vec<usize>) {
        self.config_mut().experts_per_layer = experts_per_layer;
    }
}

fn selections<M: PrunableExperts>(model: &M, kept: &[Vec<usize>]) -> Result<Vec<Selection>, ModelError> {
    let (layers, axes) = (model.experts_per_layer(), model.expert_axes());
    if kept.len() != layers.len() {
        return Err(ModelError::LayerCount { expected: layers.len(), found: kept.len() });
    }
    if axes.len() != layers.len() {
        return Err(ModelError::LayerCount { expected: layers.len(), found: axes.len() });
    }
    let parameters = named::parameter_names(model);
    let mut selections = Vec::new();
    for (layer, ((kept, &experts), axes)) in kept.iter().zip(&layers).zip(axes).enumerate() {
        check_kept(layer, kept, experts, model.top_k())?;
        for ExpertAxis { param, axis, blocks } in axes {
            // A model that describes itself wrongly would be cut into pieces that do not fit.
            let shape = parameters.iter().find(|name| name.id == param).map(|name| &name.shape[..]);
            if shape.and_then(|shape| shape.get(axis)) != Some(&(blocks * experts)) {
                let reason =
                    format!("no parameter has {blocks} x {experts} slices along axis {axis}: {shape:?}");
                return Err(ModelError::Experts { layer, reason });
            }
            let slices = (0..blocks).flat_map(|block| kept.iter().map(move |e| block * experts + e));
            selections.push(Selection { param, axis, kept: slices.collect() });
        }
    }
    Ok(selections)
}

pub(crate) fn check_kept(
    layer: usize,
    kept: &[usize],
    num_experts: usize,
    top_k: usize,
) -> Result<(), ModelError> {
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
