//! Losses that pull the experts towards equal load: the baselines that LAEP is compared with.
//!
//! Each is of one layer; a model adds up its layers, as Megatron-LM and DeepSeek-V3 do. The counts
//! are constants, gradients flow through the router's probabilities. Padding takes no part.

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

/// A balancing loss. Each is made of sums over tokens, so that devices can add up their shares.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Auxiliary,
    Sequence,
    RouterZ,
}

impl Loss {
    /// What it needs of the tokens, a vector of [`length`](Self::length) sums.
    fn sums(self, tokens: &RoutedTokens<'_>) -> Tensor<1> {
        match self {
            Self::Auxiliary => auxiliary_sums(tokens),
            Self::Sequence => sequence_sums(tokens),
            Self::RouterZ => router_z_sums(tokens),
        }
    }

    fn length(self, experts: usize) -> usize {
        match self {
            Self::Auxiliary => 2 * experts + 1,
            Self::Sequence | Self::RouterZ => 2,
        }
    }

    /// The loss, `[1]`, of its sums over all tokens.
    fn of_sums(self, sums: Tensor<1>, experts: usize) -> Tensor<1> {
        match self {
            Self::Auxiliary => auxiliary(sums, experts),
            Self::Sequence | Self::RouterZ => mean(sums),
        }
    }
}

impl BalanceLosses {
    /// The losses with a coefficient, in the order of their sums.
    fn on(&self) -> Vec<(Loss, f64)> {
        let mut losses = vec![
            (Loss::Auxiliary, self.auxiliary),
            (Loss::Sequence, self.sequence),
            (Loss::RouterZ, self.router_z),
        ];
        losses.retain(|&(_, coefficient)| coefficient != 0.0);
        losses
    }

    /// The weighted sum of those that are on, `[1]`; nothing when none is.
    pub fn of(&self, tokens: &RoutedTokens<'_>) -> Option<Tensor<1>> {
        let [_, experts] = tokens.logits.dims();
        self.sums(tokens).map(|sums| self.of_sums(sums, experts))
    }

    /// What the losses over more tokens than these, rows of other devices, are made of: a vector of
    /// sums to add up; nothing when no loss is on.
    pub fn sums(&self, tokens: &RoutedTokens<'_>) -> Option<Tensor<1>> {
        let mut sums = Vec::new();
        for (loss, _) in self.on() {
            sums.push(loss.sums(tokens));
        }
        if sums.is_empty() { None } else { Some(Tensor::cat(sums, 0)) }
    }

    /// The weighted sum of the losses that are on, `[1]`, of the [`sums`](Self::sums) over all
    /// tokens.
    pub fn of_sums(&self, sums: Tensor<1>, experts: usize) -> Tensor<1> {
        let (mut start, mut total) = (0, None);
        for (loss, coefficient) in self.on() {
            let end = start + loss.length(experts);
            let value = loss.of_sums(sums.clone().slice(start..end), experts);
            let weighted = value.mul_scalar(coefficient);
            total = Some(match total {
                Some(total) => total + weighted,
                None => weighted,
            });
            start = end;
        }
        total.unwrap_or_else(|| sums.zeros_like().sum())
    }
}

/// `N · Σ_i f_i · P_i` over the tokens of the micro-batch, `[1]`: Fedus et al. 2021 (eq. 4) for
/// top-1, and for top-k as Mixtral's published code has it.
///
/// `f_i` is the number of tokens that expert `i` receives over the number of tokens (their sum is
/// k), `P_i` its mean probability in the softmax over all experts. Equal loads give k.
pub fn auxiliary_loss(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    auxiliary(auxiliary_sums(tokens), tokens.logits.dims()[1])
}

/// Visits of every expert, its probabilities, tokens: `[2 · experts + 1]`.
fn auxiliary_sums(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    let [num_tokens, experts] = tokens.logits.dims();
    let sum = |x: Tensor<3>| {
        tokens.masked(x).reshape([num_tokens, experts]).sum_dim(0).reshape([experts])
    };
    Tensor::cat(vec![sum(tokens.visits()), sum(tokens.probabilities()), tokens.lengths().sum()], 0)
}

