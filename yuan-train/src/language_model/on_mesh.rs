//! Yuan's model over a mesh of devices, for the loop.

use yuan_model::{
    ConfigError, DeviceMesh, MeshModel, YuanConfig,
    mesh::{MeshBatch, MeshOutput},
    named::StoredParameter,
};

use super::{Batch, LanguageModel, LossOptions, LossOutput, SelectionBias};
use crate::TrainError;

impl LanguageModel for MeshModel {
    type Place = DeviceMesh;

    fn loss(&self, batch: Batch, options: LossOptions) -> Result<LossOutput, TrainError> {
        if options.recompute.is_some() {
            return Err(TrainError::Setting(
                "a mesh keeps all activations: train without recomputation".into(),
            ));
        }
        let Batch { input_ids, labels, position_ids } = batch;
        let batch = MeshBatch { input_ids, labels, position_ids };
        let MeshOutput { loss, balance_loss, tokens_per_expert, rows_per_device } =
            MeshModel::loss(self, batch, options.balance, options.precision.dtype())?;
        Ok(LossOutput { loss, balance_loss, tokens_per_expert, rows_per_device })
    }

    fn stored_parameters(&self) -> Vec<StoredParameter> {
        MeshModel::stored_parameters(self)
    }

    fn config_json(&self) -> String {
        self.config().to_json()
    }

    fn from_config_json(text: &str, place: &DeviceMesh) -> Result<Self, ConfigError> {
        Self::new(&YuanConfig::from_json(text)?, place)
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
