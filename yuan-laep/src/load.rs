//! What was measured: tokens per expert, summed over windows of optimizer steps.

use serde::{Deserialize, Serialize};

use crate::PlanError;

/// Tokens that each expert of one layer received; a token counts once per expert it visits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerLoad {
    tokens_per_expert: Vec<u64>,
}

impl LayerLoad {
    /// Wraps the counts of one layer, expert 0 first.
    pub fn new(tokens_per_expert: Vec<u64>) -> Self {
        Self { tokens_per_expert }
    }

    /// Counts of all experts, expert 0 first.
    pub fn tokens_per_expert(&self) -> &[u64] {
        &self.tokens_per_expert
    }

    /// Experts of the layer.
    pub fn num_experts(&self) -> usize {
        self.tokens_per_expert.len()
    }

    /// Sum over the experts, `T` of the paper.
    pub fn total(&self) -> u128 {
        self.tokens_per_expert.iter().map(|&n| u128::from(n)).sum()
    }

    /// Share of every expert in the total; all zero when nothing was recorded.
    pub fn fractions(&self) -> Vec<f64> {
        let total = self.total().max(1) as f64;
        self.tokens_per_expert.iter().map(|&n| n as f64 / total).collect()
    }

    /// Load of the busiest expert over the mean load; 1 is perfect balance, 0 means no load.
    pub fn max_over_mean(&self) -> f64 {
        let max = self.tokens_per_expert.iter().copied().max().unwrap_or(0);
        let total = self.total();
        if total == 0 { 0.0 } else { max as f64 * self.num_experts() as f64 / total as f64 }
    }

    /// Experts ordered by load, ascending; ties: lower index first.
    pub fn ascending(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.num_experts()).collect();
        order.sort_by_key(|&expert| self.tokens_per_expert[expert]); // stable: ties keep index order
        order
    }

    fn add(&mut self, layer: usize, other: &Self) -> Result<(), PlanError> {
        if self.num_experts() != other.num_experts() {
            return Err(PlanError::ExpertCount {
                layer,
                expected: self.num_experts(),
                found: other.num_experts(),
            });
        }
        for (sum, more) in self.tokens_per_expert.iter_mut().zip(&other.tokens_per_expert) {
            *sum = sum.saturating_add(*more);
        }
        Ok(())
    }
}

/// Loads of all layers, summed over some optimizer steps.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadWindow {
    /// Optimizer steps that were summed.
    #[serde(default)]
    pub steps: u64,
    /// One load per layer; empty until the first step was added.
    pub layers: Vec<LayerLoad>,
}

/// The size of the model whose loads were recorded, as far as a prune changes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSize {
    /// All parameters.
    pub parameters: u64,
    /// Parameters that go with one expert, its share of the router included.
    pub parameters_per_expert: u64,
    /// Experts that each token visits.
    pub top_k: usize,
}

/// Loads on disk, with the size of the model that they are of, where it was known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadFile {
    /// The loads.
    #[serde(flatten)]
    pub window: LoadWindow,
    /// Size of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSize>,
}

impl LoadFile {
    /// Reads `{"layers": [[tokens of expert 0, …], …]}`; unknown keys are ignored.
    ///
    /// # Errors
    ///
    /// [`PlanError::Loads`] for anything that is not such a table of non-negative integers.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        serde_json::from_str(text).map_err(|error| PlanError::Loads(error.to_string()))
    }

    /// The file's text.
    #[expect(clippy::missing_panics_doc, reason = "plain data always serialises")]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("loads are plain data")
    }
}

impl LoadWindow {
    /// Adds another window, layer by layer.
    ///
    /// # Errors
    ///
    /// Refuses windows of a different shape, and is then unchanged.
    pub fn add(&mut self, other: &Self) -> Result<(), PlanError> {
        if self.layers.is_empty() {
            *self = other.clone();
            return Ok(());
        }
        if self.layers.len() != other.layers.len() {
            return Err(PlanError::LayerCount {
                expected: self.layers.len(),
                found: other.layers.len(),
            });
        }
        let mut sum = self.layers.clone();
        for (layer, (mine, theirs)) in sum.iter_mut().zip(&other.layers).enumerate() {
            mine.add(layer, theirs)?;
        }
        self.layers = sum;
        self.steps = self.steps.saturating_add(other.steps);
        Ok(())
    }
}

/// Cuts the stream of per-step loads into windows and keeps the latest of them.
///
/// It is plain data, so that a checkpoint can carry it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadTracker {
    window_steps: u64,
    keep: usize,
    current: LoadWindow,
    completed: Vec<LoadWindow>,
}

impl LoadTracker {
    /// Windows of `window_steps` optimizer steps, of which the last `keep` are kept.
    ///
    /// # Errors
    ///
    /// Refuses a window of zero steps.
    pub fn new(window_steps: u64, keep: usize) -> Result<Self, PlanError> {
        if window_steps == 0 {
            return Err(PlanError::Limit {
                name: "window_steps",
                value: "0".into(),
                expected: "at least 1",
            });
        }
        Ok(Self { window_steps, keep, current: LoadWindow::default(), completed: Vec::new() })
    }

    /// Adds the loads of one optimizer step; true when this step completed a window.
    ///
    /// # Errors
    ///
    /// Refuses loads whose shape differs from those before; call [`reset`](Self::reset) after a
    /// prune.
    pub fn record(&mut self, layers: Vec<LayerLoad>) -> Result<bool, PlanError> {
        self.current.add(&LoadWindow { steps: 1, layers })?;
        if self.current.steps < self.window_steps {
            return Ok(false);
        }
        self.completed.push(std::mem::take(&mut self.current));
        let surplus = self.completed.len().saturating_sub(self.keep);
        self.completed.drain(..surplus);
        Ok(true)
    }

    /// The kept windows, oldest first.
    pub fn completed(&self) -> &[LoadWindow] {
        &self.completed
    }

    /// The window that is being filled.
    pub fn current(&self) -> &LoadWindow {
        &self.current
    }

    /// Sum of the last `count` completed windows.
    pub fn last(&self, count: usize) -> LoadWindow {
        let mut sum = LoadWindow::default();
        for window in &self.completed[self.completed.len().saturating_sub(count)..] {
            let added = sum.add(window);
            debug_assert!(added.is_ok(), "`record` refuses windows of another shape");
        }
        sum
    }

    /// Puts the loads of every layer into another order, as after a rearrangement that prunes
    /// nothing: `order[layer]` lists old indices.
    ///
    /// # Panics
    ///
    /// If an index lies behind the last expert.
    pub fn reorder(&mut self, order: &[Vec<usize>]) {
        for window in self.completed.iter_mut().chain([&mut self.current]) {
            for (load, order) in window.layers.iter_mut().zip(order) {
                let tokens = order.iter().map(|&expert| load.tokens_per_expert[expert]);
                load.tokens_per_expert = tokens.collect();
            }
        }
    }

    /// Forgets everything, as after a prune, which changes the experts.
    pub fn reset(&mut self) {
        self.current = LoadWindow::default();
        self.completed.clear();
    }
}