fn auxiliary(sums: Tensor<1>, experts: usize) -> Tensor<1> {
    let total = sums.clone().slice(2 * experts..2 * experts + 1).clamp_min(1.0);
    let fractions = sums.clone().slice(0..experts) / total.clone();
    let probabilities = sums.slice(experts..2 * experts) / total;
    (fractions * probabilities).sum().mul_scalar(experts as f64)
}

/// `Σ_i f_i · P_i` within every row, averaged over the rows, `[1]`: DeepSeek-V3 (eq. 17–20).
///
/// `f_i = N / (k T) ·` tokens of the row that expert `i` receives, `P_i` its mean probability in
/// the row; rows of padding alone do not count. DeepSeek normalises sigmoids where this router has
/// a softmax. Equal loads give 1.
pub fn sequence_loss(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    mean(sequence_sums(tokens))
}

/// Products of all rows, rows: `[2]`.
fn sequence_sums(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    let ([_, experts], [_, top_k]) = (tokens.logits.dims(), tokens.experts.dims());
    let lengths = tokens.lengths();
    let of_row = |x: Tensor<3>| {
        tokens.masked(x).sum_dim(1).squeeze_dim::<2>(1) / lengths.clone().clamp_min(1.0)
    };
    let products = of_row(tokens.visits()) * of_row(tokens.probabilities());
    let rows = lengths.clone().clamp(0.0, 1.0).sum();
    Tensor::cat(vec![products.sum().mul_scalar(experts as f64 / top_k as f64), rows], 0)
}

/// `(ln Σ_j e^(logit_j))²` averaged over the tokens, `[1]`: ST-MoE (Zoph et al. 2022, eq. 5).
pub fn router_z_loss(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    mean(router_z_sums(tokens))
}

/// Squares, tokens: `[2]`.
fn router_z_sums(tokens: &RoutedTokens<'_>) -> Tensor<1> {
    let max = tokens.logits.clone().detach().max_dim(1);
    let sums = (tokens.logits.clone() - max.clone()).exp().sum_dim(1).log() + max;
    let squares = (sums.clone() * sums).reshape(tokens.shape());
    Tensor::cat(vec![tokens.masked(squares).sum(), tokens.lengths().sum()], 0)
}

/// A sum over a number, which is counted as one where it is zero.
fn mean(sums: Tensor<1>) -> Tensor<1> {
    sums.clone().slice(0..1) / sums.slice(1..2).clamp_min(1.0)
}

impl RoutedTokens<'_> {
    /// `[batch, seq, 1]`
    fn shape(&self) -> [usize; 3] {
        [self.batch, self.logits.dims()[0] / self.batch, 1]
    }

    /// One for a token, zero for padding, `[batch, seq]`, if there is any.
    fn counted(&self) -> Option<Tensor<2>> {
        self.padding.map(|padding| padding.clone().bool_not().float().cast(self.logits.dtype()))
    }

    /// Zero where there is padding.
    fn masked(&self, x: Tensor<3>) -> Tensor<3> {
        match self.counted() {
            Some(counted) => x * counted.reshape(self.shape()),
            None => x,
        }
    }

    /// Tokens of every row, `[batch, 1]`.
    fn lengths(&self) -> Tensor<2> {
        let [batch, seq, _] = self.shape();
        match self.counted() {
            Some(counted) => counted.sum_dim(1),
            None => {
                Tensor::full([batch, 1], seq as f64, (&self.logits.device(), self.logits.dtype()))
            }
        }
    }

    /// One where a token visits an expert, `[batch, seq, experts]`.
    fn visits(&self) -> Tensor<3> {
        let [tokens, experts] = self.logits.dims();
        let columns = Tensor::<1, Int>::arange(0..experts as i64, &self.logits.device())
            .reshape([1, 1, experts]);
        let visits = self.experts.clone().unsqueeze_dim::<3>(2).equal(columns).float().sum_dim(1);
        visits.cast(self.logits.dtype()).reshape([self.batch, tokens / self.batch, experts])
    }

    /// Softmax over all experts, `[batch, seq, experts]`.
    fn probabilities(&self) -> Tensor<3> {
        let [tokens, experts] = self.logits.dims();
        softmax(self.logits.clone(), 1).reshape([self.batch, tokens / self.batch, experts])
    }
}
