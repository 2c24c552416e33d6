//! What happens in a run: one [`Event`] a line of its metrics file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_laep::{LayerLoad, LayerStability, LayerSummary, LoadStatistics, PrunePlan};

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
    /// Duration of the step, its data included unless the model made them
    /// ([`RolloutMetrics::seconds`]).
    pub seconds: f64,
    /// Per layer: load of the busiest expert over the mean.
    pub max_over_mean: Vec<f64>,
    /// Per layer: expert rows that the busiest rank of a row computed over the mean; empty where
    /// one has them all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_max_over_mean: Vec<f64>,
    /// What the step's objective tells beside its loss, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measures: BTreeMap<String, f64>,
    /// Per layer: tokens per expert over all micro-batches; the metrics file has sums over windows
    /// instead.
    #[serde(skip)]
    pub loads: Vec<LayerLoad>,
    /// The same of the rows of images alone; empty without images.
    #[serde(skip)]
    pub image_loads: Vec<LayerLoad>,
}

/// What came of the answers to a batch of prompts, in reinforcement learning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutMetrics {
    /// Steps completed when they were given.
    pub step: u64,
    /// Whether they were only measured, on prompts that are not learnt.
    pub held_out: bool,
    /// Prompts.
    pub prompts: u64,
    /// Answers to all of them.
    pub answers: u64,
    /// Prompts whose answers differ in their rewards: those that are learnt from.
    pub learnt: u64,
    /// Share of the answers that are right.
    pub right: f64,
    /// Mean reward of an answer.
    pub reward: f64,
    /// Means of what the rewards are made of, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parts: BTreeMap<String, f64>,
    /// Mean length of an answer, in tokens.
    pub tokens: f64,
    /// Share of the answers that were cut off.
    pub cut_off: f64,
    /// Seconds that the answers took.
    pub seconds: f64,
    /// Tokens per expert of every layer, in the answers and, once each, in the prompts. Over ranks each
    /// takes as many prompts, so a few may be answered by two, and count as often.
    pub layers: Vec<LayerLoad>,
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
        /// Loss, balancing loss or gradient norm.
        what: String,
        /// What it was.
        value: String,
    },
    /// A validation.
    Validation {
        /// Steps completed.
        step: u64,
        /// Mean validation loss, in nats per token; of several data sets, by their shares.
        loss: f64,
        /// That of every data set, if there are several.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        sets: BTreeMap<String, f64>,
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
    /// A window of expert loads is complete, those of images and of text apart.
    ImageLoad {
        /// Steps completed.
        step: u64,
        /// Steps that were summed.
        window_steps: u64,
        /// Rows of images per expert of every layer.
        images: Vec<LayerLoad>,
        /// All other tokens per expert of every layer.
        text: Vec<LayerLoad>,
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
        /// Speed-up that the efficiency model predicts, if the devices' speed was measured when the
        /// run was made.
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
    /// Lines of the metrics file could not be read when the run was resumed.
    HistoryLost {
        /// Steps completed.
        step: u64,
        /// How many.
        lines: usize,
        /// The file in the run directory that holds what there was; none if there was no file.
        kept_in: Option<String>,
    },
    /// A setting of the run was changed when it was resumed.
    Change {
        /// Steps completed.
        step: u64,
        /// Name of the setting.
        setting: String,
        /// What it was.
        from: String,
        /// What it is.
        to: String,
    },
    /// A checkpoint is complete.
    Checkpoint {
        /// Steps completed.
        step: u64,
    },
    /// A model answered prompts and was rewarded.
    Rollout(RolloutMetrics),
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
            Self::Rollout(metrics) => metrics.step,
            Self::Start { step, .. }
            | Self::Skip { step, .. }
            | Self::Validation { step, .. }
            | Self::Load { step, .. }
            | Self::ImageLoad { step, .. }
            | Self::Phase { step, .. }
            | Self::Prune { step, .. }
            | Self::Rearrange { step, .. }
            | Self::Guard { step, .. }
            | Self::RollBack { step, .. }
            | Self::HistoryLost { step, .. }
            | Self::Change { step, .. }
            | Self::Checkpoint { step }
            | Self::Custom { step, .. } => *step,
        }
    }
}
