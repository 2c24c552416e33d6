//! The trainer: a model, its data and the callbacks of a run.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use burn::tensor::Device;
use serde_json::Value;
use yuan_files::remove_leftovers_in;
use yuan_model::{RefusedCut, Selection, ranks::Ranks};

use crate::{
    AdamW, Callback, Checkpoint, CheckpointState, Event, LanguageModel, Learns, LossOptions,
    TrainConfig, TrainError,
    callback::{
        context::Requests,
        schedule::{CheckpointEvery, ValidateEvery},
    },
    checkpoint::Writing,
    data::{Row, RowStream, RunRows, StepData},
    language_model::optimizer_for,
    run::{check, check::CHANGEABLE_SETTINGS, lock::RunLock},
    session::Session,
};

mod step;
mod turns;

pub use step::{NotFinite, StepOutcome};

/// Trains a model on a stream of rows; see [`run`](Self::run).
///
/// What the configuration asks for is done by callbacks that the trainer adds itself: balancing by
/// biases, pruning, validations and checkpoints. [`with_callback`](Self::with_callback) adds
/// others.
///
/// ```
/// use burn::tensor::Device;
/// use yuan_model::YuanConfig;
/// use yuan_train::{LaepConfig, TrainConfig, Trainer, Trigger, data::RowStream, fresh_model};
///
/// let config = TrainConfig {
///     steps: 3,
///     batch_size: 2,
///     seq_len: 16,
///     laep: LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() },
///     ..TrainConfig::default()
/// };
/// let tokens: Vec<u32> = (0..600).map(|i| i * i / 3 % 50).collect();
/// let rows = |seed| RowStream::new(tokens.clone(), 0, config.seq_len, seed);
/// let streams = [rows(Some(config.seed))?, rows(None)?];
/// let device = Device::flex().autodiff();
/// let model = fresh_model(&YuanConfig::tiny(50), config.seed, &device)?;
/// let run_dir = tempfile::tempdir()?;
/// let mut trainer = Trainer::new(config, run_dir.path(), &device, model, streams)?;
/// trainer.run()?;
/// assert_eq!(trainer.step(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Trainer<M: LanguageModel> {
    config: TrainConfig,
    run_dir: PathBuf,
    /// Held by the first rank, which writes the files of the run.
    lock: Option<RunLock>,
    /// Whether there is a state to go back to.
    has_snapshot: bool,
    device: Device,
    session: Session<M>,
    /// The checkpoint that is being written beside the training.
    writing: Option<Writing>,
    /// What removes the checkpoints before the latest ones.
    removing: Option<JoinHandle<Result<(), TrainError>>>,
    train: Box<dyn StepData<M>>,
    /// Sets that are measured on, by name, with their shares.
    validation: Vec<(String, f64, RowStream)>,
    /// What learns in the next step.
    learns: Learns,
    callbacks: Vec<Box<dyn Callback<M>>>,
    /// States of callbacks that a checkpoint held, until the callbacks are there to take them.
    saved_states: BTreeMap<String, Value>,
    /// What a resumed run has otherwise than its checkpoint, to be told when it begins.
    changes: Vec<Event>,
    step: u64,
    /// Batches in a row whose loss or gradient was no number. A checkpoint is only written after a
    /// step, so it is zero in all of them.
    skipped_in_a_row: u64,
    /// What was asked for when the data could not be taken up again.
    put_off: Requests,
}

impl<M: LanguageModel> Trainer<M> {
    /// A run from the start; the trainer writes into `run_dir`, which no other process may use as
    /// long as the trainer lives. `device` computes gradients (`device.autodiff()`) and holds `model`.
    /// `rows` are those to train on and to validate with.
    ///
    /// # Errors
    ///
    /// If a setting is out of range, or asks for something that this kind of model cannot do.
    pub fn new(
        config: TrainConfig,
        run_dir: &Path,
        device: &Device,
        model: M,
        rows: impl Into<RunRows<M>>,
    ) -> Result<Self, TrainError> {
        config.validate()?;
        let optimizer = optimizer_for(&config.optimizer, &model);
        let session = Session::new(model, optimizer);
        Self::open(config, run_dir, device, session, rows.into(), CheckpointState::default())
    }

    /// A run that goes on from a checkpoint: model, optimizer, data position and callbacks.
    ///
    /// # Errors
    ///
    /// If a setting is out of range, or the checkpoint is damaged or of another kind of model.
    pub fn resume(
        config: TrainConfig,
        run_dir: &Path,
        device: &Device,
        checkpoint: &Checkpoint,
        rows: impl Into<RunRows<M>>,
    ) -> Result<Self, TrainError> {
        Self::resume_at(config, run_dir, device, None, checkpoint, rows)
    }

