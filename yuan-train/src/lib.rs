//! Pre-training of mixture-of-experts language models, with LAEP (arXiv 2601.14327) as a callback.
//!
//! Start with [`TrainConfig`] (settings) and [`Run`] (a run on disk). [`Trainer`] is the loop,
//! [`LanguageModel`] what it trains, [`Callback`] with [`Context`] and [`Event`] the place to
//! observe and change a run, [`PruneExperts`] LAEP as a callback. [`data`] turns text into batches,
//! [`AdamW`] has moments that can be cut, [`Checkpoint`] resumes exactly; [`Watch`]
//! ends runs that hang, [`SpeedModel`] predicts what a
//! prune is worth, [`ModelDirectory`] and [`Inventory`] read models on disk. `docs/architecture.md`
//! walks through the code.

mod callback;
mod checkpoint;
mod checksums;
mod config;
pub mod data;
mod diagnosis;
mod error;
mod event;
mod gradients;
mod inventory;
mod language_model;
mod memory;
mod model_directory;
mod names;
mod optim;
mod run;
mod session;
mod sharded;
mod speed;
mod trainer;
mod watch;

pub use burn;
pub use yuan_model::{Batch, ExpertAxis, LossOutput, Precision, PrunableExperts};

pub use callback::{
    Callback,
    balance_bias::BalanceBias,
    context::Context,
    display::Display,
    image_loads::ImageLoads,
    metrics_file::MetricsFile,
    prune_experts::PruneExperts,
    schedule::{CheckpointEvery, ValidateEvery},
};
pub use checkpoint::{Checkpoint, CheckpointState};
pub use config::{
    TrainConfig,
    freeze::Freeze,
    laep::{Guard, LaepConfig, Recovery, Trigger},
    learns::Learns,
    schedule::Schedule,
};
pub use diagnosis::{Problem, problems_of_run};
pub use error::TrainError;
pub use event::{Event, RolloutMetrics, StepMetrics};
pub use gradients::{LossOptions, Pass};
pub use inventory::{FileEntry, ImageEntry, Inventory, TypeEntry};
pub use language_model::{LanguageModel, ModelSummary, SelectionBias};
pub use memory::peak_resident;
pub use model_directory::ModelDirectory;
pub use optim::{AdamW, AdamWConfig, clip_factor, global_norm_squared};
pub use run::{
    Run,
    check::{CHANGEABLE_SETTINGS, check_ranks, check_rows, check_settings},
    claim::Claim,
    fresh_model,
    lock::RunLock,
    new::{NewRun, RunData},
};
pub use speed::{SpeedModel, StepWork, measure_device, measure_links, memory_shape, model_shape};
pub use trainer::{NotFinite, StepOutcome, Trainer};
pub use watch::{Pulse, Watch};

/// What a training program imports.
pub mod prelude {
    pub use crate::{
        AdamW, AdamWConfig, Callback, Context, Event, LaepConfig, LanguageModel, LossOptions,
        LossOutput, NewRun, Run, StepMetrics, TrainConfig, TrainError, Trainer, Trigger,
    };
}
