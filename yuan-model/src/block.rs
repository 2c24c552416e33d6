//! One layer: norm → attention → norm → experts, with plain residual adds.

use burn::{
    module::Module,
    nn::{Dropout, DropoutConfig},
    tensor::{Device, Tensor},
};

use crate::{
    YuanConfig,
    attention::{Attention, DocumentMask},
    cache::{LayerCache, Span},
    layers::LayerOutput,
    moe::{MoeLayer, MoeOptions},
    norm::RmsNorm,
    rope::Rotary,
};

/// A transformer layer.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before attention.
    pub attention_norm: RmsNorm,
    /// Attention with its localized filter.
    pub attention: Attention,
    /// Norm before the experts.
    pub moe_norm: RmsNorm,
    /// Mixture of experts.
    pub moe: MoeLayer,
    dropout: Dropout,
}

impl Block {
    /// The layer with index `layer`.
    pub fn new(config: &YuanConfig, layer: usize, device: &Device) -> Self {
        Self {
            attention_norm: RmsNorm::new(config.hidden_size, config.norm_epsilon, device),
            attention: Attention::new(config, device),
            moe_norm: RmsNorm::new(config.hidden_size, config.norm_epsilon, device),
            moe: MoeLayer::new(config, layer, device),
            dropout: DropoutConfig::new(config.hidden_dropout).init(),
        }
    }

    /// The residual stream after this layer, `[batch, seq, hidden]`, and what its experts did.
    pub fn forward(
        &self,
        x: Tensor<3>,
        rotary: &Rotary,
        documents: Option<&DocumentMask>,
        options: MoeOptions,
    ) -> LayerOutput {
        let x = self.attend(x, rotary, documents);
        self.visit_experts(x, options)
    }

    /// The same for the tokens after those in the cache, which they join.
    pub(crate) fn forward_cached(
        &self,
        x: Tensor<3>,
        rotary: &Rotary,
        cache: &mut LayerCache,
        span: &Span<'_>,
        real: Option<&Tensor<3>>,
        options: MoeOptions,
    ) -> LayerOutput {
        let normed = self.attention_norm.forward(x.clone());
        let attended = self.attention.forward_cached(normed, rotary, cache, span, real);
        self.visit_experts(self.add(x, attended), options)
    }

    /// The residual stream after attention.
    pub(crate) fn attend(
        &self,
        x: Tensor<3>,
        rotary: &Rotary,
        documents: Option<&DocumentMask>,
    ) -> Tensor<3> {
        let attended =
            self.attention.forward(self.attention_norm.forward(x.clone()), rotary, documents);
        self.add(x, attended)
    }

    /// Adds a branch to the residual stream.
    pub(crate) fn add(&self, x: Tensor<3>, branch: Tensor<3>) -> Tensor<3> {
        x + self.dropout.forward(branch)
    }

    fn visit_experts(&self, x: Tensor<3>, options: MoeOptions) -> LayerOutput {
        let moe = self.moe.forward(self.moe_norm.forward(x.clone()), options);
        LayerOutput {
            hidden: self.add(x, moe.hidden),
            tokens_per_expert: moe.tokens_per_expert,
            image_tokens_per_expert: moe.image_tokens_per_expert,
            rows_per_device: moe.rows_per_rank,
            balance_loss: moe.balance_loss,
        }
    }
}