    /// The same on one of several ranks, which all call it; the checkpoint may be one of any other
    /// number of them.
    ///
    /// # Errors
    ///
    /// As [`resume`](Self::resume), and if the model cannot be spread over the ranks.
    pub fn resume_on_rank(
        config: TrainConfig,
        run_dir: &Path,
        device: &Device,
        ranks: &Ranks,
        checkpoint: &Checkpoint,
        rows: impl Into<RunRows<M>>,
    ) -> Result<Self, TrainError> {
        Self::resume_at(config, run_dir, device, Some(ranks), checkpoint, rows)
    }

    fn resume_at(
        config: TrainConfig,
        run_dir: &Path,
        device: &Device,
        ranks: Option<&Ranks>,
        checkpoint: &Checkpoint,
        rows: impl Into<RunRows<M>>,
    ) -> Result<Self, TrainError> {
        config.validate()?;
        let (model, optimizer, state) =
            checkpoint.load_at::<M>(&config.optimizer, device, ranks)?;
        let session = Session::new(model, optimizer);
        Self::open(config, run_dir, device, session, rows.into(), state)
    }

    fn open(
        config: TrainConfig,
        run_dir: &Path,
        device: &Device,
        session: Session<M>,
        RunRows { train, validation }: RunRows<M>,
        state: CheckpointState,
    ) -> Result<Self, TrainError> {
        let dtype = config.precision.dtype();
        if !device.supports_dtype(dtype) {
            return Err(TrainError::Precision(dtype));
        }
        fs::create_dir_all(run_dir).map_err(TrainError::io("create", run_dir))?;
        let is_first = session.model().ranks().is_none_or(|ranks| ranks.world().is_first());
        let lock = if is_first { Some(RunLock::take(run_dir)?) } else { None };
        if is_first {
            remove_leftovers_in(run_dir);
        }
        let mut trainer = Self {
            run_dir: run_dir.to_path_buf(),
            lock,
            has_snapshot: Checkpoint::has_snapshot(run_dir),
            device: device.clone(),
            session,
            writing: None,
            removing: None,
            train,
            validation,
            callbacks: Vec::new(),
            saved_states: BTreeMap::new(),
            changes: Vec::new(),
            step: 0,
            skipped_in_a_row: 0,
            put_off: Requests::default(),
            learns: config.learns,
            config,
        };
        let earlier = state.settings.clone();
        trainer.saved_states = trainer.take_up(state);
        trainer.changes = trainer.changes_since(&earlier);
        trainer.add_configured_callbacks()?;
        Ok(trainer)
    }

    /// Those that the configuration asks for. Biases move before a prune is decided, and a prune
    /// asks for its validation itself.
    fn add_configured_callbacks(&mut self) -> Result<(), TrainError> {
        let config = self.config.clone();
        for callback in M::callbacks(&config)? {
            self.add(callback)?;
        }
        if let Some(steps) = config.validate_every {
            self.add(Box::new(ValidateEvery(steps)))?;
        }
        if let Some(steps) = config.checkpoint_every {
            self.add(Box::new(CheckpointEvery(steps)))?;
        }
        Ok(())
    }

    /// The settings that may change when a run is resumed, by the last part of their names, and the
    /// number of devices.
    fn changeable_settings(&self) -> BTreeMap<String, String> {
        let settings = check::to_json(&self.config);
        let mut values: BTreeMap<String, String> = CHANGEABLE_SETTINGS
            .iter()
            .map(|path| {
                let value = check::value_of(&settings, path);
                let name = path.rsplit('.').next().unwrap_or(path);
                (name.to_owned(), value.map_or_else(|| "never".to_owned(), Value::to_string))
            })
            .collect();
        let devices = self.ranks().map_or(1, |ranks| ranks.world().size());
        values.insert("devices".into(), devices.to_string());
        values
    }

    fn changes_since(&self, earlier: &BTreeMap<String, String>) -> Vec<Event> {
        let now = self.changeable_settings().into_iter();
        let change = |(setting, to): (String, String)| {
            let from = earlier.get(&setting).filter(|from| **from != to)?.clone();
            Some(Event::Change { step: self.step, setting, from, to })
        };
        now.filter_map(change).collect()
    }

    /// Puts data and step where a checkpoint left them and returns the states of the callbacks.
    fn take_up(&mut self, state: CheckpointState) -> BTreeMap<String, Value> {
        self.train.seek(state.consumed_rows);
        self.step = state.step;
        state.callbacks
    }

