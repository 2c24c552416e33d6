//! Hugging Face interop: the only place with Hugging Face's names.
//!
//! [`HfCheckpoint`] opens a directory of published weights;
//! [`YuanModel::save_hf`](crate::YuanModel::save_hf) writes one, and [`HfCheckpoint::rewrite`]
//! prunes or converts one without building the model.

mod checkpoint;
mod config;
mod elements;
mod layout;
mod naming;
mod save;
mod shards;
mod vision;

pub use checkpoint::{
    CheckpointError, HfCheckpoint, LoadOptions, config_of_files, extras, problems, read_config,
    read_language_config,
};
pub use elements::Piece;
pub use layout::{ParameterSource, TensorLayout};
pub use save::{
    PRUNED_METADATA, Parameters, ReadParameter, SaveOptions, Saved, overflowing, parse_shard_size,
    save_parameters,
};
pub use shards::Shards;
