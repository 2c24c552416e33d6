//! Stop anywhere, go on exactly: model, optimizer, data position and callbacks, written atomically.
//!
//! A checkpoint is a directory `checkpoint-00000120` with
//!
//! - `config.json`, the model's configuration (after a prune, its new expert counts),
//! - `model.safetensors`, parameters by path,
//! - `optimizer.safetensors`, both moments of every parameter by path,
//! - `state.json`, everything else.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use burn::{
    module::Module,
    tensor::{DType, Device, TensorData},
};
use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_model::named;

use crate::{
    AdamW, LanguageModel, TrainConfig, TrainError,
    files::{UNFINISHED, remove_directory, write_directory},
};

/// What a checkpoint carries beside tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointState {
    /// Steps completed.
    pub step: u64,
    /// Rows taken from the training stream.
    pub consumed_rows: u64,
    /// Updates the optimizer made.
    pub optimizer_updates: u64,
    /// States of callbacks by name.
    pub callbacks: BTreeMap<String, Value>,
}

/// A complete checkpoint on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its directory.
    pub path: PathBuf,
    /// Steps completed when it was written.
    pub step: u64,
}

const PREFIX: &str = "checkpoint-";
const SNAPSHOT: &str = "before-prune";

impl Checkpoint {
    /// All complete checkpoints of a run, oldest first.
    ///
    /// # Errors
    ///
    /// If the run directory cannot be read.
    pub fn list(run_dir: &Path) -> Result<Vec<Self>, TrainError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(run_dir).map_err(TrainError::io("read", run_dir))? {
            let path = entry.map_err(TrainError::io("read", run_dir))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            // An unfinished one has a suffix that is no number.
            if let Some(step) = name.and_then(|name| name.strip_prefix(PREFIX)?.parse().ok()) {
                found.push(Self { path, step });
            }
        }
        found.sort_by_key(|checkpoint| checkpoint.step);
        Ok(found)
    }

    /// The latest complete checkpoint of a run.
    ///
    /// # Errors
    ///
    /// If the run directory cannot be read.
    pub fn latest(run_dir: &Path) -> Result<Option<Self>, TrainError> {
        Ok(Self::list(run_dir)?.pop())
    }

    /// Writes a checkpoint; it is complete or not there.
    ///
    /// # Errors
    ///
    /// If a file cannot be written; earlier checkpoints are untouched.
    pub fn save<M: LanguageModel>(
        run_dir: &Path,
        model: &M,
        optimizer: &AdamW,
        state: &CheckpointState,
    ) -> Result<Self, TrainError> {
        let path = run_dir.join(format!("{PREFIX}{:08}", state.step));
        Self::write(path, model, optimizer, state)
    }

    /// The state before a prune, which a guard may go back to.
    pub(crate) fn snapshot(run_dir: &Path) -> Self {
        Self { path: run_dir.join(SNAPSHOT), step: 0 }
    }

    pub(crate) fn save_snapshot<M: LanguageModel>(
        run_dir: &Path,
        model: &M,
        optimizer: &AdamW,
        state: &CheckpointState,
    ) -> Result<Self, TrainError> {
        Self::write(Self::snapshot(run_dir).path, model, optimizer, state)
    }

    pub(crate) fn has_snapshot(run_dir: &Path) -> bool {
        Self::snapshot(run_dir).path.is_dir()
    }

    pub(crate) fn discard_snapshot(run_dir: &Path) -> Result<(), TrainError> {
        remove_directory(&Self::snapshot(run_dir).path)
    }

    /// Removes the checkpoints of a branch that the run left.
    pub(crate) fn remove_after(run_dir: &Path, step: u64) -> Result<(), TrainError> {
        let checkpoints = Self::list(run_dir)?;
        checkpoints
            .iter()
            .filter(|checkpoint| checkpoint.step > step)
            .try_for_each(|old| remove_directory(&old.path))
    }

    fn write<M: LanguageModel>(
        path: PathBuf,
        model: &M,
        optimizer: &AdamW,
        state: &CheckpointState,
    ) -> Result<Self, TrainError> {
        write_directory(&path, |directory| {
            let write = |name: &str, text: String| {
                let file = directory.join(name);
                fs::write(&file, text).map_err(TrainError::io("write", &file))
            };
            write("config.json", model.config_json())?;
            write(
                "state.json",
                serde_json::to_string_pretty(state).map_err(|e| damaged(&path, e.to_string()))?,
            )?;
            let mut tensors = Vec::new();
            named::read_parameters(model, |name, data| collect(&mut tensors, name.to_owned(), data))?;
            write_tensors(&directory.join("model.safetensors"), std::mem::take(&mut tensors))?;
            optimizer.save(model, |name, data| collect(&mut tensors, name, data))?;
            write_tensors(&directory.join("optimizer.safetensors"), tensors)
        })?;
        Ok(Self { path, step: state.step })
    }

    /// Removes all but the latest `keep` checkpoints of a run, and what a killed run left unfinished.
    ///
    /// # Errors
    ///
    /// If one cannot be removed.
    pub fn prune(run_dir: &Path, keep: usize) -> Result<(), TrainError> {
        let mut checkpoints = Self::list(run_dir)?;
        checkpoints.truncate(checkpoints.len().saturating_sub(keep));
        checkpoints.iter().try_for_each(|old| remove_directory(&old.path))?;
        for entry in fs::read_dir(run_dir).map_err(TrainError::io("read", run_dir))? {
            let path = entry.map_err(TrainError::io("read", run_dir))?.path();
            let is_checkpoint =
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
            if is_checkpoint && path.extension().is_some_and(|extension| extension == UNFINISHED) {
                fs::remove_dir_all(&path).map_err(TrainError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Builds model and optimizer as they were.
    ///
    /// # Errors
    ///
    /// Names the file that is missing or damaged, or every tensor that is missing, surplus or misshapen.
    pub fn load<M: LanguageModel>(
        &self,
        config: &TrainConfig,
        device: &Device,
    ) -> Result<(M, AdamW, CheckpointState), TrainError> {
        let read = |name: &str| {
            let file = self.path.join(name);
            fs::read_to_string(&file).map_err(TrainError::io("read", &file))
        };
        let state: CheckpointState = serde_json::from_str(&read("state.json")?)
            .map_err(|error| damaged(&self.path, format!("state.json: {error}")))?;
        let model = M::from_config_json(&read("config.json")?, device)
            .map_err(|error| damaged(&self.path, format!("config.json: {error}")))?;
        let model = self.fill(model)?;
        let mut moments = read_tensors(&self.path.join("optimizer.safetensors"))?;
        let mut optimizer = AdamW::new(config);
        optimizer
            .restore(&model, state.optimizer_updates, |name| moments.remove(name))
            .map_err(|reason| damaged(&self.path, format!("optimizer.safetensors: {reason}")))?;
        Ok((model, optimizer, state))
    }

    /// The model's parameters from the checkpoint, all of them and no others.
    fn fill<M: Module>(&self, model: M) -> Result<M, TrainError> {
        let mut tensors = read_tensors(&self.path.join("model.safetensors"))?;
        let mut wrong = Vec::new();
        let model = named::write_parameters(model, |name, shape| match tensors.remove(name) {
            Some(data) if data.shape() == shape => Some(data),
            Some(data) => {
                wrong.push(format!("`{name}` is {:?}, expected {:?}", &data.shape()[..], &shape[..]));
                None
            }
            None => {
                wrong.push(format!("`{name}` is missing"));
                None
            }
        });
        wrong.extend(tensors.keys().map(|name| format!("`{name}` is no parameter of the model")));
        if wrong.is_empty() {
            return Ok(model);
        }
        wrong.sort_unstable();
        Err(damaged(&self.path, format!("model.safetensors: {}", wrong.join("; "))))
    }
}

fn damaged(path: &Path, reason: impl Into<String>) -> TrainError {
    TrainError::Checkpoint { path: path.to_path_buf(), reason: reason.into() }
}

/// A tensor on its way into a file.
struct Outgoing(TensorData);

impl View for Outgoing {
    fn dtype(&self) -> Dtype {
        match self.0.dtype() {
            DType::F64 => Dtype::F64,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.0.as_bytes())
    }

    fn data_len(&self) -> usize {
        self.0.as_bytes().len()
    }
}

fn collect(tensors: &mut Vec<(String, Outgoing)>, name: String, data: TensorData) -> Result<(), TrainError> {
    tensors.push((name, Outgoing(data)));
    Ok(())
}

fn write_tensors(path: &Path, tensors: Vec<(String, Outgoing)>) -> Result<(), TrainError> {
    safetensors::serialize_to_file(tensors, None, path).map_err(|error| TrainError::Io {
        action: "write",
        path: path.to_path_buf(),
        cause: match error {
            safetensors::SafeTensorError::IoError(cause) => cause,
            other => std::io::Error::other(other.to_string()),
        },
    })
}

fn read_tensors(path: &Path) -> Result<HashMap<String, TensorData>, TrainError> {
    let bytes = fs::read(path).map_err(TrainError::io("read", path))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| damaged(path, error.to_string()))?;
    let data = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let dtype = match view.dtype() {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(damaged(
                    path,
                    format!("`{name}` has the type {other:?}, which no parameter has"),
                ));
            }
        };
        Ok((name, TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype)))
    };
    tensors.tensors().into_iter().map(data).collect()
}
