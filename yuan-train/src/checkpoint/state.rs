//! What a checkpoint holds beside tensors, and the names in it.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::TrainError;

/// What a checkpoint carries beside tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointState {
    /// How the checkpoint is laid out: 1 has checksums, 0, of earlier versions, has none.
    #[serde(default)]
    pub(crate) layout: u32,
    /// Steps completed.
    pub step: u64,
    /// Rows taken from the training stream.
    pub consumed_rows: u64,
    /// Updates the optimizer made.
    pub optimizer_updates: u64,
    /// States of callbacks by name.
    pub callbacks: BTreeMap<String, Value>,
    /// Settings that a resumed run may have otherwise, as they were.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
}

/// Rows that no training reads: more is a damaged number.
pub(super) const MOST_ROWS: u64 = 1 << 60;
/// The present [`CheckpointState::layout`].
pub(super) const LAYOUT: u32 = 1;
/// The key in a header that says after which step its tensors were written.
pub(super) const STEP: &str = "step";
pub(super) const MODEL: &str = "model.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
/// Name of the file with everything that is no tensor.
pub(super) const STATE: &str = "state.json";

pub(super) fn damaged(path: &Path, reason: impl Into<String>) -> TrainError {
    TrainError::Checkpoint { path: path.to_path_buf(), reason: reason.into() }
}
