//! Stop anywhere, go on exactly: model, optimizer, data position and callbacks, written atomically.
//!
//! A checkpoint is a directory `checkpoint-00000120` with
//!
//! - `config.json`, the model's configuration (after a prune, its new expert counts),
//! - `model.safetensors`, parameters by path,
//! - `optimizer.safetensors`, both moments of every parameter by path,
//! - `state.json`, everything else.

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use burn::tensor::{DType, TensorData};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_model::{
    files::{UNFINISHED, remove_directory, write_directory},
    named,
    storage::{Dtype, OutgoingTensor, TensorBytes, TensorFile, stored_dtype, write_tensors},
};

use crate::{AdamW, AdamWConfig, LanguageModel, TrainError};

/// What a checkpoint carries beside tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
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

    /// The directory itself if it is a checkpoint, else the latest checkpoint in it.
    ///
    /// # Errors
    ///
    /// If the directory cannot be read.
    pub fn find(path: &Path) -> Result<Option<Self>, TrainError> {
        if !path.join("state.json").is_file() {
            return Self::latest(path);
        }
        let checkpoint = Self { path: path.into(), step: 0 };
        let step = checkpoint.state()?.step;
        Ok(Some(Self { step, ..checkpoint }))
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

    /// Writes a model that has not been trained here: step 0, with a fresh optimizer.
    ///
    /// # Errors
    ///
    /// If a file cannot be written.
    pub fn save_initial<M: LanguageModel>(run_dir: &Path, model: &M) -> Result<Self, TrainError> {
        let (optimizer, state) = (AdamW::new(&AdamWConfig::default()), CheckpointState::default());
        Self::save(run_dir, model, &optimizer, &state)
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
        Ok(remove_directory(&Self::snapshot(run_dir).path)?)
    }

    /// Removes the checkpoints of a branch that the run left.
    pub(crate) fn remove_after(run_dir: &Path, step: u64) -> Result<(), TrainError> {
        for checkpoint in Self::list(run_dir)?.iter().filter(|checkpoint| checkpoint.step > step) {
            remove_directory(&checkpoint.path)?;
        }
        Ok(())
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
            save_parameters(&directory.join("model.safetensors"), model)?;
            save_moments(&directory.join("optimizer.safetensors"), model, optimizer)
        })?;
        Ok(Self { path, step: state.step })
    }

    /// Removes all but the latest `keep` checkpoints of a run, and what a killed run left
    /// unfinished.
    ///
    /// # Errors
    ///
    /// If one cannot be removed.
    pub fn keep_latest(run_dir: &Path, keep: usize) -> Result<(), TrainError> {
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

    /// Everything that it carries beside tensors.
    ///
    /// # Errors
    ///
    /// If `state.json` is missing or damaged.
    pub fn state(&self) -> Result<CheckpointState, TrainError> {
        let file = self.path.join("state.json");
        let text = fs::read_to_string(&file).map_err(TrainError::io("read", &file))?;
        serde_json::from_str(&text)
            .map_err(|error| damaged(&self.path, format!("state.json: {error}")))
    }

    /// Builds model and optimizer as they were.
    ///
    /// # Errors
    ///
    /// Names the file that is missing or damaged, or every tensor that is missing, surplus or
    /// misshapen.
    pub fn load<M: LanguageModel>(
        &self,
        optimizer: &AdamWConfig,
        place: &M::Place,
    ) -> Result<(M, AdamW, CheckpointState), TrainError> {
        let state = self.state()?;
        let model: M = self.load_model(place)?;
        let stored = model.stored_parameters();
        let moments = TensorFile::open(&self.path.join("optimizer.safetensors"))?;
        let mut optimizer = AdamW::new(optimizer);
        optimizer
            .restore(&model, &stored, state.optimizer_updates, |name| {
                read_slices(&moments, name, None).ok()
            })
            .map_err(|reason| damaged(&self.path, format!("optimizer.safetensors: {reason}")))?;
        Ok((model, optimizer, state))
    }

    /// Builds the model alone, to generate with or to export.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn load_model<M: LanguageModel>(&self, place: &M::Place) -> Result<M, TrainError> {
        let file = self.path.join("config.json");
        let config = fs::read_to_string(&file).map_err(TrainError::io("read", &file))?;
        let model = M::from_config_json(&config, place)
            .map_err(|error| damaged(&self.path, format!("config.json: {error}")))?;
        self.fill(model)
    }

    /// The model's parameters from the checkpoint, all of them and no others.
    fn fill<M: LanguageModel>(&self, model: M) -> Result<M, TrainError> {
        let file = TensorFile::open(&self.path.join("model.safetensors"))?;
        let stored = model.stored_parameters();
        let expected =
            stored.iter().map(|parameter| (parameter.path.clone(), parameter.shape.clone()));
        let mut wrong = file.mismatches(expected);
        if !wrong.is_empty() {
            wrong.sort_unstable();
            return Err(damaged(&self.path, format!("model.safetensors: {}", wrong.join("; "))));
        }
        let mut result = Ok(());
        let model = named::write_stored(model, &stored, |name, slices| {
            read_slices(&file, name, Some(slices)).map_err(|error| result = Err(error)).ok()
        });
        result.map(|()| model)
    }
}

