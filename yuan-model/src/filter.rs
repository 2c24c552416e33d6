//! Localized filtering (LFA): two causal convolutions over pairs of tokens, then residual and norm.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, Tensor},
};

use crate::{YuanConfig, norm::RmsNorm, ops};

/// `f = RMSNorm(conv2(conv1(u)) + u)`: every token sees itself and the two before it.
#[derive(Module, Debug)]
pub struct LocalizedFilter {
    /// H → H/2.
    pub conv1: PairConv,
    /// H/2 → H.
    pub conv2: PairConv,
    /// Norm of the sum.
    pub output_norm: RmsNorm,
}

impl LocalizedFilter {
    /// The filter of one layer.
    pub fn new(config: &YuanConfig, device: &Device) -> Self {
        let (hidden, bias) = (config.hidden_size, config.use_lfa_bias);
        Self {
            conv1: PairConv::new(hidden, hidden / 2, bias, device),
            conv2: PairConv::new(hidden / 2, hidden, bias, device),
            output_norm: RmsNorm::new(hidden, config.rms_norm_eps, device),
        }
    }

    /// Filters the normed hidden state, `[batch, seq, hidden]` → `[batch, seq, hidden]`.
    pub fn forward(&self, u: Tensor<3>) -> Tensor<3> {
        let filtered = self.conv2.forward(self.conv1.forward(u.clone()));
        self.output_norm.forward(filtered + u)
    }
}

/// Causal convolution with kernel 2: `y_t = A0 x_{t−1} + A1 x_t + b`, with `x_{−1} = 0`.
///
/// The first missing input is zero even where it is the output of a convolution with a bias.
#[derive(Module, Debug)]
pub struct PairConv {
    /// `[d_in, 2 · d_out]`: A0ᵀ for the previous token beside A1ᵀ for the current one.
    pub weight: Param<Tensor<2>>,
    /// b, `[d_out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl PairConv {
    /// A convolution initialised as PyTorch's: uniform within `1 / sqrt(2 · d_in)`.
    pub fn new(d_in: usize, d_out: usize, bias: bool, device: &Device) -> Self {
        let bound = 1.0 / ((2 * d_in) as f64).sqrt();
        let uniform = Initializer::Uniform { min: -bound, max: bound };
        Self {
            weight: uniform.init([d_in, 2 * d_out], device),
            bias: bias.then(|| uniform.init([d_out], device)),
        }
    }

    /// `[batch, seq, d_in]` → `[batch, seq, d_out]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, seq, d_in] = x.dims();
        let weight = self.weight.val().cast(x.dtype());
        let d_out = weight.dims()[1] / 2;
        // One product for both taps, then a shifted sum: narrower than joining pairs of inputs.
        let taps = x.reshape([batch * seq, d_in]).matmul(weight).reshape([batch, seq, 2 * d_out]);
        let y = ops::add_previous(taps);
        match &self.bias {
            Some(bias) => y.clone() + bias.val().cast(y.dtype()).unsqueeze::<3>(),
            None => y,
        }
    }
}
