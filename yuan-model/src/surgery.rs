//! Cutting a model: which slices of which parameters remain after a prune.
//!
//! [`PrunableExperts`] is all that a model must tell about itself; what is done with it knows no
//! Yuan. The cut keeps every parameter's id, so that whatever is tied to it (gradients, optimizer
//! moments) can be cut by the same [`Selection`]s.

use std::fmt;

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{Int, Tensor, TensorData},
};

use crate::{
    ModelError, YuanConfig, YuanModel, named,
    ranks::{ExpertMove, evenly},
};

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
///
/// ```
/// use burn::tensor::Device;
/// use yuan_model::{PrunableExperts, YuanConfig, YuanModel};
///
/// let model = YuanModel::new(&YuanConfig::tiny(96), &Device::flex())?;
/// // Keep six experts of the first layer, in a new order, and all of the second.
/// let kept = [vec![7, 0, 3, 4, 1, 6], (0..8).collect()];
/// let (model, selections) = model.keep_experts(&kept)?;
/// assert_eq!(model.experts_per_layer(), [6, 8]);
/// // What was cut where, for the optimizer's moments: router, gate and up, down of each layer.
/// assert_eq!(selections.len(), 6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait PrunableExperts: Module {
    /// Experts of every mixture-of-experts layer.
    fn experts_per_layer(&self) -> Vec<usize>;

    /// Experts that each token visits.
    fn top_k(&self) -> usize;

    /// For every layer: the parameters in which its experts lie, the router's included.
    fn expert_axes(&self) -> Vec<Vec<ExpertAxis>>;

    /// Parameters of the model; what several ranks hold counts once.
    fn num_parameters(&self) -> u64 {
        named::parameter_names(self).iter().map(|name| name.shape.num_elements() as u64).sum()
    }

    /// Parameters that one expert of the first layer has, its part of the router included; none if
    /// there is no such layer.
    fn parameters_per_expert(&self) -> Option<u64> {
        let experts = *self.experts_per_layer().first()?;
        let axes = self.expert_axes().into_iter().next()?;
        let parameters = named::parameter_names(self);
        let in_layer =
            parameters.iter().filter(|name| axes.iter().any(|axis| axis.param == name.id));
        let elements: u64 = in_layer.map(|name| name.shape.num_elements() as u64).sum();
        Some(elements / experts.max(1) as u64)
    }

    /// Takes note of the number of experts that every layer has after its parameters were cut.
    fn set_experts_per_layer(&mut self, experts_per_layer: Vec<usize>);

    /// Keeps the listed experts of every layer, in the listed order, and returns what was cut
    /// where.
    ///
    /// # Errors
    ///
    /// If a layer is missing, or keeps an unknown expert, one twice, or fewer than `top_k`; the
    /// model comes back unchanged with what is wrong.
    fn keep_experts(self, kept: &[Vec<usize>]) -> Result<(Self, Vec<Selection>), RefusedCut<Self>> {
        keep_slices(self, kept)
    }
}

/// Cuts every parameter with an axis of experts along it.
fn keep_slices<M: PrunableExperts>(
    model: M,
    kept: &[Vec<usize>],
) -> Result<(M, Vec<Selection>), RefusedCut<M>> {
    let selections = match selections(&model, kept) {
        Ok(selections) => selections,
        Err(error) => return Err(RefusedCut { model: Box::new(model), error }),
    };
    let mut model = model.map(&mut Cut { selections: &selections });
    model.set_experts_per_layer(kept.iter().map(Vec::len).collect());
    Ok((model, selections))
}

/// A cut that was not made: what is wrong with it, and the model as it was.
///
/// It is an error like any other; `?` drops the model.
#[derive(Debug)]
pub struct RefusedCut<M> {
    /// The model, unchanged.
    pub model: Box<M>,
    /// What is wrong.
    pub error: ModelError,
}

impl<M> fmt::Display for RefusedCut<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// The sentence holds its cause, which is therefore no `source`.
impl<M: fmt::Debug> std::error::Error for RefusedCut<M> {}

impl<M> From<RefusedCut<M>> for ModelError {
    fn from(refused: RefusedCut<M>) -> Self {
        refused.error
    }
}

/// The slices that a parameter consists of after a cut, in their new order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The parameter.
    pub param: ParamId,
    /// Axis that is cut.
    pub axis: usize,
    /// Old indices along the axis, in the new order.
    pub kept: Vec<usize>,
    /// How many of these slices came from another rank.
    pub moved: usize,
    /// How the slices travel, where ranks hold them; they are the first axis then.
    pub over_ranks: Option<ExpertMove>,
}

impl Selection {
    /// A selection among a parameter's own slices.
    pub fn within(param: ParamId, axis: usize, kept: Vec<usize>) -> Self {
        Self { param, axis, kept, moved: 0, over_ranks: None }
    }

    /// The remaining slices of a tensor of the parameter's shape, on its device and without a
    /// graph; where ranks hold them, every rank of a row calls this together.
    pub fn apply<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
        match &self.over_ranks {
            Some(experts) => experts.apply(tensor.inner()),
            None => select(tensor.inner(), self.axis, &self.kept),
        }
    }
}

impl Selection {
    /// The same of a tensor that holds the values of this shape one after the other.
    ///
    /// # Panics
    ///
    /// As [`apply`](Self::apply), and if the shape has not as many elements.
    pub fn apply_flat(&self, flat: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        let axis = self.axis;
        let (outer, inner) = (shape[..axis].iter().product(), shape[axis + 1..].iter().product());
        // What travels lies along the first axis, which no outer one precedes.
        match &self.over_ranks {
            Some(experts) => experts.apply(flat.reshape([shape[axis], inner])).flatten(0, 1),
            None => select(flat.reshape([outer, shape[axis], inner]), 1, &self.kept).flatten(0, 2),
        }
    }
}

