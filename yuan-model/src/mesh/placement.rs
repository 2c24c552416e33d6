//! Which device holds what: parameters as they are saved, and experts that move.

use std::collections::HashMap;

use burn::{
    module::{Param, ParamId},
    tensor::Tensor,
};

use super::MeshModel;
use crate::{
    ExpertAxis, ModelError, PrunableExperts, RefusedCut, Selection, YuanConfig,
    named::{self, StoredParameter, StoredPart},
    surgery::{self, with_value},
};

impl MeshModel {
    /// Parameters as one device would hold them, and the copies and parts of them that the devices
    /// hold.
    pub fn stored_parameters(&self) -> Vec<StoredParameter> {
        let names: Vec<_> = self.replicas.iter().map(named::parameter_names).collect();
        let layer_of: HashMap<ParamId, usize> = self.replicas[0]
            .blocks
            .iter()
            .enumerate()
            .flat_map(|(layer, block)| expert_ids(&block.moe.experts).map(|id| (id, layer)))
            .collect();
        let stored = |(index, name): (usize, &named::ParameterName)| {
            let id = |replica: usize| names[replica][index].id;
            let Some(&layer) = layer_of.get(&name.id) else {
                let copies = (0..names.len()).map(id).collect();
                let shape = name.shape.to_vec();
                return StoredParameter {
                    path: name.path.clone(),
                    parts: vec![StoredPart { slices: shape.first().copied().unwrap_or(1), copies }],
                    shape,
                };
            };
            let width = self.mesh.expert();
            let part = |(place, &slices): (usize, &usize)| StoredPart {
                copies: (0..self.mesh.data()).map(|row| id(row * width + place)).collect(),
                slices,
            };
            let mut shape = name.shape.to_vec();
            shape[0] = self.placement[layer].iter().sum();
            let parts = self.placement[layer].iter().enumerate().map(part).collect();
            StoredParameter { path: name.path.clone(), shape, parts }
        };
        names[0].iter().enumerate().map(stored).collect()
    }

    /// Keeps the listed experts of every layer in this order, split over the devices of a row as
    /// listed: `placement[layer][device]` old indices. What a device lacks comes from another of
    /// its row, and nothing else moves.
    ///
    /// # Errors
    ///
    /// As [`keep_experts`](PrunableExperts::keep_experts), and if a layer is not spread over all
    /// devices.
    pub fn place_experts(
        mut self,
        placement: &[Vec<Vec<usize>>],
    ) -> Result<(Self, Vec<Selection>), RefusedCut<Self>> {
        if let Err(error) = self.check_placement(placement) {
            return Err(RefusedCut { model: Box::new(self), error });
        }
        let (width, mut selections) = (self.mesh.expert(), Vec::new());
        for (layer, groups) in placement.iter().enumerate() {
            let kept = groups.concat();
            let experts = self.config.experts_per_layer[layer];
            for replica in &mut self.replicas {
                let router = &mut replica.blocks[layer].moe.router;
                let slices = (0..router.blocks())
                    .flat_map(|block| kept.iter().map(move |e| block * experts + e));
                let selection = Selection::within(router.weight.id, 1, slices.collect());
                cut(&mut router.weight, |weight| selection.apply(weight));
                selections.push(selection);
                if let Some(bias) = &mut router.selection_bias {
                    let selection = Selection::within(bias.id, 0, kept.clone());
                    cut(bias, |bias| selection.apply(bias));
                    selections.push(selection);
                }
            }
            for row in self.replicas.chunks_mut(width) {
                let mut experts: Vec<_> =
                    row.iter_mut().map(|r| &mut r.blocks[layer].moe.experts).collect();
                selections
                    .extend(regroup(experts.iter_mut().map(|e| &mut e.gate_up).collect(), groups));
                selections
                    .extend(regroup(experts.iter_mut().map(|e| &mut e.down).collect(), groups));
            }
            self.placement[layer] = groups.iter().map(Vec::len).collect();
        }
        let experts_per_layer = self.placement.iter().map(|devices| devices.iter().sum()).collect();
        self.set_experts_per_layer(experts_per_layer);
        Ok((self, selections))
    }

    fn check_placement(&self, placement: &[Vec<Vec<usize>>]) -> Result<(), ModelError> {
        surgery::check_placement(&self.config, placement, self.mesh.expert())
    }
}

impl PrunableExperts for MeshModel {
    fn experts_per_layer(&self) -> Vec<usize> {
        self.config.experts_per_layer.clone()
    }

    fn top_k(&self) -> usize {
        self.config.top_k
    }

    /// Those of the first row of devices.
    fn expert_axes(&self) -> Vec<Vec<ExpertAxis>> {
        let of_replica: Vec<_> =
            self.replicas[..self.mesh.expert()].iter().map(PrunableExperts::expert_axes).collect();
        let layer = |layer: usize| {
            let experts = of_replica.iter().flat_map(|axes| axes[layer].iter().rev().take(2).rev());
            let router = &of_replica[0][layer];
            router[..router.len() - 2].iter().chain(experts).copied().collect()
        };
        (0..self.config.experts_per_layer.len()).map(layer).collect()
    }

    fn num_parameters(&self) -> u64 {
        self.config.parameter_count().total()
    }

    fn set_experts_per_layer(&mut self, experts_per_layer: Vec<usize>) {
        for replica in &mut self.replicas {
            replica.set_experts_per_layer(experts_per_layer.clone());
        }
        self.config = YuanConfig { experts_per_layer, ..self.config.clone() };
    }

    /// The kept experts are cut, in their order, into parts as equal as can be: the groups of a
    /// plan that has as many as a row has devices, or a multiple.
    fn keep_experts(self, kept: &[Vec<usize>]) -> Result<(Self, Vec<Selection>), RefusedCut<Self>> {
        let placement = surgery::in_equal_parts(kept, self.mesh.expert());
        self.place_experts(&placement)
    }
}

fn expert_ids(experts: &crate::moe::Experts) -> [ParamId; 2] {
    [experts.gate_up.id, experts.down.id]
}

/// Moves the slices of one parameter among the devices of a row: `groups[device]` lists the old
/// indices that it gets.
fn regroup(params: Vec<&mut Param<Tensor<3>>>, groups: &[Vec<usize>]) -> Vec<Selection> {
    let sources: Vec<_> = params.iter().map(|param| param.id).collect();
    let old: Vec<_> = params.iter().map(|param| param.val()).collect();
    let mut selections = Vec::with_capacity(groups.len());
    for (param, kept) in params.into_iter().zip(groups) {
        let own = Selection::within(param.id, 0, kept.clone());
        let mut selection = Selection { sources: sources.clone(), ..own };
        let (experts, moved) = selection.gather(&old, &param.val().device().inner());
        cut(param, |_| experts);
        selection.moved = moved;
        selections.push(selection);
    }
    selections
}

fn cut<const D: usize>(param: &mut Param<Tensor<D>>, value: impl FnOnce(Tensor<D>) -> Tensor<D>) {
    *param = with_value(param.clone(), value);
}
