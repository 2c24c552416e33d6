//! What can go wrong in a run, each in one sentence.
//!
//! A sentence holds its cause, which is therefore no `source`: a report of the chain would say it
//! twice.

use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use yuan_laep::PlanError;
use yuan_model::{
    ConfigError, ModelError, files::FileError, hf::CheckpointError, storage::StorageError,
};

/// Why a run could not start, go on or be resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file or directory could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file of tensors is damaged or out of reach.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A directory of published weights could not be read or written.
    #[error(transparent)]
    Weights(#[from] CheckpointError),
    /// A setting that must be at least one is zero.
    #[error("{name} must be at least 1")]
    Zero {
        /// Name of the setting.
        name: &'static str,
    },
    /// A setting is out of its range.
    #[error("{name} = {value} {expected}")]
    OutOfRange {
        /// Name of the setting.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it must be, as the end of a sentence.
        expected: String,
    },
    /// The steps to prune at do not ascend.
    #[error("the steps to prune at, {0:?}, must ascend from 1 or more")]
    PruneSteps(Vec<u64>),
    /// A plan from elsewhere was to be applied in several rounds.
    #[error("a plan that was made elsewhere can be applied once: one round, not more")]
    PlanOnce,
    /// The settings prune a model that cannot be pruned.
    #[error(
        "the model cannot be pruned: set laep.trigger to `never`, or implement `PrunableExperts` \
         and `LanguageModel::callbacks` for it"
    )]
    CannotPrune,
    /// The settings balance by selection biases, which the model does not have.
    #[error("bias_update_rate needs a model with router_selection_bias")]
    NoSelectionBias,
    /// A device has no arithmetic of the wanted type.
    #[error("the device does not compute in {0:?}")]
    Precision(FloatDType),
    /// Two callbacks of one name: both would do their work, and a checkpoint has room for one
    /// state.
    #[error("the run has a callback `{0}` already")]
    CallbackTwice(&'static str),
    /// The rows of a batch cannot be spread over the devices.
    #[error("a batch of {rows} rows cannot be spread evenly over {devices} devices")]
    UnevenBatch {
        /// Rows of a micro-batch.
        rows: usize,
        /// Devices of the mesh.
        devices: usize,
    },
    /// The groups of a plan cannot be spread over the devices that share the experts.
    #[error("{groups} groups cannot be spread over the {devices} devices that share the experts")]
    UnevenGroups {
        /// Device groups of the plan.
        groups: usize,
        /// Devices of a row of the mesh.
        devices: usize,
    },
    /// A tokenizer has more entries than the model has rows for.
    #[error("the tokenizer has {entries} entries, the model only {rows}")]
    Vocabulary {
        /// Entries of the tokenizer.
        entries: usize,
        /// Rows of the model's embedding.
        rows: usize,
    },
    /// Model and tokenizer end a document differently.
    #[error("config.json says that {model} ends a document, the tokenizer {tokenizer}")]
    EndOfDocument {
        /// The token by the model's configuration.
        model: u32,
        /// The token by the tokenizer.
        tokenizer: u32,
    },
    /// A file of a run cannot be understood.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no text, or too little of it, to train on.
    #[error("{0}")]
    Corpus(String),
    /// The tokenizer could not be trained, read or applied.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A checkpoint is incomplete, damaged or of another model.
    #[error("checkpoint {}: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint's directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A directory that was to become a run is not empty.
    #[error("{} is not empty: resume the run in it, or name another directory", .0.display())]
    RunExists(PathBuf),
    /// A directory that was to be a run is none.
    #[error("{} holds no run to resume", .0.display())]
    NoRun(PathBuf),
    /// The validation loss stopped being a number.
    #[error(
        "step {step}: the {what} is {value}; lower the learning rate or resume from an earlier \
         checkpoint"
    )]
    NotFinite {
        /// The step, counted from 1.
        step: u64,
        /// Which number.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// Loss or gradient was no number for several batches in a row.
    #[error(
        "step {step}: the {what} is {value} for {in_a_row} batches in a row; lower the learning rate or resume from an earlier checkpoint"
    )]
    NeverFinite {
        /// The step, counted from 1.
        step: u64,
        /// Loss, balancing loss or gradient norm.
        what: &'static str,
        /// Its last value.
        value: f64,
        /// Batches in a row.
        in_a_row: u64,
    },
    /// The device failed to compute or to hand over its results.
    #[error("the device failed: {0}")]
    Device(String),
    /// A device is gone or hangs.
    #[error("{0}; the run can be resumed from its latest checkpoint, on other devices too")]
    Lost(String),
    /// A model configuration was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A model could not be cut or filled.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A plan could not be made or does not fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A callback of a user's own failed.
    #[error("callback {name}: {cause}")]
    Callback {
        /// Name of the callback.
        name: &'static str,
        /// Its error.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl TrainError {
    /// For `map_err` on a file operation.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let error = FileError::of(action, path);
        move |cause| error(cause).into()
    }
}
