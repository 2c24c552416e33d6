//! Stop anywhere, go on exactly: model, optimizer, data position and callbacks, written atomically.
//!
//! A checkpoint is a directory `checkpoint-00000120` with
//!
//! - `config.json`, the model's configuration (after a prune, its new expert counts),
//! - `model.safetensors`, parameters by path,
//! - `optimizer.safetensors`, both moments of every parameter by path,
//! - of several ranks, in place of these two, `model-00003.safetensors` and
//!   `optimizer-00003.safetensors` of each of them with the elements that it updates, and
//!   `index.json`, which says what is where,
//! - `state.json`, everything else,
//! - `checksums.json`, what the files were when they were written. They are compared when a
//!   checkpoint is loaded, by a thread of its own beside the loading.

use std::{
    collections::HashMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    thread,
};

use burn::tensor::{Device, TensorData};
use yuan_files::{remove_directory, remove_leftovers_in};
use yuan_model::{
    YuanConfig,
    hf::{CheckpointError, Parameters, SaveOptions, Saved, Shards, save_parameters},
    named,
    ranks::Ranks,
};

use crate::{
    AdamW, AdamWConfig, LanguageModel, TrainError,
    checksums::Checksums,
    language_model::optimizer_for,
    names::{CONFIG, MODEL as MODEL_CONFIG},
    optim::SUFFIXES,
    run::lock::RunLock,
};

mod index;
mod share;
mod state;
mod tensors;
mod writing;

use index::Index;
pub use state::CheckpointState;
use state::{MODEL, MOST_ROWS, OPTIMIZER, STATE, damaged};
use tensors::{Kind, Tensors};
pub(crate) use writing::{Writing, join};

const PREFIX: &str = "checkpoint-";
const SNAPSHOT: &str = "before-prune";

