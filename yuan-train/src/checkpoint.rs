//! Stop anywhere, go on exactly: model, optimizer, data position and callbacks, written atomically.
//!
//! A checkpoint is a directory `checkpoint-00000120` with
//!
//! - `config.json`, the model's configuration (after a prune, its new expert counts),
//! - `model.safetensors`, parameters by path,
//! - `optimizer.safetensors`, both moments of every parameter by path,
//! - `state.json`, everything else,
//! - `checksums.json`, what the files were when they were written. They are compared when a
//!   checkpoint is loaded, by a thread of its own beside the loading.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    ops::Range,
    path::{Path, PathBuf},
    thread,
};

use burn::{
    module::ParamId,
    tensor::{DType, TensorData},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_files::{Checksum, remove_directory, remove_leftovers_in, write_directory};
use yuan_model::{
    hf::Shards,
    named::{self, StoredParameter},
    ranks::Ranks,
    storage::{Dtype, OutgoingTensor, TensorBytes, TensorFile, stored_dtype, write_tensors},
};

use crate::{
    AdamW, AdamWConfig, LanguageModel, TrainError, checksums::Checksums,
    language_model::optimizer_for, names::CONFIG, optim::SUFFIXES, run::lock::RunLock,
};

mod whole;

use whole::Whole;

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

/// A complete checkpoint on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its directory.
    pub path: PathBuf,
    /// Steps completed when it was written.
    pub step: u64,
}

