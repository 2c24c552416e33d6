//! What the loop trains: the small traits a model implements, and Yuan's implementation.
//!
//! To be pruned as well, a model implements [`PrunableExperts`](yuan_model::PrunableExperts).

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor},
};
use yuan_model::{
    BalanceLosses, ConfigError, ForwardOptions, YuanConfig, YuanModel,
    loss::{masked_mean, token_losses},
};

/// Rows of tokens with what to predict at each of them.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[batch, seq]`
    pub input_ids: Tensor<2, Int>,
    /// The token that follows each input, `[batch, seq]`.
    pub labels: Tensor<2, Int>,
    /// Position of each token in its document, `[batch, seq]`.
    pub position_ids: Tensor<2, Int>,
}

/// Loss of a batch and where its tokens went.
#[derive(Debug, Clone)]
pub struct LossOutput {
    /// Mean next-token cross-entropy, `[1]`.
    pub loss: Tensor<1>,
    /// What is minimised beside it: the weighted balancing losses, `[1]`, if any is on.
    pub balance_loss: Option<Tensor<1>>,
    /// Per layer: tokens that each expert received, `[num_experts]`.
    pub tokens_per_expert: Vec<Tensor<1, Int>>,
}

/// A model that the [`Trainer`](crate::Trainer) can train and restore.
pub trait LanguageModel: Module {
    /// Loss of a batch, and the balancing losses that are asked for.
    fn loss(&self, batch: Batch, balance: BalanceLosses) -> LossOutput;

    /// Everything needed to build a model of this shape anew, as JSON.
    fn config_json(&self) -> String;

    /// Builds a model from what [`config_json`](Self::config_json) wrote, with fresh weights.
    ///
    /// # Errors
    ///
    /// If the text is no configuration of this kind of model.
    fn from_config_json(text: &str, device: &Device) -> Result<Self, ConfigError>;
}

/// A model whose routers choose by score plus a bias that balancing without an auxiliary loss moves.
pub trait SelectionBias: Sized {
    /// Whether the model has such biases.
    fn has_selection_bias(&self) -> bool;

    /// Adds a number to the bias of every expert of every layer.
    fn shift_selection_bias(self, shifts: &[Vec<f32>]) -> Self;
}

impl LanguageModel for YuanModel {
    fn loss(&self, batch: Batch, balance: BalanceLosses) -> LossOutput {
        let options =
            ForwardOptions { position_ids: Some(batch.position_ids), balance, ..ForwardOptions::default() };
        let output = self.forward(batch.input_ids, options);
        let loss = masked_mean(token_losses(output.logits, batch.labels), None);
        LossOutput { loss, balance_loss: output.balance_loss, tokens_per_expert: output.tokens_per_expert }
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
