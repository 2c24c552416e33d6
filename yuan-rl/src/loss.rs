//! RAPO's loss: clipped ratios of the tokens that a model is least sure of.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Among which tokens the most uncertain ones are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntropyScope {
    /// Those of each response, as the paper says.
    #[default]
    Response,
    /// All of a micro-batch, as the code does. Which answers share a micro-batch then matters, and
    /// over ranks each has its own; the answers of an update are sorted by their lengths.
    Batch,
}

/// The tokens of some responses, `[responses, tokens]` each.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Logarithms of their probabilities, which carry the gradient.
    pub log_probs: Tensor<2>,
    /// The same when they were drawn.
    pub old_log_probs: Tensor<2>,
    /// Of each token, that of its response ([`group_advantages`](crate::group_advantages)).
    pub advantages: Tensor<2>,
    /// Entropies of what they were drawn from, under the model as it is; they carry no gradient.
    pub entropies: Tensor<2>,
    /// 1 for tokens of responses, 0 for padding.
    pub mask: Tensor<2>,
}

/// RAPO's loss (Flash paper, Eqs. 4 and 5).
///
/// ```text
/// r = exp(clamp(log π − log π_old, −20, 20)),   c = clip(r, 1 − clip_low, 1 + clip_high)
/// J = c Â                 if Â < 0
///   = min(r Â, c Â)       otherwise
/// loss = −Σ 1[H ≥ τ] J / Σ mask
/// ```
///
/// Where an advantage is negative only the clipped ratio counts, so that a token which has become
/// much likelier is not pushed without bound. Tokens below the entropy τ count nothing, and yet
/// stay in the denominator.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RapoLoss {
    /// `ε_low`.
    pub clip_low: f64,
    /// `ε_high`.
    pub clip_high: f64,
    /// Share of the tokens that count, those with the largest entropies: ρ. 1 counts all.
    pub share: f64,
    /// Among which tokens they are chosen.
    pub scope: EntropyScope,
}

impl Default for RapoLoss {
    /// 0.2, 0.28, a fifth of the tokens of each response.
    fn default() -> Self {
        Self { clip_low: 0.2, clip_high: 0.28, share: 0.2, scope: EntropyScope::Response }
    }
}

/// A loss, and how far the model has moved.
#[derive(Debug, Clone)]
pub struct PolicyLoss {
    /// `[1]`, with the gradient.
    pub loss: Tensor<1>,
    /// Share of the tokens whose loss is the larger one with the clipped ratio, `[1]`.
    pub clip_fraction: Tensor<1>,
    /// Mean of `log π_old − log π`, `[1]`: an estimate of the divergence.
    pub approx_kl: Tensor<1>,
}

impl RapoLoss {
    /// The loss of some responses.
    ///
    /// # Panics
    ///
    /// If the tensors have other shapes than each other, or the device fails.
    pub fn of(&self, tokens: Tokens) -> PolicyLoss {
        let Tokens { log_probs, old_log_probs, advantages, entropies, mask } = tokens;
        let moved = log_probs - old_log_probs;
        let count = mask.clone().sum().clamp_min(1.0);
        let ratio = moved.clone().clamp(-20.0, 20.0).exp();
        let clipped = ratio.clone().clamp(1.0 - self.clip_low, 1.0 + self.clip_high);
        let plain = ratio * advantages.clone().neg();
        let clipped = clipped * advantages.clone().neg();
        let worse = plain.clone().max_pair(clipped.clone());
        let of_tokens = worse.mask_where(advantages.lower_scalar(0.0), clipped.clone());
        let counts = self.uncertain(&entropies, &mask);
        let mean = |values: Tensor<2>| (values * mask.clone()).sum() / count.clone();
        PolicyLoss {
            loss: mean(of_tokens * counts),
            clip_fraction: mean(clipped.greater(plain).float()),
            approx_kl: mean(moved.neg()),
        }
    }

    /// 1 for the tokens that count, 0 for the others.
    fn uncertain(&self, entropies: &Tensor<2>, mask: &Tensor<2>) -> Tensor<2> {
        let [responses, tokens] = entropies.dims();
        let values = |tensor: &Tensor<2>| {
            let data = tensor.clone().detach().into_data().convert::<f32>();
            data.try_into_vec::<f32>().expect("they were made f32")
        };
        let (entropies_on_host, mask) = (values(entropies), values(mask));
        let of = |response: usize| response * tokens..(response + 1) * tokens;
        let threshold = |range: std::ops::Range<usize>| {
            let real = range.filter(|&at| mask[at] > 0.0).map(|at| entropies_on_host[at]);
            quantile(real.collect(), 1.0 - self.share)
        };
        let thresholds: Vec<f32> = match self.scope {
            EntropyScope::Batch => vec![threshold(0..responses * tokens); responses],
            EntropyScope::Response => (0..responses).map(|at| threshold(of(at))).collect(),
        };
        let device = entropies.device();
        let thresholds = Tensor::<1>::from_floats(thresholds.as_slice(), &device);
        let thresholds = thresholds.reshape([responses, 1]).cast(entropies.dtype());
        entropies.clone().greater_equal(thresholds.expand([responses, tokens])).float()
    }
}

/// A quantile that lies between two values where it falls between them, as those of `NumPy` and
/// `PyTorch`.
fn quantile(mut values: Vec<f32>, share: f64) -> f32 {
    if values.is_empty() {
        return f32::INFINITY;
    }
    values.sort_unstable_by(f32::total_cmp);
    let place = share.clamp(0.0, 1.0) * (values.len() - 1) as f64;
    let (below, part) = (place.floor() as usize, place.fract());
    let above = values[(below + 1).min(values.len() - 1)];
    (f64::from(values[below]) * (1.0 - part) + f64::from(above) * part) as f32
}
