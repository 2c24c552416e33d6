//! RMSNorm, computed in f32 whatever the tensors are, rounded once at the end.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, FloatDType, Tensor},
};

use crate::ops;

/// `RMSNorm(x; g) = g ⊙ x / sqrt(mean(x²) + ε)` over the last axis; no centring, no bias.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// g, `[hidden]`, initially one.
    pub weight: Param<Tensor<1>>,
    epsilon: f64,
}

impl RmsNorm {
    /// A norm over `hidden` features.
    pub fn new(hidden: usize, epsilon: f64, device: &Device) -> Self {
        Self { weight: Initializer::Ones.init([hidden], device), epsilon }
    }

    /// Normalises `[batch, seq, hidden]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, seq, hidden] = x.dims();
        let weight = self.weight.val().cast(FloatDType::F32);
        ops::rms_norm(x.reshape([batch * seq, hidden]), weight, self.epsilon)
            .reshape([batch, seq, hidden])
    }
}