/// A complete checkpoint on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its directory.
    pub path: PathBuf,
    /// Steps completed when it was written.
    pub step: u64,
}

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
        Self::write(Self::path_of(run_dir, state.step), model, optimizer, state)
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

    /// Makes ready what checkpoints are copied to that are completed while training goes on.
    pub(crate) fn prepare<M: LanguageModel>(
        model: &M,
        optimizer: &AdamW,
    ) -> Result<(), TrainError> {
        Writing::prepare(model, optimizer)
    }

    /// Begins to write a checkpoint that is completed while training goes on.
    pub(crate) fn begin<M: LanguageModel>(
        run_dir: &Path,
        model: &M,
        optimizer: &AdamW,
        state: &CheckpointState,
    ) -> Result<Writing, TrainError> {
        Writing::begin(Self::path_of(run_dir, state.step), model, optimizer, state, true)
    }

    fn path_of(run_dir: &Path, step: u64) -> PathBuf {
        run_dir.join(format!("{PREFIX}{step:08}"))
    }

    fn write<M: LanguageModel>(
        path: PathBuf,
        model: &M,
        optimizer: &AdamW,
        state: &CheckpointState,
    ) -> Result<Self, TrainError> {
        Writing::begin(path.clone(), model, optimizer, state, false)?.finish()?;
        Ok(Self { path, step: state.step })
    }

    /// The headers of the model's tensors.
    pub(crate) fn headers(&self) -> Result<Tensors, TrainError> {
        Tensors::open_headers(&self.path, Kind::Model)
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
        self.verify_share(0, 1)
    }

    /// Of every so many files one, so that several ranks verify all of them together.
    fn verify_share(&self, rank: usize, of: usize) -> Result<(), TrainError> {
        let share = (rank, of);
        let has_checksums = self.path.join(Checksums::FILE).exists();
        if !has_checksums && self.state()?.layout == 0 {
            return Ok(());
        }
        let checksums = Checksums::load(&self.path)?;
        let mut missing = checksums.missing([MODEL_CONFIG, STATE].map(str::to_owned));
        missing.extend(match Index::load(&self.path)? {
            Some(index) => checksums.missing(index.files()),
            None => checksums.missing([MODEL, OPTIMIZER].map(str::to_owned)),
        });
        self.refuse(&[missing, checksums.problems(&self.path, share)].concat())
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
        device: &Device,
    ) -> Result<(M, AdamW, CheckpointState), TrainError> {
        self.load_at(optimizer, device, None)
    }

    /// The same for the part of one rank, if there are several.
    pub(crate) fn load_at<M: LanguageModel>(
        &self,
        optimizer: &AdamWConfig,
        device: &Device,
        ranks: Option<&Ranks>,
    ) -> Result<(M, AdamW, CheckpointState), TrainError> {
        let (rank, of) = ranks.map_or((0, 1), |ranks| (ranks.world().rank(), ranks.world().size()));
        self.beside_verifying((rank, of), || {
            let state = self.state()?;
            let model: M = self.load_model_of(device, ranks, Some(state.step))?;
            let mut optimizer = optimizer_for(optimizer, &model);
            if state.optimizer_updates > 0 {
                let moments = Tensors::open(&self.path, Kind::Optimizer, Some(state.step))?;
                let stored = model.stored_parameters();
                optimizer.restore(
                    &stored,
                    state.optimizer_updates,
                    device,
                    |parameter, elements| {
                        let of = |suffix| (moments.shape(&parameter.path, Some(suffix)), suffix);
                        let found = SUFFIXES.map(of);
                        if found.iter().all(|(shape, _)| shape.is_none()) {
                            return Ok(None);
                        }
                        for (shape, suffix) in &found {
                            let name = format!("{}.{suffix}", parameter.path);
                            let reason = match shape {
                                None => format!("{OPTIMIZER}: `{name}` is missing"),
                                Some(shape) if *shape != parameter.shape => {
                                    let expected = &parameter.shape;
                                    format!(
                                        "{OPTIMIZER}: `{name}` is {shape:?}, expected {expected:?}"
                                    )
                                }
                                Some(_) => continue,
                            };
                            return Err(damaged(&self.path, reason));
                        }
                        let read =
                            |suffix| moments.read(&parameter.path, Some(suffix), elements.clone());
                        Ok(Some([read(SUFFIXES[0])?, read(SUFFIXES[1])?]))
                    },
                )?;
            }
            Ok((model, optimizer, state))
        })
    }

    /// Loads while a thread compares a share of the files with their checksums; what it finds
    /// explains what else went wrong.
    fn beside_verifying<T>(
        &self,
        (rank, of): (usize, usize),
        load: impl FnOnce() -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        thread::scope(|scope| {
            let verified = scope.spawn(|| self.verify_share(rank, of));
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
    pub fn load_model<M: LanguageModel>(&self, device: &Device) -> Result<M, TrainError> {
        self.beside_verifying((0, 1), || self.load_model_of(device, None, None))
    }

    /// Writes the model in Hugging Face's layout; it is read tensor by tensor, and no memory ever holds
    /// it.
    ///
    /// # Errors
    ///
    /// As [`load_model`](Self::load_model) and [`YuanModel::save_hf`](yuan_model::YuanModel::save_hf).
    pub fn save_hf(&self, directory: &Path, options: &SaveOptions) -> Result<Saved, TrainError> {
        self.beside_verifying((0, 1), || {
            let config = YuanConfig::load(&self.path.join(MODEL_CONFIG))?;
            let tensors = Tensors::open(&self.path, Kind::Model, None)?;
            let sources = config.parameter_sources();
            let shapes: HashMap<String, Vec<usize>> =
                sources.iter().map(|one| (one.path.clone(), one.parameter_shape())).collect();
            tensors.check(shapes.clone())?;
            let read = |path: &str, slices: Option<Range<usize>>| {
                let shape = shapes.get(path).map_or(&[][..], Vec::as_slice);
                let slice: usize = shape.iter().skip(1).product();
                let slices = slices.unwrap_or(0..shape.first().copied().unwrap_or(1));
                let read = tensors.read(path, None, slices.start * slice..slices.end * slice);
                read.map_err(|error| {
                    let reason = error.to_string();
                    CheckpointError::Directory { path: self.path.clone(), reason }
                })
            };
            let parameters = Parameters { dtype: &|path| tensors.dtype_of(path), read: &read };
            Ok(save_parameters(&config, &parameters, directory, options)?)
        })
    }

    fn load_model_of<M: LanguageModel>(
        &self,
        device: &Device,
        ranks: Option<&Ranks>,
        step: Option<u64>,
    ) -> Result<M, TrainError> {
        let file = self.path.join(MODEL_CONFIG);
        let config = fs::read_to_string(&file).map_err(TrainError::io("read", &file))?;
        let model = match ranks {
            Some(ranks) => M::from_config_json_on_rank(&config, device, ranks),
            None => M::from_config_json(&config, device),
        };
        let model =
            model.map_err(|error| damaged(&self.path, format!("{MODEL_CONFIG}: {error}")))?;
        self.fill(model, step)
    }

    /// The model's parameters from the checkpoint, all of them and no others.
    fn fill<M: LanguageModel>(&self, model: M, step: Option<u64>) -> Result<M, TrainError> {
        let tensors = Tensors::open(&self.path, Kind::Model, step)?;
        let stored = model.stored_parameters();
        let expected =
            stored.iter().map(|parameter| (parameter.path.clone(), parameter.shape.clone()));
        tensors.check(expected)?;
        let mut result = Ok(());
        let model = named::write_stored(model, &stored, |parameter| {
            let read = tensors.read(&parameter.path, None, parameter.elements());
            let data = read.map_err(|error| result = Err(error)).ok()?;
            let (bytes, _, dtype) = data.into_parts();
            Some(TensorData::from_bytes(bytes, parameter.held_shape(), dtype))
        });
        result.map(|()| model)
    }
}

/// The step that a checkpoint's name says; an unfinished one has a suffix that is no number.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok()
}
