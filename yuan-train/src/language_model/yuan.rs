//! Yuan's model for the loop.

use burn::tensor::Device;
use yuan_model::{
    Batch, ConfigError, LossOutput, YuanConfig, YuanModel, named::StoredParameter, ranks::Ranks,
};

use crate::{
    BalanceBias, Callback, ImageLoads, LanguageModel, LossOptions, ModelSummary, Pass,
    PruneExperts, SelectionBias, TrainConfig, TrainError, gradients,
};

impl LanguageModel for YuanModel {
    fn loss(&self, batch: Batch, options: LossOptions) -> Result<LossOutput, TrainError> {
        self.check_images(&batch)?;
        Ok(YuanModel::loss(self, batch, options.balance, options.precision.dtype()))
    }

    fn gradients(
        &self,
        batch: Batch,
        options: LossOptions,
        share: f64,
        pass: &mut dyn Pass,
    ) -> Result<LossOutput, TrainError> {
        self.check_images(&batch)?;
        Ok(gradients::of_layers(self, batch, options, share, pass))
    }

    fn callbacks(config: &TrainConfig) -> Result<Vec<Box<dyn Callback<Self>>>, TrainError> {
        // Biases move before a prune is decided.
        let mut callbacks: Vec<Box<dyn Callback<Self>>> = Vec::new();
        callbacks.extend(BalanceBias::boxed(config));
        callbacks.push(Box::new(ImageLoads::default()));
        callbacks.push(PruneExperts::boxed(config)?);
        Ok(callbacks)
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
