//! Balancing without an auxiliary loss (DeepSeek-V3, §2.1.2).

use crate::{Callback, Context, SelectionBias, StepMetrics, TrainConfig, TrainError};

/// After every step (and before a snapshot of it), lowers the selection bias of experts above the
/// mean load and raises the others'.
///
/// The model must have been built with `router_selection_bias`. The bias is part of the model:
/// checkpoints carry it, and a prune cuts it with the router. DeepSeek-V3 adds it to sigmoids and
/// moves it by 0.001; here it is added to logits, whose spread is of the order of one, so that
/// rates of the same size apply.
#[derive(Debug, Clone, Copy)]
pub struct BalanceBias {
    /// By how much a bias moves after a step.
    pub update_rate: f64,
}

impl BalanceBias {
    /// The callback that the settings of a run ask for, if they ask for one; for
    /// [`LanguageModel::callbacks`](crate::LanguageModel::callbacks).
    pub fn boxed<M: SelectionBias>(config: &TrainConfig) -> Option<Box<dyn Callback<M>>> {
        Some(Box::new(Self { update_rate: config.bias_update_rate? }))
    }
}

impl<M: SelectionBias> Callback<M> for BalanceBias {
    fn name(&self) -> &'static str {
        "balance_bias"
    }

    fn on_start(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        if !context.model().has_selection_bias() {
            return Err(TrainError::NoSelectionBias);
        }
        Ok(())
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        let mut shifts = Vec::with_capacity(metrics.loads.len());
        for load in &metrics.loads {
            let mean = load.total() as f64 / load.num_experts().max(1) as f64;
            let shift = |&tokens: &u64| match (tokens as f64).total_cmp(&mean) {
                std::cmp::Ordering::Less => self.update_rate as f32,
                std::cmp::Ordering::Equal => 0.0,
                std::cmp::Ordering::Greater => -self.update_rate as f32,
            };
            shifts.push(load.tokens_per_expert().iter().map(shift).collect());
        }
        context.update(|model| model.shift_selection_bias(&shifts));
        Ok(())
    }
}
