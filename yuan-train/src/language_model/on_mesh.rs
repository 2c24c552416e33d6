//! Yuan's model over a mesh of devices, for the loop.

use burn::{
    optim::GradientsParams,
    tensor::{FloatDType, Tensor},
};
use yuan_model::{
    BalanceLosses, ConfigError, DeviceMesh, MeshModel, YuanConfig,
    mesh::{MeshOutput, Shard},
    named::StoredParameter,
};

use super::{
    Batch, LanguageModel, LossOptions, LossOutput, SelectionBias,
    by_layer::{self, LayerOutput, Layered},
};
use crate::TrainError;

impl LanguageModel for MeshModel {
    type Place = DeviceMesh;

    fn loss(&self, batch: Batch, options: LossOptions) -> Result<LossOutput, TrainError> {
        let MeshOutput { loss, balance_loss, tokens_per_expert, rows_per_device } =
            MeshModel::loss(self, batch, options.balance, options.precision.dtype())?;
        Ok(LossOutput { loss, balance_loss, tokens_per_expert, rows_per_device })
    }

    fn loss_and_gradients(
        &self,
        batch: Batch,
        options: LossOptions,
        share: f64,
    ) -> Result<(LossOutput, GradientsParams), TrainError> {
        by_layer::loss_and_gradients(self, batch, options, share)
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

impl Layered for MeshModel {
    type Inputs = Vec<Shard>;

    fn inputs(&self, batch: Batch) -> Result<Vec<Shard>, TrainError> {
        Ok(self.shards(batch)?)
    }

    fn num_layers(&self) -> usize {
        self.config().num_hidden_layers()
    }

    fn embed(&self, inputs: &Vec<Shard>, dtype: FloatDType) -> Vec<Tensor<3>> {
        MeshModel::embed(self, inputs, dtype)
    }

    fn layer(
        &self,
        layer: usize,
        x: Vec<Tensor<3>>,
        inputs: &Vec<Shard>,
        balance: BalanceLosses,
    ) -> Result<LayerOutput, TrainError> {
        let output = MeshModel::layer(self, layer, x, inputs, balance)?;
        Ok(LayerOutput {
            hidden: output.hidden,
            tokens_per_expert: output.tokens_per_expert,
            rows_per_device: Some(output.rows_per_device),
            balance_loss: output.balance_loss,
        })
    }

    fn loss_of_hidden(
        &self,
        x: Vec<Tensor<3>>,
        inputs: &Vec<Shard>,
    ) -> Result<Tensor<1>, TrainError> {
        Ok(MeshModel::loss_of_hidden(self, x, inputs)?)
    }
}
