//! One layer: norm → attention → norm → experts, with plain residual adds.

use burn::{
    module::Module,
    nn::{Dropout, DropoutConfig},
    tensor::{Device, Int, Tensor},
};

use crate::{
    YuanConfig,
    attention::{Attention, DocumentMask},
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
            attention_norm: RmsNorm::new(config.hidden_size, config.rms_norm_eps, device),
            attention: Attention::new(config, device),
            moe_norm: RmsNorm::new(config.hidden_size, config.rms_norm_eps, device),
            moe: MoeLayer::new(config, layer, device),
            dropout: DropoutConfig::new(config.hidden_dropout).init(),
        }
    }

    /// The residual stream after this layer, `[batch, seq, hidden]`, and the layer's `tokens_per_expert`.
    pub fn forward(
        &self,
        x: Tensor<3>,
        rotary: &Rotary,
        documents: Option<&DocumentMask>,
        options: MoeOptions,
    ) -> (Tensor<3>, Tensor<1, Int>) {
        let attended = self.attention.forward(self.attention_norm.forward(x.clone()), rotary, documents);
        let x = x + self.dropout.forward(attended);
        let moe = self.moe.forward(self.moe_norm.forward(x.clone()), options);
        (x + self.dropout.forward(moe.hidden), moe.tokens_per_expert)
    }
}
