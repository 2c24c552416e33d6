//! The loop: steps, the callbacks around them, validations, checkpoints and ways back.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use serde_json::Value;
use yuan_model::{RefusedCut, Selection};

use crate::{
    AdamW, Callback, Checkpoint, CheckpointState, Context, Event, LanguageModel, LossOptions,
    Place, StepMetrics, TrainConfig, TrainError,
    callback::{
        context::Requests,
        schedule::{CheckpointEvery, ValidateEvery},
    },
    data::RowStream,
    session::Session,
};

mod step;

pub use step::{NotFinite, StepOutcome};

/// Trains a model on a stream of rows; see [`run`](Self::run).
///
/// What the configuration asks for is done by callbacks that the trainer adds itself: balancing by
/// biases, pruning, validations and checkpoints. [`with_callback`](Self::with_callback) adds others.
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
    place: M::Place,
    session: Session<M>,
    train: RowStream,
    validation: RowStream,
    callbacks: Vec<Box<dyn Callback<M>>>,
    /// States of callbacks that a checkpoint held, until the callbacks are there to take them.
    saved_states: BTreeMap<String, Value>,
    step: u64,
    /// Batches in a row whose loss or gradient was no number. A checkpoint is only written after a
    /// step, so it is zero in all of them.
    skipped_in_a_row: u64,
}

impl<M: LanguageModel> Trainer<M> {
    /// A run from the start; `place` is a device that computes gradients (`device.autodiff()`), or
    /// a mesh of them, and holds `model`. `streams` are the rows to train on and to validate with.
    ///
    /// # Errors
    ///
    /// If a setting is out of range, or asks for something that this kind of model cannot do.
    pub fn new(
        config: TrainConfig,
        run_dir: &Path,
        place: &M::Place,
        model: M,
        streams: [RowStream; 2],
    ) -> Result<Self, TrainError> {
        config.validate()?;
        let optimizer = AdamW::new(&config.optimizer);
        let session = Session::new(model, optimizer);
        Self::open(config, run_dir, place, session, streams, CheckpointState::default())
    }

    /// A run that goes on from a checkpoint: model, optimizer, data position and callbacks.
    ///
    /// # Errors
    ///
    /// If a setting is out of range, or the checkpoint is damaged or of another kind of model.
    pub fn resume(
        config: TrainConfig,
        run_dir: &Path,
        place: &M::Place,
        checkpoint: &Checkpoint,
        streams: [RowStream; 2],
    ) -> Result<Self, TrainError> {
        config.validate()?;
        let (model, optimizer, state) = checkpoint.load::<M>(&config.optimizer, place)?;
        Self::open(config, run_dir, place, Session::new(model, optimizer), streams, state)
    }

