//! The seam of the loop: a callback observes a run and may change it.
//!
//! LAEP, the schedules of validations and checkpoints, the metrics file and the live display are
//! all callbacks; a user adds one from another crate the same way
//! ([`Trainer::with_callback`](crate::Trainer::with_callback)). The trainer validates and writes.
//!
//! What a callback learns comes as an [`Event`], and what it finds out itself it may
//! [`emit`](Context::emit) as one, so that the metrics file and the display need not know it.

use serde_json::Value;

use crate::{Context, Event, StepMetrics, TrainError};

mod background;
pub(crate) mod balance_bias;
pub(crate) mod context;
pub(crate) mod display;
pub(crate) mod image_loads;
pub(crate) mod metrics_file;
pub(crate) mod prune_experts;
pub(crate) mod schedule;

/// Hooks at the natural places of the loop; all of them do nothing unless written.
///
/// ```
/// use yuan_train::{Callback, Context, StepMetrics, TrainError};
///
/// /// Ends a run whose loss is low enough.
/// struct StopAt(f64);
///
/// impl<M> Callback<M> for StopAt {
///     fn name(&self) -> &'static str {
///         "stop_at"
///     }
///
///     fn on_step(
///         &mut self,
///         context: &mut Context<'_, M>,
///         metrics: &StepMetrics,
///     ) -> Result<(), TrainError> {
///         if metrics.loss <= self.0 {
///             context.request_stop();
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait Callback<M> {
    /// Name under which [`state`](Self::state) is kept in a checkpoint; unique in a run.
    fn name(&self) -> &'static str;

    /// Before the first step, or before the first step after resuming.
    ///
    /// # Errors
    ///
    /// An error ends the run.
    fn on_start(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        let _ = context;
        Ok(())
    }

    /// After every optimizer step: the place to look and to ask.
    ///
    /// # Errors
    ///
    /// An error ends the run.
    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        let _ = (context, metrics);
        Ok(())
    }

    /// After the validation of the step, if there was one, and before its checkpoint: the place to
    /// change the model, so that a validation asked for in [`on_step`](Self::on_step) shows it as
    /// it was.
    ///
    /// # Errors
    ///
    /// An error ends the run.
    fn on_step_end(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        let _ = context;
        Ok(())
    }

    /// Loss or gradient of a step, or the validation loss, is no number. Unless the run goes back,
    /// the batch is left out, up to [`max_skipped`](crate::TrainConfig::max_skipped) in a row; a
    /// validation loss ends the run.
    fn on_not_finite(&mut self, context: &mut Context<'_, M>) {
        let _ = context;
    }

    /// Something happened, this callback's own events included.
    ///
    /// # Errors
    ///
    /// An error ends the run.
    fn on_event(&mut self, event: &Event) -> Result<(), TrainError> {
        let _ = event;
        Ok(())
    }

    /// The run is over, or interrupted: the place to finish what is done beside it.
    ///
    /// # Errors
    ///
    /// An error is that of the run, unless it had one before.
    fn on_end(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    /// What a checkpoint must carry for this callback to go on as if never interrupted.
    fn state(&self) -> Option<Value> {
        None
    }

    /// Takes up what [`state`](Self::state) returned.
    ///
    /// # Errors
    ///
    /// If the value is no state of this callback.
    fn restore(&mut self, state: Value) -> Result<(), TrainError> {
        let _ = state;
        Ok(())
    }

    /// The run went back to a snapshot, in which this callback had `state`.
    ///
    /// # Errors
    ///
    /// If the value is no state of this callback.
    fn roll_back(&mut self, state: Option<Value>) -> Result<(), TrainError> {
        state.map_or(Ok(()), |state| self.restore(state))
    }

    /// The run is back at the snapshot, and every callback has its state.
    ///
    /// # Errors
    ///
    /// Ends the run.
    fn on_rolled_back(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        let _ = context;
        Ok(())
    }
}