    /// Adds a callback; they are called in the order in which they were added, after those that the
    /// configuration asks for.
    ///
    /// # Errors
    ///
    /// If the run has a callback of this name, or a checkpoint holds a state for it that it does
    /// not understand.
    pub fn with_callback(
        mut self,
        callback: impl Callback<M> + 'static,
    ) -> Result<Self, TrainError> {
        self.add(Box::new(callback))?;
        Ok(self)
    }

    fn add(&mut self, mut callback: Box<dyn Callback<M>>) -> Result<(), TrainError> {
        let name = callback.name();
        if self.callbacks.iter().any(|other| other.name() == name) {
            return Err(TrainError::CallbackTwice(name));
        }
        if let Some(state) = self.saved_states.remove(callback.name()) {
            callback.restore(state)?;
        }
        self.callbacks.push(callback);
        Ok(())
    }

    /// The ranks that the model is spread over, if it is.
    fn ranks(&self) -> Option<&Ranks> {
        self.session.unread_model().ranks()
    }

    /// Whether this rank writes the files of the run.
    fn is_first_rank(&self) -> bool {
        self.ranks().is_none_or(|ranks| ranks.world().is_first())
    }

    /// Settings of the run.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The model as it is now.
    pub fn model(&self) -> &M {
        self.session.model()
    }

    /// The optimizer as it is now.
    pub fn optimizer(&self) -> &AdamW {
        self.session.optimizer()
    }

    /// Cuts or rearranges the model and, by the selections that `cut` returns, the optimizer's
    /// moments; returns the bytes that went from one rank to another. In a run it is a callback
    /// that does this ([`Context::cut`](crate::Context::cut)).
    ///
    /// # Errors
    ///
    /// `cut` gives the model back unchanged when it refuses.
    pub fn cut(
        &mut self,
        cut: impl FnOnce(M) -> Result<(M, Vec<Selection>), RefusedCut<M>>,
    ) -> Result<u64, TrainError> {
        self.session.cut(cut)
    }

    /// Steps completed.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// One optimizer step; after one that was [not finite](StepOutcome::NotFinite) the model is as
    /// it was, and the next call takes the same step with the next batch.
    ///
    /// # Errors
    ///
    /// If the device fails, or the batch does not fit the devices.
    pub fn train_step(&mut self) -> Result<StepOutcome, TrainError> {
        let (device, config) = (&self.device, &self.config);
        let position = step::Position { step: self.step, learns: self.learns };
        let taken = step::take(&mut self.session, device, &mut *self.train, config, position)?;
        if let StepOutcome::Taken(metrics) = &taken {
            self.step = metrics.step;
        }
        Ok(taken)
    }

    /// Mean loss over the same rows of the validation sets every time, in nats per learnt token;
    /// of several sets, the mean by their shares. No number where there is no set.
    ///
    /// # Errors
    ///
    /// If the device fails, or a file is damaged.
    pub fn validate(&mut self) -> Result<f64, TrainError> {
        Ok(self.validate_sets()?.loss)
    }

    /// The same, with the loss of every set if there are several.
    fn validate_sets(&mut self) -> Result<Validated, TrainError> {
        let model = self.session.model().valid();
        let ranks = self.ranks().cloned();
        let device = self.device.clone().inner();
        let options = LossOptions { precision: self.config.precision, ..LossOptions::default() };
        let (mut total, mut shares, mut sets) = (0.0, 0.0, BTreeMap::new());
        for (name, share, stream) in &mut self.validation {
            stream.seek(0);
            // A batch counts by its learnt labels.
            let (mut sum, mut labels) = (0.0, 0);
            for _ in 0..self.config.validation_batches {
                let rows = stream.next_rows(self.config.batch_size)?;
                let learnt: u64 = rows.iter().map(Row::learnt_labels).sum();
                let batch = step::own_batch(&rows, ranks.as_ref(), &device)?;
                let loss = model.loss(batch, options)?.loss.try_into_data();
                let loss = loss.map_err(|error| TrainError::Device(error.to_string()))?;
                sum += step::float(Some(loss)) * learnt as f64;
                labels += learnt;
            }
            if let Some(ranks) = &ranks {
                sum = ranks.world().sum(&[sum])?[0];
            }
            let loss = sum / labels.max(1) as f64;
            total += *share * loss;
            shares += *share;
            sets.insert(name.clone(), loss);
        }
        if sets.len() < 2 {
            sets.clear();
        }
        Ok(Validated { loss: total / shares, sets })
    }
}

/// What a validation found.
struct Validated {
    loss: f64,
    /// By name, of several sets.
    sets: BTreeMap<String, f64>,
}
