//! What the loop trains: the small traits a model implements, and Yuan's implementation.
//!
//! To be pruned as well, a model implements [`PrunableExperts`](yuan_model::PrunableExperts).

use burn::{
    module::{Module, list_param_ids},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::Device,
};
use yuan_model::{
    Batch, ConfigError, LossOutput, PrunableExperts,
    named::{self, StoredParameter},
    ranks::Ranks,
};

use crate::{
    AdamW, AdamWConfig, Callback, LossOptions, Pass, TrainConfig, TrainError, gradients,
    sharded::Holders,
};

mod yuan;

/// What a model is, in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSummary {
    /// Parameters; what several ranks hold counts once.
    pub parameters: u64,
    /// Experts of every mixture-of-experts layer; empty for a model without any.
    pub experts_per_layer: Vec<usize>,
}

impl ModelSummary {
    /// That of a model that can be pruned.
    pub fn of_prunable<M: PrunableExperts>(model: &M) -> Self {
        Self { parameters: model.num_parameters(), experts_per_layer: model.experts_per_layer() }
    }
}

/// A model that the [`Trainer`](crate::Trainer) can train and restore.
pub trait LanguageModel: Module {
    /// Loss of a batch, and the balancing losses that are asked for.
    ///
    /// # Errors
    ///
    /// If the device fails, or the batch does not fit it.
    fn loss(&self, batch: Batch, options: LossOptions) -> Result<LossOutput, TrainError>;

    /// Loss of a batch without a graph, and the gradients of `share` times what is minimised; `pass`
    /// is told what is read and gets the gradients, all at once or part by part as they come.
    ///
    /// A model that can save memory by [`recompute`](LossOptions::recompute) does so here.
    ///
    /// # Errors
    ///
    /// As [`loss`](Self::loss).
    fn gradients(
        &self,
        batch: Batch,
        options: LossOptions,
        share: f64,
        pass: &mut dyn Pass,
    ) -> Result<LossOutput, TrainError> {
        pass.before(&list_param_ids(self));
        let (output, gradients) = gradients::of_loss(self, self.loss(batch, options)?, share);
        pass.take(gradients);
        Ok(output)
    }

    /// The same with the gradients of all parameters together.
    ///
    /// # Errors
    ///
    /// As [`loss`](Self::loss).
    fn loss_and_gradients(
        &self,
        batch: Batch,
        options: LossOptions,
        share: f64,
    ) -> Result<(LossOutput, GradientsParams), TrainError> {
        struct All<'a, M>(&'a M, GradientsAccumulator<M>);
        impl<M: Module> Pass for All<'_, M> {
            fn take(&mut self, gradients: GradientsParams) {
                self.1.accumulate(self.0, gradients);
            }
        }
        let mut all = All(self, GradientsAccumulator::new());
        let output = self.gradients(batch, options, share, &mut all)?;
        Ok((output, all.1.grads()))
    }

    /// What the settings of a run ask of this kind of model: pruning and balancing by biases.
    ///
    /// The default suits a model that can do neither, and refuses settings that ask for it. A model
    /// that implements [`PrunableExperts`](yuan_model::PrunableExperts) returns
    /// [`PruneExperts::boxed`](crate::PruneExperts::boxed), one with selection biases
    /// [`BalanceBias::boxed`](crate::BalanceBias::boxed) before it.
    ///
    /// # Errors
    ///
    /// If a setting asks for something that the model cannot do.
    fn callbacks(config: &TrainConfig) -> Result<Vec<Box<dyn Callback<Self>>>, TrainError> {
        config.refuse_pruning()?;
        config.refuse_bias_balancing()?;
        Ok(Vec::new())
    }

    /// Size of the model and, if it is a mixture of experts, its experts: a model that can be
    /// pruned returns [`ModelSummary::of_prunable`].
    fn summary(&self) -> ModelSummary {
        let mut parameters = 0;
        for stored in self.stored_parameters() {
            parameters += stored.shape.iter().product::<usize>() as u64;
        }
        ModelSummary { parameters, experts_per_layer: Vec::new() }
    }

    /// The parameters as they are saved, and what holds them: by default each by itself.
    fn stored_parameters(&self) -> Vec<StoredParameter> {
        named::stored_parameters(self)
    }

    /// The ranks that the model is spread over, if it is: this one holds a part of it, and
    /// [`stored_parameters`](Self::stored_parameters) says which.
    fn ranks(&self) -> Option<&Ranks> {
        None
    }

    /// Everything needed to build a model of this shape anew, as JSON.
    fn config_json(&self) -> String;

    /// Builds a model from what [`config_json`](Self::config_json) wrote, with fresh weights.
    ///
    /// # Errors
    ///
    /// If the text is no configuration of this kind of model.
    fn from_config_json(text: &str, device: &Device) -> Result<Self, ConfigError>;

    /// The same for the part of one rank.
    ///
    /// # Errors
    ///
    /// As [`from_config_json`](Self::from_config_json), and if the model cannot be spread, which is
    /// the default.
    fn from_config_json_on_rank(
        _text: &str,
        _device: &Device,
        _ranks: &Ranks,
    ) -> Result<Self, ConfigError> {
        Err(ConfigError::Unsupported {
            key: "ranks",
            value: "more than one".into(),
            reason: "this kind of model lives on one device",
        })
    }
}

/// A fresh optimizer for a model, which may be spread over ranks.
pub(crate) fn optimizer_for<M: LanguageModel>(config: &AdamWConfig, model: &M) -> AdamW {
    let holders = model.ranks().map(|ranks| Holders::new(ranks, &model.stored_parameters()));
    AdamW::new(config).over_ranks(holders)
}

/// A model whose routers choose by score plus a bias that balancing without an auxiliary loss
/// moves.
pub trait SelectionBias: Sized {
    /// Whether the model has such biases.
    fn has_selection_bias(&self) -> bool;

    /// Adds a number to the bias of every expert of every layer.
    fn shift_selection_bias(self, shifts: &[Vec<f32>]) -> Self;
}