fn damaged(path: &Path, reason: impl Into<String>) -> TrainError {
    TrainError::Checkpoint { path: path.to_path_buf(), reason: reason.into() }
}

fn save_parameters<M: LanguageModel>(path: &Path, model: &M) -> Result<(), TrainError> {
    let (stored, dtypes) = (model.stored_parameters(), named::dtypes_by_id(model));
    let described = stored.iter().map(|parameter| {
        let dtype = dtypes.get(&parameter.parts[0].copies[0]).copied().unwrap_or(DType::F32);
        outgoing(parameter.path.clone(), dtype, parameter.shape.clone())
    });
    write_tensors(path, &described.collect::<Vec<_>>(), |index| {
        let data = named::read_stored(model, &stored[index]);
        data.map(TensorBytes::Data).map_err(TrainError::from)
    })
}

fn save_moments<M: LanguageModel>(
    path: &Path,
    model: &M,
    optimizer: &AdamW,
) -> Result<(), TrainError> {
    let (mut tensors, mut data) = (Vec::new(), Vec::new());
    optimizer.save(&model.stored_parameters(), |name, moment| {
        tensors.push(outgoing(name, moment.dtype(), moment.shape().to_vec()));
        data.push(Some(TensorBytes::Data(moment)));
        Ok(())
    })?;
    let twice = || damaged(path, "a moment would be written twice");
    write_tensors(path, &tensors, |index| data[index].take().ok_or_else(twice))
}

fn outgoing(name: String, dtype: DType, shape: Vec<usize>) -> OutgoingTensor {
    let dtype = stored_dtype(dtype).unwrap_or(Dtype::F32);
    OutgoingTensor { name, dtype, shape }
}

fn dtype_of(stored: Dtype) -> Option<DType> {
    match stored {
        Dtype::F64 => Some(DType::F64),
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// A tensor, or some of its slices along the first axis.
fn read_slices(
    file: &TensorFile,
    name: &str,
    slices: Option<Range<usize>>,
) -> Result<TensorData, TrainError> {
    let bytes = file.map(name)?;
    let stored = &file.tensors()[name];
    let dtype = dtype_of(stored.dtype).ok_or_else(|| {
        damaged(file.path(), format!("`{name}` is {:?}, which no parameter is", stored.dtype))
    })?;
    let (bytes, mut shape) = (bytes.as_ref(), stored.shape.clone());
    let bytes = match (slices, shape.first_mut()) {
        (Some(slices), Some(all)) => {
            let size = bytes.len() / (*all).max(1);
            *all = slices.len();
            &bytes[slices.start * size..slices.end * size]
        }
        _ => bytes,
    };
    Ok(TensorData::from_bytes_vec(bytes.to_vec(), shape, dtype))
}