/// Rows that no training reads: more is a damaged number.
const MOST_ROWS: u64 = 1 << 60;
/// The present [`CheckpointState::layout`].
const LAYOUT: u32 = 1;
/// The key in a header that says after which step its tensors were written.
const STEP: &str = "step";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";
/// Name of the file with everything that is no tensor.
const STATE: &str = "state.json";
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
            // Other libraries call their checkpoints alike, without this file and with fewer
            // digits; one of this library without it is damaged.
            let is_own = |step: &u64| {
                let is_named = path.ends_with(format!("{PREFIX}{step:08}")) && path.is_dir();
                path.join(STATE).is_file() || is_named
            };
            if let Some(step) = step_of(&path).filter(is_own) {
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

    /// The directory itself if it is a checkpoint, else the latest checkpoint in it; none for
    /// published weights, which another library may have put beside checkpoints of its own.
    ///
    /// # Errors
    ///
    /// If the directory cannot be read.
    pub fn find(path: &Path) -> Result<Option<Self>, TrainError> {
        if !path.join(STATE).is_file() {
            if Shards::are_in(path) {
                return Ok(None);
            }
            let found = Self::latest(path)?;
            return match found {
                None if path.join(CONFIG).exists() => {
                    Err(TrainError::NoCheckpoint(path.to_path_buf()))
                }
                None if path.join(RunLock::FILE).exists() => {
                    Err(TrainError::Unprepared(path.to_path_buf()))
                }
                found => Ok(found),
            };
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
        let state = CheckpointState { layout: LAYOUT, ..state.clone() };
        let text = serde_json::to_string_pretty(&state);
        let text = text.map_err(|error| damaged(&path, error.to_string()))?;
        let whole = Whole::of(model, optimizer);
        if !whole.is_first_rank() {
            whole.serve()?;
            return Ok(Self { path, step: state.step });
        }
        let dtypes = named::dtypes_by_id(model);
        write_directory(&path, |directory| {
            let mut checksums = Checksums::default();
            for (name, text) in [("config.json", model.config_json()), (STATE, text)] {
                let file = directory.join(name);
                fs::write(&file, &text).map_err(TrainError::io("write", &file))?;
                checksums.add(name, Checksum::of(text.as_bytes()));
            }
            let step = [(STEP, state.step.to_string())];
            let saved = save_parameters(&directory.join(MODEL), &step, &whole, &dtypes)?;
            checksums.add(MODEL, saved);
            let saved = save_moments(&directory.join(OPTIMIZER), &step, &whole)?;
            checksums.add(OPTIMIZER, saved);
            checksums.save(directory)
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
        remove_leftovers_in(run_dir);
        Ok(())
    }

    /// Everything that it carries beside tensors.
    ///
    /// # Errors
    ///
    /// If `state.json` is missing or damaged.
    pub fn state(&self) -> Result<CheckpointState, TrainError> {
        let file = self.path.join(STATE);
        let text = fs::read_to_string(&file).map_err(TrainError::io("read", &file))?;
        let state: CheckpointState = serde_json::from_str(&text)
            .map_err(|error| damaged(&self.path, format!("{STATE}: {error}")))?;
        let of_name = step_of(&self.path).filter(|&step| step != state.step);
        if of_name.is_some() || state.consumed_rows > MOST_ROWS {
            let (step, rows) = (state.step, state.consumed_rows);
            let reason = format!("{STATE} says step {step} and {rows} rows, which cannot be");
            return Err(damaged(&self.path, reason));
        }
        Ok(state)
    }

    /// Reads every file and compares it with its checksum; checkpoints of earlier versions have
    /// none.
    ///
    /// # Errors
    ///
    /// Names the files that are missing or not those that were written.
    pub fn verify(&self) -> Result<(), TrainError> {
        let has_checksums = self.path.join(Checksums::FILE).exists();
        if !has_checksums && self.state()?.layout == 0 {
            return Ok(());
        }
        let checksums = Checksums::load(&self.path)?;
        let missing = checksums.missing(&["config.json", STATE, MODEL, OPTIMIZER]);
        self.refuse(&[missing, checksums.problems(&self.path)].concat())
    }

    /// Compares the sizes of all files with those that were written, which reads none of them.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify), less what only the contents tell.
    pub fn verify_sizes(&self) -> Result<(), TrainError> {
        if !self.path.join(Checksums::FILE).exists() {
            return self.verify();
        }
        self.refuse(&Checksums::load(&self.path)?.problems_of_sizes(&self.path))
    }

    /// Makes one error of what is wrong, if anything is.
    fn refuse(&self, problems: &[String]) -> Result<(), TrainError> {
        match problems {
            [] => Ok(()),
            problems => Err(damaged(&self.path, problems.join("; "))),
        }
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
        self.load_at(optimizer, place, None)
    }

    /// The same for the part of one rank, if there are several.
    pub(crate) fn load_at<M: LanguageModel>(
        &self,
        optimizer: &AdamWConfig,
        place: &M::Place,
        ranks: Option<&Ranks>,
    ) -> Result<(M, AdamW, CheckpointState), TrainError> {
        let load = || {
            let state = self.state()?;
            let model: M = self.load_model_of(place, ranks, Some(state.step))?;
            let stored = model.stored_parameters();
            let moments = self.open_tensors(OPTIMIZER, Some(state.step))?;
            let mut optimizer = optimizer_for(optimizer, &model);
            optimizer
                .restore(&model, &stored, state.optimizer_updates, |name| {
                    read_slices(&moments, name, None).ok()
                })
                .map_err(|reason| damaged(&self.path, format!("{OPTIMIZER}: {reason}")))?;
            Ok((model, optimizer, state))
        };
        match ranks {
            // One rank reads all of it for that.
            Some(ranks) if !ranks.world().is_first() => load(),
            _ => self.beside_verifying(load),
        }
    }

    /// Loads while a thread compares the files with their checksums; what it finds explains what
    /// else went wrong.
    fn beside_verifying<T>(
        &self,
        load: impl FnOnce() -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        thread::scope(|scope| {
            let verified = scope.spawn(|| self.verify());
            let loaded = load();
            verified.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            loaded
        })
    }

    /// Builds the model alone, to generate with or to export.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn load_model<M: LanguageModel>(&self, place: &M::Place) -> Result<M, TrainError> {
        self.beside_verifying(|| self.load_model_of(place, None, None))
    }

    fn load_model_of<M: LanguageModel>(
        &self,
        place: &M::Place,
        ranks: Option<&Ranks>,
        step: Option<u64>,
    ) -> Result<M, TrainError> {
        let file = self.path.join("config.json");
        let config = fs::read_to_string(&file).map_err(TrainError::io("read", &file))?;
        let model = match ranks {
            Some(ranks) => M::from_config_json_on_rank(&config, place, ranks),
            None => M::from_config_json(&config, place),
        };
        let model = model.map_err(|error| damaged(&self.path, format!("config.json: {error}")))?;
        self.fill(model, step)
    }

    /// Opens a file of tensors, which must be of this step; those of earlier versions do not say.
    fn open_tensors(&self, name: &str, step: Option<u64>) -> Result<TensorFile, TrainError> {
        let file = TensorFile::open(&self.path.join(name))?;
        match (file.metadata().get(STEP), step) {
            (Some(found), Some(step)) if *found != step.to_string() => {
                let reason = format!("{name} is of step {found}, but {STATE} of step {step}");
                Err(damaged(&self.path, reason))
            }
            _ => Ok(file),
        }
    }

    /// The model's parameters from the checkpoint, all of them and no others.
    fn fill<M: LanguageModel>(&self, model: M, step: Option<u64>) -> Result<M, TrainError> {
        let file = self.open_tensors(MODEL, step)?;
        let stored = model.stored_parameters();
        let expected =
            stored.iter().map(|parameter| (parameter.path.clone(), parameter.shape.clone()));
        let mut wrong = file.mismatches(expected);
        if !wrong.is_empty() {
            wrong.sort_unstable();
            return Err(damaged(&self.path, format!("{MODEL}: {}", wrong.join("; "))));
        }
        let mut result = Ok(());
        let model = named::write_stored(model, &stored, |name, slices| {
            read_slices(&file, name, Some(slices)).map_err(|error| result = Err(error)).ok()
        });
        result.map(|()| model)
    }
}

/// The step that a checkpoint's name says; an unfinished one has a suffix that is no number.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok()
}

fn damaged(path: &Path, reason: impl Into<String>) -> TrainError {
    TrainError::Checkpoint { path: path.to_path_buf(), reason: reason.into() }
}

fn save_parameters<M: LanguageModel>(
    path: &Path,
    metadata: &[(&str, String)],
    whole: &Whole<'_, M>,
    dtypes: &HashMap<ParamId, DType>,
) -> Result<Checksum, TrainError> {
    let described = whole.stored.iter().map(|parameter| {
        let held = parameter.parts.iter().find_map(|part| part.copies.first());
        let dtype = held.and_then(|id| dtypes.get(id)).copied().unwrap_or(DType::F32);
        outgoing(parameter.path.clone(), dtype, parameter.shape.clone())
    });
    write_tensors(path, &described.collect::<Vec<_>>(), metadata, |index| {
        whole.parameter(index).map(TensorBytes::Data)
    })
}

fn save_moments<M: LanguageModel>(
    path: &Path,
    metadata: &[(&str, String)],
    whole: &Whole<'_, M>,
) -> Result<Checksum, TrainError> {
    let (with_moments, mut tensors) = (whole.with_moments(), Vec::new());
    for &index in &with_moments {
        let StoredParameter { path, shape, .. } = &whole.stored[index];
        for suffix in SUFFIXES {
            tensors.push(outgoing(format!("{path}.{suffix}"), DType::F32, shape.clone()));
        }
    }
    write_tensors(path, &tensors, metadata, |index| {
        whole.moment(with_moments[index / 2], index % 2).map(TensorBytes::Data)
    })
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
