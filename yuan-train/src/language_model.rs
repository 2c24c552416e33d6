//! What the loop trains: the two small traits a model implements, and Yuan's implementation.

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor},
};
use yuan_model::{
    ConfigError, ForwardOptions, ModelError, YuanConfig, YuanModel,
    loss::{masked_mean, token_losses},
    surgery::Selection,
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
    /// Per layer: tokens that each expert received, `[num_experts]`.
    pub tokens_per_expert: Vec<Tensor<1, Int>>,
}

/// A model that the [`Trainer`](crate::Trainer) can train and restore.
pub trait LanguageModel: Module {
    /// Loss of a batch.
    fn loss(&self, batch: Batch) -> LossOutput;

    /// Everything needed to build a model of this shape anew, as JSON.
    fn config_json(&self) -> String;

    /// Builds a model from what [`config_json`](Self::config_json) wrote, with fresh weights.
    ///
    /// # Errors
    ///
    /// If the text is no configuration of this kind of model.
    fn from_config_json(text: &str, device: &Device) -> Result<Self, ConfigError>;
}

/// A model whose experts can be pruned and rearranged; it need not be a Yuan model.
pub trait PrunableExperts: Sized {
    /// Experts of every mixture-of-experts layer.
    fn experts_per_layer(&self) -> Vec<usize>;

    /// Experts that each token visits.
    fn top_k(&self) -> usize;

    /// Keeps the listed experts of every layer in the listed order, and says what was cut where.
    ///
    /// # Errors
    ///
    /// Gives the model back unchanged with what is wrong.
    fn keep_experts(self, kept: &[Vec<usize>]) -> Result<(Self, Vec<Selection>), (Self, ModelError)>;
}

impl LanguageModel for YuanModel {
    fn loss(&self, batch: Batch) -> LossOutput {
        let options = ForwardOptions { position_ids: Some(batch.position_ids), ..ForwardOptions::default() };
        let output = self.forward(batch.input_ids, options);
        let loss = masked_mean(token_losses(output.logits, batch.labels), None);
        LossOutput { loss, tokens_per_expert: output.tokens_per_expert }
    }

    fn config_json(&self) -> String {
        self.config().to_json()
    }

    fn from_config_json(text: &str, device: &Device) -> Result<Self, ConfigError> {
        Self::new(&YuanConfig::from_json(text)?, device)
    }
}

impl PrunableExperts for YuanModel {
    fn experts_per_layer(&self) -> Vec<usize> {
        self.config().experts_per_layer.clone()
    }

    fn top_k(&self) -> usize {
        self.config().moe_top_k
    }

    fn keep_experts(self, kept: &[Vec<usize>]) -> Result<(Self, Vec<Selection>), (Self, ModelError)> {
        YuanModel::keep_experts(self, kept)
    }
}