    fn open(
        config: TrainConfig,
        run_dir: &Path,
        place: &M::Place,
        session: Session<M>,
        [train, validation]: [RowStream; 2],
        state: CheckpointState,
    ) -> Result<Self, TrainError> {
        let dtype = config.precision.dtype();
        if !place.devices().iter().all(|device| device.supports_dtype(dtype)) {
            return Err(TrainError::Precision(dtype));
        }
        let mut trainer = Self {
            run_dir: run_dir.to_path_buf(),
            place: place.clone(),
            session,
            train,
            validation,
            callbacks: Vec::new(),
            saved_states: BTreeMap::new(),
            step: 0,
            skipped_in_a_row: 0,
            config,
        };
        trainer.saved_states = trainer.take_up(state);
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
    /// If the run has a callback of this name, or a checkpoint holds a state for it that it does not
    /// understand.
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
    /// moments; returns the bytes that went from one device to another. In a run it is a callback
    /// that does this ([`Context::cut`]).
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

    /// Trains to the end: steps, callbacks after each, and a last validation and checkpoint.
    ///
    /// # Errors
    ///
    /// The first error of a step, a callback, a validation or a checkpoint ends the run.
    pub fn run(&mut self) -> Result<(), TrainError> {
        let mut requests = Requests::default();
        self.call(&mut requests, |callback, context| callback.on_start(context))?;
        if requests.discard_snapshot {
            Checkpoint::discard_snapshot(&self.run_dir)?;
        }
        let summary = self.session.model().summary();
        self.tell(&Event::Start {
            step: self.step,
            steps: self.config.steps,
            parameters: summary.parameters,
            experts_per_layer: summary.experts_per_layer,
        })?;
        while self.step < self.config.steps && self.turn()? {}
        Ok(())
    }

    /// One step with everything around it; whether the run goes on.
    fn turn(&mut self) -> Result<bool, TrainError> {
        let metrics = match self.train_step()? {
            StepOutcome::Taken(metrics) => metrics,
            StepOutcome::NotFinite(found) => {
                self.skip(found)?;
                return Ok(true);
            }
        };
        self.skipped_in_a_row = 0;
        let mut requests = Requests::default();
        self.tell(&Event::Step(metrics.clone()))?;
        self.call(&mut requests, |callback, context| callback.on_step(context, &metrics))?;
        let is_last = self.step == self.config.steps;
        if requests.validate || requests.stop || is_last {
            let loss = self.validate()?;
            if !loss.is_finite() {
                let (step, what) = (self.step, "validation loss");
                return match self.go_back()? {
                    true => Ok(true),
                    false => Err(TrainError::NotFinite { step, what, value: loss }),
                };
            }
            self.tell(&Event::Validation { step: self.step, loss })?;
        }
        if requests.snapshot {
            let (model, optimizer) = (self.session.model(), self.session.optimizer());
            Checkpoint::save_snapshot(&self.run_dir, model, optimizer, &self.state())?;
        }
        self.call(&mut requests, |callback, context| callback.on_step_end(context))?;
        if requests.roll_back {
            self.roll_back()?;
            return Ok(true);
        }
        let last = is_last || requests.stop;
        if requests.checkpoint || last {
            self.save_checkpoint()?;
            Checkpoint::keep_latest(&self.run_dir, self.config.keep_checkpoints)?;
        }
        if requests.discard_snapshot {
            Checkpoint::discard_snapshot(&self.run_dir)?;
        }
        Ok(!last)
    }

    /// Leaves a batch out whose loss or gradient is no number: the step is taken with the next one.
    fn skip(&mut self, found: NotFinite) -> Result<(), TrainError> {
        if self.go_back()? {
            self.skipped_in_a_row = 0;
            return Ok(());
        }
        self.skipped_in_a_row += 1;
        if self.skipped_in_a_row > self.config.max_skipped {
            let (step, in_a_row) = (self.step + 1, self.skipped_in_a_row);
            let NotFinite { what, value } = found;
            return Err(TrainError::NeverFinite { step, what, value, in_a_row });
        }
        let (what, value) = (found.what.into(), found.value.to_string());
        self.tell(&Event::Skip { step: self.step, what, value })
    }

    /// Goes back to the snapshot if a callback wants to after a number that is not finite; whether
    /// it did.
    fn go_back(&mut self) -> Result<bool, TrainError> {
        let mut requests = Requests::default();
        self.call(&mut requests, |callback, context| {
            callback.on_not_finite(context);
            Ok(())
        })?;
        if requests.roll_back {
            self.roll_back()?;
        }
        Ok(requests.roll_back)
    }

    /// One optimizer step; after one that was [not finite](StepOutcome::NotFinite) the model is as
    /// it was, and the next call takes the same step with the next batch.
    ///
    /// # Errors
    ///
    /// If the device fails, or the batch does not fit the devices.
    pub fn train_step(&mut self) -> Result<StepOutcome, TrainError> {
        let started = Instant::now();
        let (devices, config) = (self.place.devices(), &self.config);
        let taken = step::take(&mut self.session, &devices, &mut self.train, config, self.step)?;
        let StepOutcome::Taken(metrics) = taken else { return Ok(taken) };
        self.step = metrics.step;
        let seconds = started.elapsed().as_secs_f64();
        Ok(StepOutcome::Taken(StepMetrics { seconds, ..metrics }))
    }

    /// Mean loss over the same rows of the validation stream every time, in nats per token.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn validate(&mut self) -> Result<f64, TrainError> {
        let model = self.session.model().valid();
        let device = self.place.devices()[0].clone().inner();
        self.validation.seek(0);
        let options = LossOptions { precision: self.config.precision, ..LossOptions::default() };
        let mut sum = 0.0;
        for _ in 0..self.config.validation_batches {
            let batch = self.validation.next_batch(self.config.batch_size, &device);
            let loss = model.loss(batch, options)?.loss.try_into_data();
            sum += step::float(Some(loss.map_err(|error| TrainError::Device(error.to_string()))?));
        }
        Ok(sum / self.config.validation_batches as f64)
    }

