//! A model of which every rank holds its part: all but the experts, and of those its own.

use std::collections::HashMap;

use burn::tensor::{DType, Device, TensorData};

use super::{ExpertMove, LayerRanks, RankError, Ranks, evenly};
use crate::{
    ConfigError, ModelError, PrunableExperts, RefusedCut, Selection, YuanConfig, YuanModel,
    moe::Experts,
    named::{self, StoredParameter},
    surgery::{check_placement, with_value},
};

impl YuanModel {
    /// The part of this rank, with weights that are yet to be written: drawn anew, they would differ
    /// from rank to rank. The experts of a layer are split as evenly as their number allows.
    ///
    /// # Errors
    ///
    /// If the configuration contradicts itself, or a layer has fewer experts than a row has ranks.
    pub fn new_on_rank(
        config: &YuanConfig,
        ranks: &Ranks,
        device: &Device,
    ) -> Result<Self, ConfigError> {
        ranks.grid().check(config)?;
        let mut model = Self::new(config, device)?;
        for (block, &experts) in model.blocks.iter_mut().zip(&config.experts_per_layer) {
            let spread = LayerRanks::new(ranks.clone(), evenly(experts, ranks.expert()));
            block.moe.experts = Experts::some(config, spread.own_experts().len(), device);
            block.moe.ranks = Some(spread);
        }
        Ok(model)
    }

    /// The part of this rank of a model that every rank has whole.
    ///
    /// # Errors
    ///
    /// As [`new_on_rank`](Self::new_on_rank).
    pub fn part_of(whole: &Self, ranks: &Ranks, device: &Device) -> Result<Self, ConfigError> {
        let empty = Self::new_on_rank(whole.config(), ranks, device)?;
        let stored = empty.stored_parameters();
        Ok(named::write_stored(empty, &stored, |parameter| {
            let slices = parameter.is_spread().then(|| parameter.held.clone());
            named::read_part(whole, &parameter.path, slices)
        }))
    }

    /// The same weights on every rank: those of a model that the first rank has whole, parameter by
    /// parameter. What is not drawn yet there is drawn when its turn comes and gone after it, so that
    /// no device ever holds the whole model. All ranks call it together.
    ///
    /// # Errors
    ///
    /// If a rank is gone.
    ///
    /// # Panics
    ///
    /// If the model is not spread over ranks.
    pub fn filled_from_first(mut self, mut whole: Option<Self>) -> Result<Self, RankError> {
        let world = self.ranks().expect("a model that is spread over ranks").world().clone();
        for parameter in self.stored_parameters() {
            let range = [parameter.held.start as u64, parameter.held.end as u64];
            let held = world.gather_counts(&range)?;
            let mut parts = vec![Vec::new(); world.size()];
            if let Some(model) = whole.take() {
                let (rest, data) = named::take_parameter(model, &parameter.path);
                whole = Some(rest);
                let data = data.expect("the whole model has every parameter");
                let data = data.convert::<f32>();
                let slice = 4 * parameter.slice_len();
                for (part, held) in parts.iter_mut().zip(&held) {
                    let bytes = held[0] as usize * slice..held[1] as usize * slice;
                    *part = data.as_bytes()[bytes].to_vec();
                }
            }
            let bytes = world.exchange(parts)?.swap_remove(0);
            let mut data =
                Some(TensorData::from_bytes_vec(bytes, parameter.held_shape(), DType::F32));
            self = named::write_stored(self, &[parameter], |_| data.take());
        }
        Ok(self)
    }

    /// The ranks that the model is spread over, if it is.
    pub fn ranks(&self) -> Option<&Ranks> {
        Some(self.blocks.first()?.moe.ranks.as_ref()?.ranks())
    }

    /// Experts of every layer on each rank of a row, `[layer][rank]`; empty on one device.
    pub fn placement(&self) -> Vec<Vec<usize>> {
        let spread = self.blocks.iter().filter_map(|block| block.moe.ranks.as_ref());
        spread.map(|layer| layer.experts_per_rank().to_vec()).collect()
    }

    /// The parameters of the whole model, and which slices of them this rank holds.
    pub fn stored_parameters(&self) -> Vec<StoredParameter> {
        let mut layer_of = HashMap::new();
        for moe in self.blocks.iter().map(|block| &block.moe) {
            for weights in [&moe.experts.gate_up, &moe.experts.down] {
                layer_of.extend(moe.ranks.as_ref().map(|layer| (weights.id, layer)));
            }
        }
        let mut stored = named::stored_parameters(self);
        for parameter in &mut stored {
            if let Some(layer) = layer_of.get(&parameter.id) {
                parameter.shape[0] = layer.experts_per_rank().iter().sum();
                parameter.held = layer.own_experts();
            }
        }
        stored
    }

    /// Keeps the listed experts of every layer in this order, on the ranks of a row as listed:
    /// `placement[layer][rank]` old numbers. Experts that a rank lacks come from another of its row,
    /// and nothing else travels. Every rank calls it together, with the same lists.
    ///
    /// # Errors
    ///
    /// As [`keep_experts`](PrunableExperts::keep_experts), and if the model is not spread over
    /// ranks, or a layer not over all of them.
    ///
    /// # Panics
    ///
    /// If a rank is gone.
    pub fn place_experts(
        mut self,
        placement: &[Vec<Vec<usize>>],
    ) -> Result<(Self, Vec<Selection>), RefusedCut<Self>> {
        if let Err(error) = self.check_placement(placement) {
            return Err(RefusedCut { model: Box::new(self), error });
        }
        let mut selections = Vec::new();
        for (block, groups) in self.blocks.iter_mut().zip(placement) {
            let (moe, kept) = (&mut block.moe, groups.concat());
            let layer = moe.ranks.take().expect("checked above");
            let experts: usize = layer.experts_per_rank().iter().sum();
            let columns: Vec<usize> = (0..moe.router.blocks())
                .flat_map(|block| kept.iter().map(move |expert| block * experts + expert))
                .collect();
            let selection = Selection::within(moe.router.weight.id, 1, columns);
            moe.router.weight =
                with_value(moe.router.weight.clone(), |weight| selection.apply(weight));
            selections.push(selection);
            moe.router.selection_bias = moe.router.selection_bias.take().map(|bias| {
                let selection = Selection::within(bias.id, 0, kept.clone());
                let cut = with_value(bias, |bias| selection.apply(bias));
                selections.push(selection);
                cut
            });
            let own = groups[layer.ranks().row().rank()].clone();
            let experts = ExpertMove::new(&layer, groups);
            for weights in [&mut moe.experts.gate_up, &mut moe.experts.down] {
                let selection = Selection {
                    moved: experts.moved(),
                    over_ranks: Some(experts.clone()),
                    ..Selection::within(weights.id, 0, own.clone())
                };
                *weights = with_value(weights.clone(), |weights| selection.apply(weights));
                selections.push(selection);
            }
            let sizes = groups.iter().map(Vec::len).collect();
            moe.ranks = Some(LayerRanks::new(layer.ranks().clone(), sizes));
        }
        let experts_per_layer = placement.iter().map(|groups| groups.concat().len()).collect();
        self.set_experts_per_layer(experts_per_layer);
        Ok((self, selections))
    }

    fn check_placement(&self, placement: &[Vec<Vec<usize>>]) -> Result<(), ModelError> {
        let check = |ranks| check_placement(self.config(), placement, ranks);
        match self.ranks() {
            Some(ranks) => check(ranks.expert()),
            None => check(1).and(Err(ModelError::NotSpread { layer: 0, ranks: 1 })),
        }
    }
}
