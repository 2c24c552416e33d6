//! Yuan's model on one device, for the loop.

use burn::{
    optim::GradientsParams,
    tensor::{Device, FloatDType, Tensor},
};
use yuan_model::{
    BalanceLosses, ConfigError, ForwardOptions, YuanConfig, YuanModel, attention::DocumentMask,
    loss::masked_mean, moe::MoeOptions, rope::Rotary,
};

use super::{
    Batch, LanguageModel, LossOptions, LossOutput, SelectionBias,
    by_layer::{self, LayerOutput, Layered},
};
use crate::TrainError;

impl LanguageModel for YuanModel {
    type Place = Device;

    fn loss(&self, batch: Batch, options: LossOptions) -> Result<LossOutput, TrainError> {
        let options = ForwardOptions {
            position_ids: Some(batch.position_ids),
            balance: options.balance,
            compute_dtype: Some(options.precision.dtype()),
            ..ForwardOptions::default()
        };
        let output = self.forward_hidden(batch.input_ids, options);
        let loss = masked_mean(self.token_losses(output.hidden, batch.labels), None);
        Ok(LossOutput {
            loss,
            balance_loss: output.balance_loss,
            tokens_per_expert: output.tokens_per_expert,
            rows_per_device: Vec::new(),
        })
    }

    fn loss_and_gradients(
        &self,
        batch: Batch,
        options: LossOptions,
        share: f64,
    ) -> Result<(LossOutput, GradientsParams), TrainError> {
        by_layer::loss_and_gradients(self, batch, options, share)
    }

    fn config_json(&self) -> String {
        self.config().to_json()
    }

    fn from_config_json(text: &str, device: &Device) -> Result<Self, ConfigError> {
        Self::new(&YuanConfig::from_json(text)?, device)
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

/// Tokens and what follows from their positions.
pub(super) struct Inputs {
    batch: Batch,
    rotary: Rotary,
    documents: Option<DocumentMask>,
}

impl Layered for YuanModel {
    type Inputs = Inputs;

    fn inputs(&self, batch: Batch) -> Result<Inputs, TrainError> {
        let ([_, seq], device) = (batch.input_ids.dims(), batch.input_ids.device());
        let positions = batch.position_ids.clone();
        let documents =
            self.config().reset_attention_mask.then(|| DocumentMask::new(positions.clone()));
        let rotary = Rotary::new(self.config(), Some(positions), seq, &device);
        Ok(Inputs { batch, rotary, documents })
    }

    fn num_layers(&self) -> usize {
        self.blocks.len()
    }

    fn embed(&self, inputs: &Inputs, dtype: FloatDType) -> Vec<Tensor<3>> {
        vec![YuanModel::embed(self, inputs.batch.input_ids.clone(), Some(dtype))]
    }

    fn layer(
        &self,
        layer: usize,
        x: Vec<Tensor<3>>,
        inputs: &Inputs,
        balance: BalanceLosses,
    ) -> Result<LayerOutput, TrainError> {
        let x = only(x)?;
        let options = MoeOptions { balance, ..MoeOptions::default() };
        let output =
            self.blocks[layer].forward(x, &inputs.rotary, inputs.documents.as_ref(), options);
        Ok(LayerOutput {
            hidden: vec![output.hidden],
            tokens_per_expert: output.tokens_per_expert,
            rows_per_device: None,
            balance_loss: output.balance_loss,
        })
    }

    fn loss_of_hidden(&self, x: Vec<Tensor<3>>, inputs: &Inputs) -> Result<Tensor<1>, TrainError> {
        let hidden = self.final_norm.forward(only(x)?);
        let losses = self.token_losses(hidden, inputs.batch.labels.clone());
        Ok(masked_mean(losses, None))
    }
}

/// The hidden state of the one device.
fn only(x: Vec<Tensor<3>>) -> Result<Tensor<3>, TrainError> {
    let missing = || TrainError::Device("there is no hidden state".into());
    x.into_iter().next().ok_or_else(missing)
}