    fn state(&self) -> CheckpointState {
        let mut callbacks = BTreeMap::new();
        for callback in &self.callbacks {
            if let Some(state) = callback.state() {
                callbacks.insert(callback.name().to_owned(), state);
            }
        }
        CheckpointState {
            step: self.step,
            consumed_rows: self.train.consumed(),
            optimizer_updates: self.session.optimizer().updates(),
            callbacks,
        }
    }

    fn save_checkpoint(&mut self) -> Result<(), TrainError> {
        let (model, optimizer) = (self.session.model(), self.session.optimizer());
        Checkpoint::save(&self.run_dir, model, optimizer, &self.state())?;
        self.tell(&Event::Checkpoint { step: self.step })
    }

    /// Goes back to the snapshot: model, optimizer, step (and with it the learning rate), data and
    /// callbacks.
    ///
    /// The checkpoints of the branch that is left go only when one of the branch that is taken is
    /// complete: killed before that, the run resumes on the old branch, takes the same steps and
    /// decides the same again.
    fn roll_back(&mut self) -> Result<(), TrainError> {
        // Its moments need not be in memory beside those of the snapshot.
        self.session.set_optimizer(AdamW::new(&self.config.optimizer));
        let snapshot = Checkpoint::snapshot(&self.run_dir);
        let (model, optimizer, state) = snapshot.load::<M>(&self.config.optimizer, &self.place)?;
        let left = self.step;
        self.session = Session::new(model, optimizer);
        let mut states = self.take_up(state);
        for callback in &mut self.callbacks {
            callback.roll_back(states.remove(callback.name()))?;
        }
        self.tell(&Event::RollBack { step: left, to_step: self.step })?;
        self.save_checkpoint()?;
        Checkpoint::remove_after(&self.run_dir, self.step)?;
        Checkpoint::keep_latest(&self.run_dir, self.config.keep_checkpoints)?;
        Checkpoint::discard_snapshot(&self.run_dir)
    }

    /// Calls every callback, then tells all of them what any of them emitted.
    fn call(
        &mut self,
        requests: &mut Requests,
        mut hook: impl FnMut(&mut dyn Callback<M>, &mut Context<'_, M>) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let mut events = Vec::new();
        let has_snapshot = Checkpoint::has_snapshot(&self.run_dir);
        for callback in &mut self.callbacks {
            let mut context = Context {
                step: self.step,
                config: &self.config,
                run_dir: &self.run_dir,
                session: &mut self.session,
                requests,
                events: &mut events,
                has_snapshot,
            };
            hook(callback.as_mut(), &mut context)?;
        }
        events.iter().try_for_each(|event| self.tell(event))
    }

    fn tell(&mut self, event: &Event) -> Result<(), TrainError> {
        self.callbacks.iter_mut().try_for_each(|callback| callback.on_event(event))
    }
}
