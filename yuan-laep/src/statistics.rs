//! How unequal are the loads? The numbers that a reader of a run wants per layer and window.

use serde::{Deserialize, Serialize};

use crate::LayerLoad;

/// Inequality of the expert loads of one layer, after one step or over a window.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LoadStatistics {
    /// Tokens of the least loaded expert.
    pub min: u64,
    /// Tokens of the busiest expert.
    pub max: u64,
    /// Tokens of an expert on average.
    pub mean: f64,
    /// Standard deviation over the experts (all of them, no sample) over the mean.
    pub coefficient_of_variation: f64,
    /// Gini coefficient: 0 when all loads are equal, `1 − 1/N` when one expert has everything.
    pub gini: f64,
    /// Entropy of the load fractions over `ln N`: 1 when all loads are equal, 0 when one expert has
    /// everything.
    pub entropy: f64,
    /// Load of the busiest expert over the mean; it bounds the speed of a device per expert.
    pub max_over_mean: f64,
    /// Share of the load that the busiest tenth of the experts (rounded up) carries.
    pub top_tenth_share: f64,
    /// Experts that received no token at all.
    pub dead_experts: usize,
}

impl LoadStatistics {
    /// The statistics of a layer; of a layer without load or experts, zeros, and all its experts
    /// dead.
    pub fn of(load: &LayerLoad) -> Self {
        let mut tokens = load.tokens_per_expert().to_vec();
        tokens.sort_unstable();
        let (experts, total) = (tokens.len(), load.total());
        let dead_experts = tokens.iter().take_while(|&&n| n == 0).count();
        if total == 0 {
            return Self {
                min: 0,
                max: 0,
                mean: 0.0,
                coefficient_of_variation: 0.0,
                gini: 0.0,
                entropy: 0.0,
                max_over_mean: 0.0,
                top_tenth_share: 0.0,
                dead_experts,
            };
        }
        let (n, sum) = (experts as f64, total as f64);
        let mean = sum / n;
        let variance = tokens.iter().map(|&x| (x as f64 - mean).powi(2)).sum::<f64>() / n;
        // Σ (2i − N − 1) x_i / (N Σ x) over the ascending loads, i from 1.
        let ranked = tokens.iter().enumerate().map(|(i, &x)| (2.0 * i as f64 + 1.0 - n) * x as f64);
        let surprise = tokens.iter().filter(|&&x| x > 0).map(|&x| {
            let fraction = x as f64 / sum;
            -fraction * fraction.ln()
        });
        let top: u128 =
            tokens[experts - experts.div_ceil(10)..].iter().map(|&x| u128::from(x)).sum();
        Self {
            min: tokens[0],
            max: tokens[experts - 1],
            mean,
            coefficient_of_variation: variance.sqrt() / mean,
            gini: ranked.sum::<f64>() / (n * sum),
            entropy: if experts == 1 { 1.0 } else { surprise.sum::<f64>() / n.ln() },
            max_over_mean: load.max_over_mean(),
            top_tenth_share: top as f64 / sum,
            dead_experts,
        }
    }
}
