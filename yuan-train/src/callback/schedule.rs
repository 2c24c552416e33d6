//! When to validate and when to write a checkpoint: every so many steps.

use crate::{Callback, Context, StepMetrics, TrainError};

/// Asks for a validation every `n` steps.
#[derive(Debug, Clone, Copy)]
pub struct ValidateEvery(pub u64);

impl<M> Callback<M> for ValidateEvery {
    fn name(&self) -> &'static str {
        "validate_every"
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        if self.0 > 0 && metrics.step.is_multiple_of(self.0) {
            context.request_validation();
        }
        Ok(())
    }
}

/// Asks for a checkpoint every `n` steps.
#[derive(Debug, Clone, Copy)]
pub struct CheckpointEvery(pub u64);

impl<M> Callback<M> for CheckpointEvery {
    fn name(&self) -> &'static str {
        "checkpoint_every"
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        if self.0 > 0 && metrics.step.is_multiple_of(self.0) {
            context.request_checkpoint();
        }
        Ok(())
    }
}
