//! Yuan's model for the loop, on one device and over a mesh of them.

use burn::{optim::GradientsParams, tensor::Device};
use yuan_model::{
    Batch, ConfigError, DeviceMesh, Layered, LossOutput, MeshModel, PrunableExperts, YuanConfig,
    YuanModel, named::StoredParameter, ranks::Ranks,
};

use crate::{
    BalanceBias, Callback, LanguageModel, LossOptions, ModelSummary, PruneExperts, SelectionBias,
    TrainConfig, TrainError, gradients,
};

impl LanguageModel for YuanModel {
    type Place = Device;

    fn loss(&self, batch: Batch, options: LossOptions) -> Result<LossOutput, TrainError> {
        loss(self, batch, options)
    }

    fn loss_and_gradients(
        &self,
        batch: Batch,
        options: LossOptions,
        share: f64,
    ) -> Result<(LossOutput, GradientsParams), TrainError> {
        gradients::of_layers(self, batch, options, share)
    }

    fn callbacks(config: &TrainConfig) -> Result<Vec<Box<dyn Callback<Self>>>, TrainError> {
        callbacks(config)
    }

    fn summary(&self) -> ModelSummary {
        ModelSummary::of_prunable(self)
    }

    fn stored_parameters(&self) -> Vec<StoredParameter> {
        YuanModel::stored_parameters(self)
    }

    fn ranks(&self) -> Option<&Ranks> {
        YuanModel::ranks(self)
    }

    fn config_json(&self) -> String {
        self.config().to_json()
    }

    fn from_config_json(text: &str, device: &Device) -> Result<Self, ConfigError> {
        Self::new(&YuanConfig::from_json(text)?, device)
    }

    fn from_config_json_on_rank(
        text: &str,
        device: &Device,
        ranks: &Ranks,
    ) -> Result<Self, ConfigError> {
        Self::new_on_rank(&YuanConfig::from_json(text)?, ranks, device)
    }
}

impl SelectionBias for YuanModel {
    fn has_selection_bias(&self) -> bool {
        self.config().router_selection_bias
    }

    fn shift_selection_bias(self, shifts: &[Vec<f32>]) -> Self {
        YuanModel::shift_selection_bias(self, shifts)
    }
}

impl LanguageModel for MeshModel {
    type Place = DeviceMesh;

    fn loss(&self, batch: Batch, options: LossOptions) -> Result<LossOutput, TrainError> {
        loss(self, batch, options)
    }

    fn loss_and_gradients(
        &self,
        batch: Batch,
        options: LossOptions,
        share: f64,
    ) -> Result<(LossOutput, GradientsParams), TrainError> {
        gradients::of_layers(self, batch, options, share)
    }

    fn callbacks(config: &TrainConfig) -> Result<Vec<Box<dyn Callback<Self>>>, TrainError> {
        callbacks(config)
    }

    fn summary(&self) -> ModelSummary {
        ModelSummary::of_prunable(self)
    }

    fn stored_parameters(&self) -> Vec<StoredParameter> {
        MeshModel::stored_parameters(self)
    }

    fn config_json(&self) -> String {
        self.config().to_json()
    }

    fn from_config_json(text: &str, mesh: &DeviceMesh) -> Result<Self, ConfigError> {
        Self::new(&YuanConfig::from_json(text)?, mesh)
    }
}

impl SelectionBias for MeshModel {
    fn has_selection_bias(&self) -> bool {
        self.config().router_selection_bias
    }

    fn shift_selection_bias(self, shifts: &[Vec<f32>]) -> Self {
        MeshModel::shift_selection_bias(self, shifts)
    }
}

fn loss<M: Layered>(
    model: &M,
    batch: Batch,
    options: LossOptions,
) -> Result<LossOutput, TrainError> {
    Ok(model.loss_by_layers(batch, options.balance, options.precision.dtype())?)
}

/// Biases move before a prune is decided.
fn callbacks<M: PrunableExperts + SelectionBias>(
    config: &TrainConfig,
) -> Result<Vec<Box<dyn Callback<M>>>, TrainError> {
    let mut callbacks: Vec<Box<dyn Callback<M>>> = Vec::new();
    callbacks.extend(BalanceBias::boxed(config));
    callbacks.push(PruneExperts::boxed(config)?);
    Ok(callbacks)
}
