//! RMSNorm, computed in f32 whatever the tensors are, rounded once at the end.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, FloatDType, Tensor},
};

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
        let dtype = x.dtype();
        let x = x.cast(FloatDType::F32);
        let mean_square = x.clone().square().mean_dim(2);
        let inverse = mean_square.add_scalar(self.epsilon).sqrt().recip();
        let weight = self.weight.val().cast(FloatDType::F32).unsqueeze::<3>();
        (x * inverse * weight).cast(dtype)
    }
}
