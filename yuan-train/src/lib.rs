//! Pre-training of Yuan3.0 models, with LAEP (arXiv 2601.14327) as a callback.
//!
//! Read in this order: [`config`] (what a run is), [`trainer`] (the loop, top to bottom),
//! [`language_model`] (what it trains), [`callback`] (the seam: observe and change a run),
//! [`optim`] (AdamW whose moments can be cut), [`reduce`] (gradients of many devices), [`watch`]
//! (runs that cannot hang), [`data`] (text to batches), [`checkpoint`] (stop anywhere, go on
//! exactly), [`model_directory`] and [`inventory`] (models on disk), [`report`] (what a run has to
//! show).

pub mod callback;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod efficiency;
mod error;
pub mod inventory;
pub mod language_model;
pub mod memory;
pub mod model_directory;
pub mod optim;
pub mod reduce;
pub mod report;
pub mod trainer;
pub mod watch;

pub use callback::{Callback, Context, LaepConfig, PruneExperts};
pub use config::{Precision, TrainConfig};
pub use efficiency::SpeedModel;
pub use error::TrainError;
pub use inventory::Inventory;
pub use language_model::{Batch, LanguageModel, LossOptions, LossOutput, Place, SelectionBias};
pub use model_directory::ModelDirectory;
pub use optim::AdamW;
pub use trainer::Trainer;
pub use watch::Watch;
pub use yuan_model::{ExpertAxis, PrunableExperts};
