//! Have the loads settled? The test for the paper's *stable phase*.
//!
//! Early in pre-training expert loads swing by orders of magnitude (initial transition
//! phase); later their ranking is largely fixed (stable phase). The paper names no test;
//! this one was chosen here: between consecutive windows the load fractions must move little, and
//! the ranking must persist.

use serde::{Deserialize, Serialize};

use crate::{LayerLoad, LoadWindow, PlanError};

/// Windows that are kept and compared at most: all of them are in memory.
const MOST_WINDOWS: usize = 10_000;

/// When a layer counts as stable.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StabilityTest {
    /// M: consecutive comparisons of neighbouring windows that must all pass.
    pub windows: usize,
    /// τ₁: the change `Σ|f_t − f_{t−1}| / 2` of the load fractions must stay below this.
    pub max_change: f64,
    /// τ₂: Spearman's rank correlation of the loads must stay above this.
    pub min_rank_correlation: f64,
}

impl Default for StabilityTest {
    fn default() -> Self {
        Self { windows: 3, max_change: 0.1, min_rank_correlation: 0.8 }
    }
}

/// How much one layer moved, at worst, over the windows looked at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerStability {
    /// Largest change of the load fractions between neighbouring windows, in `[0, 1]`.
    pub change: f64,
    /// Smallest rank correlation between neighbouring windows, in `[-1, 1]`.
    pub rank_correlation: f64,
    /// Whether the layer passed.
    pub stable: bool,
}

impl StabilityTest {
    /// Checks the thresholds.
    ///
    /// # Errors
    ///
    /// Names the threshold that is out of range.
    pub fn validate(&self) -> Result<(), PlanError> {
        let refuse =
            |name, value: String, expected| Err(PlanError::Limit { name, value, expected });
        if !(1..=MOST_WINDOWS).contains(&self.windows) {
            return refuse("windows", self.windows.to_string(), "a number from 1 to 10000");
        }
        if !(self.max_change > 0.0 && self.max_change.is_finite()) {
            return refuse("max_change", self.max_change.to_string(), "a positive number");
        }
        if !(-1.0..1.0).contains(&self.min_rank_correlation) {
            let value = self.min_rank_correlation.to_string();
            return refuse("min_rank_correlation", value, "a number in [-1, 1)");
        }
        Ok(())
    }

    /// Judges every layer over the last `windows + 1` windows, oldest first; `None` while there
    /// are fewer, or when the windows do not fit together (the experts changed in between).
    pub fn judge(&self, windows: &[LoadWindow]) -> Option<Vec<LayerStability>> {
        let recent = &windows[windows.len().checked_sub(self.windows + 1)?..];
        let layers = recent[0].layers.len();
        if recent.iter().any(|window| window.layers.len() != layers) {
            return None;
        }
        (0..layers).map(|layer| self.judge_layer(recent, layer)).collect()
    }

    fn judge_layer(&self, windows: &[LoadWindow], layer: usize) -> Option<LayerStability> {
        let mut worst = LayerStability { change: 0.0, rank_correlation: 1.0, stable: true };
        for pair in windows.windows(2) {
            let (before, after) = (&pair[0].layers[layer], &pair[1].layers[layer]);
            if before.num_experts() != after.num_experts() {
                return None;
            }
            worst.change = worst.change.max(change(before, after));
            worst.rank_correlation = worst.rank_correlation.min(rank_correlation(before, after));
            worst.stable &= before.total() > 0 && after.total() > 0;
        }
        worst.stable &=
            worst.change < self.max_change && worst.rank_correlation > self.min_rank_correlation;
        Some(worst)
    }
}

/// Half the L1 distance of the load fractions: the share of tokens that changed expert.
pub(crate) fn change(before: &LayerLoad, after: &LayerLoad) -> f64 {
    let pairs = before.fractions().into_iter().zip(after.fractions());
    pairs.map(|(b, a)| (a - b).abs()).sum::<f64>() / 2.0
}

/// Spearman's rank correlation: Pearson's correlation of the ranks, ties sharing their mean rank.
///
/// Two constant loads rank alike and correlate fully; one constant load says nothing: 0.
pub(crate) fn rank_correlation(before: &LayerLoad, after: &LayerLoad) -> f64 {
    let (x, y) = (ranks(before), ranks(after));
    let mean = (x.len() as f64 - 1.0) / 2.0;
    let dot =
        |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>();
    let (xx, yy) = (dot(&x, &x), dot(&y, &y));
    match (xx > 0.0, yy > 0.0) {
        (true, true) => dot(&x, &y) / (xx * yy).sqrt(),
        (false, false) => 1.0,
        _ => 0.0,
    }
}

fn ranks(load: &LayerLoad) -> Vec<f64> {
    let order = load.ascending();
    let tokens = load.tokens_per_expert();
    let mut ranks = vec![0.0; order.len()];
    let mut start = 0;
    for tied in order.chunk_by(|&a, &b| tokens[a] == tokens[b]) {
        let mean_rank = start as f64 + (tied.len() as f64 - 1.0) / 2.0;
        for &expert in tied {
            ranks[expert] = mean_rank;
        }
        start += tied.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(layers: &[&[u64]]) -> LoadWindow {
        LoadWindow { steps: 1, layers: layers.iter().map(|l| LayerLoad::new(l.to_vec())).collect() }
    }

    #[test]
    fn change_is_the_share_of_tokens_that_moved() {
        let (a, b) = (LayerLoad::new(vec![50, 50, 0]), LayerLoad::new(vec![100, 60, 40]));
        assert!((change(&a, &b) - 0.2).abs() < 1e-12);
    }

    #[test]
    fn rank_correlation_agrees_with_a_textbook_case_with_ties() {
        // scipy.stats.spearmanr([1, 2, 2, 4, 5], [5, 6, 7, 8, 7]) = 0.7631578947368421
        let (a, b) = (LayerLoad::new(vec![1, 2, 2, 4, 5]), LayerLoad::new(vec![5, 6, 7, 8, 7]));
        assert!((rank_correlation(&a, &b) - 0.763_157_894_736_842_1).abs() < 1e-12);
        let reversed = LayerLoad::new(vec![8, 7, 6, 5, 5]);
        assert!(rank_correlation(&a, &reversed) < -0.9);
    }

    #[test]
    fn a_layer_is_stable_only_after_enough_quiet_windows() {
        let test = StabilityTest { windows: 2, max_change: 0.1, min_rank_correlation: 0.8 };
        let quiet = window(&[&[10, 20, 30, 40]]);
        let swapped = window(&[&[40, 30, 20, 10]]);
        assert_eq!(test.judge(&[quiet.clone(), quiet.clone()]), None);
        let judged = test.judge(&[swapped.clone(), quiet.clone(), quiet.clone()]).unwrap();
        assert!(!judged[0].stable, "the first comparison still moved");
        let judged = test.judge(&[swapped, quiet.clone(), quiet.clone(), quiet]).unwrap();
        assert!(judged[0].stable);
    }

    #[test]
    fn a_layer_without_load_is_never_stable() {
        let test = StabilityTest { windows: 1, ..StabilityTest::default() };
        let judged = test.judge(&[window(&[&[0, 0]]), window(&[&[0, 0]])]).unwrap();
        assert!(!judged[0].stable);
    }
}
