//! The seam of the loop: a callback observes a run and may change it.
//!
//! LAEP, validation, checkpoints, metric files and the live display are all callbacks; a user adds
//! one from another crate the same way ([`Trainer::with_callback`](crate::Trainer::with_callback)).
//!
//! What a callback learns comes as an [`Event`], and what it finds out itself it may
//! [`emit`](Context::emit) as one, so that the metrics file and the display need not know it.

use std::path::Path;

use burn::module::Module;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_laep::{LayerLoad, LayerStability, LayerSummary, LoadStatistics, PrunePlan};
use yuan_model::{ModelError, surgery::Selection};

use crate::{AdamW, TrainConfig, TrainError, checkpoint::Checkpoint, trainer::Session};

mod balance_bias;
mod display;
mod metrics_file;
mod prune_experts;
mod schedule;

pub use balance_bias::BalanceBias;
pub use display::Display;
pub use metrics_file::MetricsFile;
pub use prune_experts::{Guard, LaepConfig, PruneExperts, Trigger};
pub use schedule::{CheckpointEvery, ValidateEvery};

/// Hooks at the natural places of the loop; all of them do nothing unless written.
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

    /// Loss or gradient of the step stopped being a number, which ends the run unless it can go
    /// back.
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
}

/// Numbers of one optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps completed, this one included.
    pub step: u64,
    /// Mean cross-entropy over the micro-batches, in nats per token.
    pub loss: f64,
    /// Mean of the weighted balancing losses, if any is on; what is minimised is the sum of both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_loss: Option<f64>,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens of the step.
    pub tokens: u64,
    /// Duration of the step.
    pub seconds: f64,
    /// Per layer: load of the busiest expert over the mean.
    pub max_over_mean: Vec<f64>,
    /// Per layer: expert rows that the busiest device of a mesh computed over the mean; empty where
    /// one has them all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_max_over_mean: Vec<f64>,
    /// Per layer: tokens per expert over all micro-batches; the metrics file has sums over windows
    /// instead.
    #[serde(skip)]
    pub loads: Vec<LayerLoad>,
}

/// What happened in a run; one line of the metrics file each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// A run began or was resumed.
    Start {
        /// Steps completed before.
        step: u64,
        /// Steps of the whole run.
        steps: u64,
        /// Parameters of the model.
        parameters: u64,
        /// Experts of every layer.
        experts_per_layer: Vec<usize>,
    },
    /// An optimizer step.
    Step(StepMetrics),
    /// A batch was left out: its loss or gradient was no number.
    Skip {
        /// Steps completed; the next one is taken with the next batch.
        step: u64,
        /// Loss or gradient norm.
        what: String,
        /// What it was.
        value: String,
    },
    /// A validation.
    Validation {
        /// Steps completed.
        step: u64,
        /// Mean validation loss, in nats per token.
        loss: f64,
    },
    /// A window of expert loads is complete.
    Load {
        /// Steps completed.
        step: u64,
        /// Steps that were summed.
        window_steps: u64,
        /// Tokens per expert of every layer.
        layers: Vec<LayerLoad>,
        /// How unequal they are, layer by layer.
        statistics: Vec<LoadStatistics>,
        /// How much every layer moved, once there are enough windows.
        stability: Option<Vec<LayerStability>>,
    },
    /// A layer changed between the paper's two phases of expert load.
    Phase {
        /// Steps completed.
        step: u64,
        /// Whether the model is in the stable phase: every layer is.
        stable: bool,
        /// Whether each layer is.
        layers: Vec<bool>,
    },
    /// Experts were pruned and rearranged.
    Prune {
        /// Steps completed.
        step: u64,
        /// Prunes of the run, this one included.
        round: usize,
        /// Experts of every layer before.
        experts_before: Vec<usize>,
        /// Experts of every layer after.
        experts_after: Vec<usize>,
        /// Parameters of the model before.
        parameters_before: u64,
        /// Parameters of the model after.
        parameters_after: u64,
        /// Share of the load that went to the pruned experts.
        pruned_load: f64,
        /// Bytes of experts and their moments that went from one device to another.
        #[serde(default)]
        bytes_moved: u64,
        /// What the plan did to every layer.
        layers: Vec<LayerSummary>,
        /// Speed-up that the efficiency model predicts, if the devices' speed was given.
        predicted_gain: Option<f64>,
        /// The plan that was applied.
        plan: PrunePlan,
    },
    /// The experts of every layer were spread over the devices anew, none of them pruned.
    Rearrange {
        /// Steps completed.
        step: u64,
        /// Per layer: load of the busiest device over the mean as the experts were.
        groups_before: Vec<f64>,
        /// The same as they are now.
        groups_after: Vec<f64>,
        /// Per layer: which expert of before is at each place now.
        #[serde(default)]
        order: Vec<Vec<usize>>,
        /// Bytes of experts and their moments that went from one device to another.
        bytes_moved: u64,
    },
    /// The guard over a prune decided: the loss came back in time, or the prune is about to be
    /// undone.
    Guard {
        /// Steps completed.
        step: u64,
        /// Validation loss that it decided on; none if a loss was not even a number.
        loss: Option<f64>,
        /// The most that it allows.
        allowed_loss: f64,
        /// Whether the prune stays.
        satisfied: bool,
    },
    /// The run went back to where it was before its latest prune, and goes on without pruning.
    RollBack {
        /// Steps completed when it went back.
        step: u64,
        /// Steps completed where it goes on.
        to_step: u64,
    },
    /// A checkpoint is complete.
    Checkpoint {
        /// Steps completed.
        step: u64,
    },
    /// Anything a user's callback has to say.
    Custom {
        /// Steps completed.
        step: u64,
        /// What kind of thing it is.
        name: String,
        /// What there is to say.
        value: Value,
    },
}

