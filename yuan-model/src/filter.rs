//! Localized filtering (LFA): two causal convolutions over pairs of tokens, then residual and norm.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, Tensor},
};

use crate::{YuanConfig, cache::FilterCache, norm::RmsNorm, ops};

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
        let (hidden, bias) = (config.hidden_size, config.filter_bias);
        Self {
            conv1: PairConv::new(hidden, hidden / 2, bias, device),
            conv2: PairConv::new(hidden / 2, hidden, bias, device),
            output_norm: RmsNorm::new(hidden, config.norm_epsilon, device),
        }
    }

    /// Filters the normed hidden state, `[batch, seq, hidden]` → `[batch, seq, hidden]`.
    pub fn forward(&self, u: Tensor<3>) -> Tensor<3> {
        let filtered = self.conv2.forward(self.conv1.forward(u.clone()));
        self.output_norm.forward(filtered + u)
    }

    /// The same for the tokens after those that `memory` knows of; `real`, `[batch, tokens, 1]`, is
    /// zero where a token is padding, which the tokens after it must not see.
    pub(crate) fn forward_cached(
        &self,
        u: Tensor<3>,
        memory: &mut Option<FilterCache>,
        real: Option<&Tensor<3>>,
    ) -> Tensor<3> {
        let mask = |x: Tensor<3>| match real {
            Some(real) => x.clone() * real.clone().cast(x.dtype()),
            None => x,
        };
        let (before1, before2) = memory.take().map(|memory| (memory.conv1, memory.conv2)).unzip();
        let (hidden, conv1) = self.conv1.forward_after(mask(u.clone()), before1);
        let (filtered, conv2) = self.conv2.forward_after(mask(hidden), before2);
        *memory = Some(FilterCache { conv1, conv2 });
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
        self.add_bias(ops::add_previous(self.taps(x)))
    }

    /// The same for `x` after a token that adds `before`, `[batch, 1, d_out]`, to the first of it
    /// (absent: zero); also what the last of `x` adds to the next.
    pub(crate) fn forward_after(
        &self,
        x: Tensor<3>,
        before: Option<Tensor<3>>,
    ) -> (Tensor<3>, Tensor<3>) {
        let [batch, seq, _] = x.dims();
        let taps = self.taps(x);
        let d_out = taps.dims()[2] / 2;
        let last = taps.clone().slice([0..batch, seq - 1..seq, 0..d_out]);
        let y = match before {
            // One token: no shift, and none of the sum's cost.
            Some(before) if seq == 1 => taps.slice_dim(2, d_out..2 * d_out) + before,
            Some(before) => {
                let previous = taps.clone().slice([0..batch, 0..seq - 1, 0..d_out]);
                taps.slice_dim(2, d_out..2 * d_out) + Tensor::cat(vec![before, previous], 1)
            }
            None => ops::add_previous(taps),
        };
        (self.add_bias(y), last)
    }

    /// One product for both taps, to be shifted and summed: narrower than joining pairs of inputs.
    fn taps(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, seq, d_in] = x.dims();
        let weight = self.weight.val().cast(x.dtype());
        let width = weight.dims()[1];
        ops::dense(x.reshape([batch * seq, d_in]), weight).reshape([batch, seq, width])
    }

    fn add_bias(&self, y: Tensor<3>) -> Tensor<3> {
        match &self.bias {
            Some(bias) => y.clone() + bias.val().cast(y.dtype()).unsqueeze::<3>(),
            None => y,
        }
    }
}
