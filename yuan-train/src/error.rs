//! What can go wrong in a run, each in one sentence.
//!
//! A sentence holds its cause, which is therefore no `source`: a report of the chain would say it
//! twice.

use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use yuan_data::DataError;
use yuan_files::FileError;
use yuan_laep::PlanError;
use yuan_model::{
    ConfigError, GenerateError, ModelError, hf::CheckpointError, ranks::RankError,
    storage::StorageError, text::TextError,
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
    /// Ranks could not exchange data, or do not agree.
    #[error(transparent)]
    Ranks(#[from] RankError),
    /// A device has no arithmetic of the wanted type.
    #[error("the device does not compute in {0:?}")]
    Precision(FloatDType),
    /// Two callbacks of one name: both would do their work, and a checkpoint has room for one
    /// state.
    #[error("the run has a callback `{0}` already")]
    CallbackTwice(&'static str),
    /// A micro-batch is larger than any device computes at once.
    #[error(
        "{rows} rows of {row} tokens are too many for one micro-batch: take fewer, and more \
         micro-batches"
    )]
    TooManyTokens {
        /// Rows of a micro-batch.
        rows: usize,
        /// Tokens of a row.
        row: usize,
    },
    /// A setting was to change that stays as it is for the whole run.
    #[error("{0} cannot change in the middle of a run")]
    FixedSetting(String),
    /// A prune is to happen after the end of the run.
    #[error("the prune after step {step} would never happen: the run has {steps} steps")]
    PruneAfterEnd {
        /// The step to prune at.
        step: u64,
        /// Steps of the run.
        steps: u64,
    },
    /// The guard could not judge the last prune before the run ends.
    #[error(
        "the guard judges the prune after step {step} within {needs} steps, but the run ends after \
         {steps}: prune earlier, guard for fewer steps, or train for more"
    )]
    NoTimeToGuard {
        /// The step to prune at.
        step: u64,
        /// Steps that the guard watches.
        needs: u64,
        /// Steps of the run.
        steps: u64,
    },
    /// A rank would get no row of a batch.
    #[error("a batch of {rows} rows is too small for {ranks} ranks")]
    TooFewRows {
        /// Rows of a micro-batch.
        rows: usize,
        /// Ranks of the run.
        ranks: usize,
    },
    /// The groups of a plan cannot be spread over the ranks that share the experts.
    #[error("{groups} groups cannot be spread over the {ranks} ranks that share the experts")]
    UnevenGroups {
        /// Device groups of the plan.
        groups: usize,
        /// Ranks of a row.
        ranks: usize,
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
    /// The data cannot be read, or there is too little of it.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The run was made by a version that kept its tokens otherwise.
    #[error(
        "the run in {} was made by an earlier version, whose order of rows this one does not know: \
         its checkpoints can start another run (--init)",
        .0.display()
    )]
    EarlierRun(PathBuf),
    /// A checkpoint is incomplete, damaged or of another model.
    #[error("checkpoint {}: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint's directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The latest checkpoint of a run is damaged, and an earlier one is not.
    #[error(
        "{cause}; {} is whole: remove {} to go on from it",
        good.display(), latest.display()
    )]
    LatestDamaged {
        /// What is wrong.
        cause: Box<TrainError>,
        /// The damaged checkpoint.
        latest: PathBuf,
        /// The latest one that is whole.
        good: PathBuf,
    },
    /// A directory that was to become a run is one.
    #[error("{} holds a run already: resume it, or name another directory", .0.display())]
    RunExists(PathBuf),
    /// A directory that was to become a run is not empty.
    #[error("{} is not empty: name a new or an empty directory", .0.display())]
    NotEmpty(PathBuf),
    /// Another process writes into the run directory.
    #[error(
        "{} is in use by {holder}: wait until it has ended, or name another directory",
        directory.display()
    )]
    RunBusy {
        /// The run directory.
        directory: PathBuf,
        /// The process, as it describes itself.
        holder: String,
    },
    /// The run directory was removed or replaced while the run went on.
    #[error("{} was removed or replaced while the run wrote into it", .0.display())]
    RunGone(PathBuf),
    /// A directory that was to be a run is none.
    #[error("{} holds no run to resume", .0.display())]
    NoRun(PathBuf),
    /// A run has nothing yet that could be loaded.
    #[error("{} has no checkpoint yet", .0.display())]
    NoCheckpoint(PathBuf),
    /// Its metrics tell of checkpoints that are not there.
    #[error(
        "the checkpoints of {} are gone: bring them back, or remove its metrics.jsonl to start at \
         step 0",
        .0.display()
    )]
    CheckpointsGone(PathBuf),
    /// A run of reinforcement learning was to be trained on data.
    #[error("{} learns from rewards: `yuan_rl::trainer` makes its trainer", .0.display())]
    LearnsFromRewards(PathBuf),
    /// The answers to all prompts were rewarded alike.
    #[error(
        "step {step}: in {batches} batches of prompts in a row, all answers to each prompt were \
         rewarded alike or cut off, so there is nothing to learn from. Begin another run from this \
         one with easier or harder prompts, with more answers to each, or with longer answers"
    )]
    RewardedAlike {
        /// The step, counted from 1.
        step: u64,
        /// Batches in a row.
        batches: u64,
    },
    /// The model could not answer.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A text could not be made tokens, or tokens a text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The preparation of a run was interrupted.
    #[error("{} holds a run that was never prepared to the end: start it again", .0.display())]
    Unprepared(PathBuf),
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
    /// A part of a multimodal model is to stay as it is, and the model is none.
    #[error("freeze: the model sees no images, so it has no parts to freeze")]
    NothingToFreeze,
    /// What is frozen is all that could learn.
    #[error(
        "nothing learns: the language model is frozen, and what is to learn (--train) or the data, \
         which has no images, leaves nothing else"
    )]
    NothingLearns,
    /// Over ranks, some rows of a step have images and others have none.
    #[error("over ranks every row of a step must have an image, or none of them one")]
    RowWithoutImage,
    /// An image cannot be read.
    #[cfg(feature = "images")]
    #[error(transparent)]
    Picture(#[from] yuan_model::vision::PictureError),
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