impl Event {
    /// Steps completed when it happened.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(metrics) => metrics.step,
            Self::Start { step, .. }
            | Self::Skip { step, .. }
            | Self::Validation { step, .. }
            | Self::Load { step, .. }
            | Self::Phase { step, .. }
            | Self::Prune { step, .. }
            | Self::Rearrange { step, .. }
            | Self::Guard { step, .. }
            | Self::RollBack { step, .. }
            | Self::Checkpoint { step }
            | Self::Custom { step, .. } => *step,
        }
    }
}

/// What a callback asks of the loop once all callbacks have seen the step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Requests {
    pub(crate) validate: bool,
    pub(crate) checkpoint: bool,
    pub(crate) stop: bool,
    pub(crate) snapshot: bool,
    pub(crate) discard_snapshot: bool,
    pub(crate) roll_back: bool,
}

/// What a callback sees of a run, and the narrow way to change it.
pub struct Context<'a, M> {
    pub(crate) step: u64,
    pub(crate) config: &'a TrainConfig,
    pub(crate) run_dir: &'a Path,
    pub(crate) session: &'a mut Session<M>,
    pub(crate) requests: &'a mut Requests,
    pub(crate) events: &'a mut Vec<Event>,
}

impl<M> Context<'_, M> {
    /// Steps completed.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Settings of the run.
    pub fn config(&self) -> &TrainConfig {
        self.config
    }

    /// Directory of the run.
    pub fn run_dir(&self) -> &Path {
        self.run_dir
    }

    /// The model as it is now.
    pub fn model(&self) -> &M {
        self.session.model()
    }

    /// The optimizer as it is now.
    pub fn optimizer(&self) -> &AdamW {
        self.session.optimizer()
    }

    /// Cuts the model, and with it, by the selections that `cut` returns, the optimizer's moments;
    /// returns the bytes that went from one device to another.
    ///
    /// # Errors
    ///
    /// `cut` gives the model back unchanged when it refuses; the run is then as before.
    pub fn cut(
        &mut self,
        cut: impl FnOnce(M) -> Result<(M, Vec<Selection>), (M, ModelError)>,
    ) -> Result<u64, TrainError>
    where
        M: Module,
    {
        self.session.cut(cut)
    }

    /// Replaces the model's values; its parameters must keep their ids and shapes.
    pub fn update(&mut self, update: impl FnOnce(M) -> M) {
        self.session.update(update);
    }

    /// Asks for the whole state of the run to be kept aside, before [`Callback::on_step_end`]
    /// changes it.
    pub(crate) fn request_snapshot(&mut self) {
        self.requests.snapshot = true;
    }

    /// Whether there is a state to go back to.
    pub(crate) fn has_snapshot(&self) -> bool {
        Checkpoint::has_snapshot(self.run_dir)
    }

    /// Says that the run need not go back any more.
    pub(crate) fn discard_snapshot(&mut self) {
        self.requests.discard_snapshot = true;
    }

    /// Asks for the run to go back to its snapshot after this step.
    pub(crate) fn request_roll_back(&mut self) {
        self.requests.roll_back = true;
    }

    /// Asks for a validation after this step.
    pub fn request_validation(&mut self) {
        self.requests.validate = true;
    }

    /// Asks for a checkpoint after this step.
    pub fn request_checkpoint(&mut self) {
        self.requests.checkpoint = true;
    }

    /// Asks for the run to end after this step, with a last validation and checkpoint.
    pub fn request_stop(&mut self) {
        self.requests.stop = true;
    }

    /// Tells every callback what happened.
    pub fn emit(&mut self, event: Event) {
        self.events.push(event);
    }
}