/// The slices of a tensor at `indices` along `axis`.
pub(crate) fn select<const D: usize>(
    tensor: Tensor<D>,
    axis: usize,
    indices: &[usize],
) -> Tensor<D> {
    if indices.iter().copied().eq(0..tensor.dims()[axis]) {
        return tensor;
    }
    let indices: Vec<i64> = indices.iter().map(|&i| i as i64).collect();
    let indices =
        Tensor::<1, Int>::from_data(TensorData::from(indices.as_slice()), &tensor.device());
    tensor.select(axis, indices)
}

/// A parameter with another value, which may have another shape: id and gradient setting stay.
pub fn with_value<const D: usize>(
    param: Param<Tensor<D>>,
    value: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> Param<Tensor<D>> {
    param.map(|tensor| {
        let (autodiff, strategy) =
            (tensor.device().is_autodiff(), tensor.gradient_checkpointing_strategy());
        let requires_grad = tensor.is_require_grad();
        let value = value(tensor);
        match strategy {
            Some(strategy) if autodiff => value
                .autodiff()
                .with_gradient_checkpointing_strategy(strategy)
                .set_require_grad(requires_grad),
            _ => value,
        }
    })
}

impl PrunableExperts for YuanModel {
    fn experts_per_layer(&self) -> Vec<usize> {
        self.config().experts_per_layer.clone()
    }

    fn top_k(&self) -> usize {
        self.config().top_k
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

    fn num_parameters(&self) -> u64 {
        self.config().parameter_count().total()
    }

    fn parameters_per_expert(&self) -> Option<u64> {
        let experts = &self.blocks.first()?.moe;
        let slice = |shape: burn::tensor::Shape| shape[1..].iter().product::<usize>();
        let own = slice(experts.experts.gate_up.lazy_shape())
            + slice(experts.experts.down.lazy_shape())
            + self.config().hidden_size * experts.router.blocks()
            + usize::from(experts.router.selection_bias.is_some());
        Some(own as u64)
    }

    fn set_experts_per_layer(&mut self, experts_per_layer: Vec<usize>) {
        self.config_mut().experts_per_layer = experts_per_layer;
    }

    fn keep_experts(self, kept: &[Vec<usize>]) -> Result<(Self, Vec<Selection>), RefusedCut<Self>> {
        match self.ranks().cloned() {
            None => keep_slices(self, kept),
            Some(ranks) => {
                let placement = in_equal_parts(kept, ranks.expert());
                self.place_experts(&placement)
            }
        }
    }
}

fn selections<M: PrunableExperts>(
    model: &M,
    kept: &[Vec<usize>],
) -> Result<Vec<Selection>, ModelError> {
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
                let shape = shape.map(<[usize]>::to_vec);
                return Err(ModelError::ExpertAxis { layer, blocks, experts, axis, shape });
            }
            let slices =
                (0..blocks).flat_map(|block| kept.iter().map(move |e| block * experts + e));
            selections.push(Selection::within(param, axis, slices.collect()));
        }
    }
    Ok(selections)
}

/// The kept experts of every layer in their order, cut into parts that are as equal as can be: the
/// groups of a plan that has as many, or a multiple.
pub(crate) fn in_equal_parts(kept: &[Vec<usize>], parts: usize) -> Vec<Vec<Vec<usize>>> {
    let of_layer = |kept: &Vec<usize>| {
        let mut rest = kept.as_slice();
        let mut take = |size| {
            let (part, behind) = rest.split_at(size);
            rest = behind;
            part.to_vec()
        };
        evenly(kept.len(), parts).into_iter().map(&mut take).collect()
    };
    kept.iter().map(of_layer).collect()
}

/// Checks that the experts of every layer, `placement[layer][rank]`, are some of its own and are
/// spread over all ranks.
pub(crate) fn check_placement(
    config: &YuanConfig,
    placement: &[Vec<Vec<usize>>],
    ranks: usize,
) -> Result<(), ModelError> {
    let layers = config.experts_per_layer.len();
    if placement.len() != layers {
        return Err(ModelError::LayerCount { expected: layers, found: placement.len() });
    }
    for (layer, groups) in placement.iter().enumerate() {
        if groups.len() != ranks || groups.iter().any(Vec::is_empty) {
            return Err(ModelError::NotSpread { layer, ranks });
        }
        check_kept(layer, &groups.concat(), config.experts_per_layer[layer], config.top_k)?;
    }
    Ok(())
}

pub(crate) fn check_kept(
    layer: usize,
    kept: &[usize],
    num_experts: usize,
    top_k: usize,
) -> Result<(), ModelError> {
    if kept.len() < top_k {
        return Err(ModelError::TooFewKept { layer, kept: kept.len(), top_k });
    }
    let mut seen = vec![false; num_experts];
    for &expert in kept {
        match seen.get_mut(expert) {
            None => return Err(ModelError::NoSuchExpert { layer, expert, num_experts }),
            Some(true) => return Err(ModelError::KeptTwice { layer, expert }),
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
        let Some(selection) = self.selections.iter().find(|selection| selection.param == param.id)
        else {
            return param;
        };
        with_value(param, |tensor| selection.apply(tensor))
    }
}
