//! Losses that pull the experts towards equal load: the baselines that LAEP is compared with.
//!
//! Each is of one layer; a model adds up its layers, as Megatron-LM and DeepSeek-V3 do. The counts are
//! constants, gradients flow through the router's probabilities. Padding takes no part.

use burn::tensor::{Bool, Int, Tensor, activation::softmax};
use serde::{Deserialize, Serialize};

/// Coefficients of the balancing losses; zero is off.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BalanceLosses {
    /// [`auxiliary_loss`] over the whole micro-batch (Switch, Mixtral).
    pub auxiliary: f64,
    /// [`sequence_loss`] within every row (DeepSeek-V3).
    pub sequence: f64,
    /// [`router_z_loss`] (ST-MoE).
    pub router_z: f64,
}

/// What the router did with the tokens of one layer.
#[derive(Debug, Clone)]
pub struct RoutedTokens<'a> {
    /// Score of every expert, `[batch · seq, experts]`.
    pub logits: &'a Tensor<2>,
    /// Chosen experts, `[batch · seq, top_k]`.
    pub experts: &'a Tensor<2, Int>,
    /// Rows of the batch.
    pub batch: usize,
    /// True where a token is padding, `[batch, seq]`.
    pub padding: Option<&'a Tensor<2, Bool>>,
}

impl BalanceLosses {
    /// The weighted sum of those that are on, `[1]`; nothing when none is.
    pub fn of(&self, tokens: &RoutedTokens<'_>) -> Option<Tensor<1>> {
        type Loss = fn(&RoutedTokens<'_>) -> Tensor<1>;
        let losses: [(f64, Loss); 3] = [
            (self.auxiliary, auxiliary_loss),
            (self.sequence, sequence_loss),
            (self.router_z, router_z_loss),
        ];
        let on = losses.into_iter().filter(|(coefficient, _)| *coefficient != 0.0);
        on.map(|(coefficient, loss)| loss(tokens).mul_scalar(coefficient)).reduce(|sum, more| sum + more)
    }
}

/// `N · Σ_i f_i · P_i` over the tokens of the micro-batch, `[1]`: Fedus et al. 2021 (eq. 4) for top-1, and
/// for top-k as Mixtral's published code has it.
///
/// `f_i` is the number of tokens that expert `i` receives over the number of tokens (their sum is k), `P_i`
/// its mean probability in the softmax over all experts. Equal loads give k.
pub fn auxiliary_loss(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    let counted = tokens.counted();
    let total = counted.clone().sum().clamp_min(1.0);
    let [_, _, experts] = counted_shape(&counted, tokens.logits);
    let per_row = |x: Tensor<3>| (x * counted.clone()).sum_dim(1).sum_dim(0).reshape([experts]);
    let fractions = per_row(tokens.visits()) / total.clone();
    let probabilities = per_row(tokens.probabilities()) / total;
    (fractions * probabilities).sum().mul_scalar(experts as f64)
}

/// `Σ_i f_i · P_i` within every row, averaged over the rows, `[1]`: DeepSeek-V3 (eq. 17–20).
///
/// `f_i = N / (k T) ·` tokens of the row that expert `i` receives, `P_i` its mean probability in the row; rows
/// of padding alone do not count. DeepSeek normalises sigmoids where this router has a softmax. Equal loads
/// give 1.
pub fn sequence_loss(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    let counted = tokens.counted();
    let [batch, _, experts] = counted_shape(&counted, tokens.logits);
    let [_, top_k] = tokens.experts.dims();
    let lengths = counted.clone().sum_dim(1).clamp_min(1.0);
    let per_row = |x: Tensor<3>| (x * counted.clone()).sum_dim(1) / lengths.clone();
    let products = per_row(tokens.visits()) * per_row(tokens.probabilities());
    let rows = counted.sum_dim(1).clamp(0.0, 1.0).reshape([batch]).sum().clamp_min(1.0);
    products.sum().mul_scalar(experts as f64 / top_k as f64) / rows
}

/// `(ln Σ_j e^(logit_j))²` averaged over the tokens, `[1]`: ST-MoE (Zoph et al. 2022, eq. 5).
pub fn router_z_loss(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    let counted = tokens.counted();
    let max = tokens.logits.clone().detach().max_dim(1);
    let sums = (tokens.logits.clone() - max.clone()).exp().sum_dim(1).log() + max;
    let squares = (sums.clone() * sums).reshape(counted.dims());
    (squares * counted.clone()).sum() / counted.sum().clamp_min(1.0)
}

fn counted_shape(counted: &Tensor<3>, logits: &Tensor<2>) -> [usize; 3] {
    let [batch, seq, _] = counted.dims();
    [batch, seq, logits.dims()[1]]
}

impl RoutedTokens<'_> {
    /// One for a token, zero for padding, `[batch, seq, 1]`.
    fn counted(&self) -> Tensor<3> {
        let [tokens, _] = self.logits.dims();
        let shape = [self.batch, tokens / self.batch, 1];
        match self.padding {
            Some(padding) => padding.clone().bool_not().float().cast(self.logits.dtype()).reshape(shape),
            None => Tensor::<3>::ones(shape, &self.logits.device()).cast(self.logits.dtype()),
        }
    }

    /// One where a token visits an expert, `[batch, seq, experts]`.
    fn visits(&self) -> Tensor<3> {
        let [tokens, experts] = self.logits.dims();
        let columns =
            Tensor::<1, Int>::arange(0..experts as i64, &self.logits.device()).reshape([1, 1, experts]);
        let visits = self.experts.clone().unsqueeze_dim::<3>(2).equal(columns).float().sum_dim(1);
        visits.cast(self.logits.dtype()).reshape([self.batch, tokens / self.batch, experts])
    }

    /// Softmax over all experts, `[batch, seq, experts]`.
    fn probabilities(&self) -> Tensor<3> {
        let [tokens, experts] = self.logits.dims();
        softmax(self.logits.clone(), 1).reshape([self.batch, tokens / self.batch, experts])
    }
}
