//! The loop: micro-batches → gradients → clip → update → callbacks.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use burn::{
    module::Module,
    optim::GradientsAccumulator,
    tensor::{Int, Tensor, TensorData, Transaction},
};
use serde_json::Value;
use yuan_laep::LayerLoad;
use yuan_model::{ModelError, PrunableExperts, named, surgery::Selection};

use crate::{
    AdamW, Callback, Context, LanguageModel, LossOptions, TrainConfig, TrainError,
    callback::{Event, Requests, StepMetrics},
    checkpoint::{Checkpoint, CheckpointState},
    data::RowStream,
    language_model::Place,
    optim::{clip_factor, global_norm_squared},
    reduce::reduce_gradients,
};

/// Model and optimizer, which must change together.
#[derive(Debug)]
pub struct Session<M> {
    /// Absent only while it is being updated.
    model: Option<M>,
    optimizer: AdamW,
}

impl<M> Session<M> {
    pub(crate) fn new(model: M, optimizer: AdamW) -> Self {
        Self { model: Some(model), optimizer }
    }

    pub(crate) fn model(&self) -> &M {
        self.model.as_ref().expect("the model is only away during an update")
    }

    pub(crate) fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    fn take_model(&mut self) -> M {
        self.model.take().expect("the model is only away during an update")
    }

    pub(crate) fn update(&mut self, update: impl FnOnce(M) -> M) {
        self.model = Some(update(self.take_model()));
    }

    /// Returns the bytes that went from one device to another.
    pub(crate) fn cut(
        &mut self,
        cut: impl FnOnce(M) -> Result<(M, Vec<Selection>), (M, ModelError)>,
    ) -> Result<u64, TrainError>
    where
        M: Module,
    {
        let (model, outcome) = match cut(self.take_model()) {
            Ok((model, selections)) => {
                let moved = bytes_moved(&model, &selections) + self.optimizer.cut(&selections);
                (model, Ok(moved))
            }
            Err((model, error)) => (model, Err(error.into())),
        };
        self.model = Some(model);
        outcome
    }
}

/// Bytes of a cut model's parameters that came from other devices.
fn bytes_moved<M: Module>(model: &M, selections: &[Selection]) -> u64 {
    if selections.iter().all(|selection| selection.moved == 0) {
        return 0;
    }
    let (names, dtypes) = (named::parameter_names(model), named::dtypes_by_id(model));
    let bytes = |selection: &Selection| {
        let shape =
            names.iter().find(|name| name.id == selection.param).map(|name| name.shape.clone());
        let slice = shape.map_or(0, |shape| shape.num_elements() / shape[selection.axis].max(1));
        selection.moved * slice * dtypes.get(&selection.param).map_or(0, burn::tensor::DType::size)
    };
    selections.iter().map(|selection| bytes(selection) as u64).sum()
}

/// Trains a model on a stream of rows; see [`run`](Self::run).
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

impl<M: LanguageModel + PrunableExperts> Trainer<M> {
    /// A run from the start; `place` is a device that computes gradients (`device.autodiff()`), or
    /// a mesh of them, and holds `model`.
    ///
    /// # Errors
    ///
    /// If a setting is out of range.
    pub fn new(
        config: TrainConfig,
        run_dir: &Path,
        place: &M::Place,
        model: M,
        [train, validation]: [RowStream; 2],
    ) -> Result<Self, TrainError> {
        config.validate()?;
        let optimizer = AdamW::new(&config);
        let dtype = config.precision.dtype();
        if !place.devices().iter().all(|device| device.supports_dtype(dtype)) {
            return Err(TrainError::Setting(format!("the device does not compute in {dtype:?}")));
        }
        Ok(Self {
            run_dir: run_dir.to_path_buf(),
            place: place.clone(),
            session: Session::new(model, optimizer),
            train,
            validation,
            callbacks: Vec::new(),
            saved_states: BTreeMap::new(),
            step: 0,
            skipped_in_a_row: 0,
            config,
        })
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
        let (model, optimizer, state) = checkpoint.load::<M>(&config, place)?;
        let mut trainer = Self::new(config, run_dir, place, model, streams)?;
        trainer.session.optimizer = optimizer;
        trainer.saved_states = trainer.take_up(state);
        Ok(trainer)
    }

    /// Puts data and step where a checkpoint left them and returns the states of the callbacks.
    fn take_up(&mut self, state: CheckpointState) -> BTreeMap<String, Value> {
        self.train.seek(state.consumed_rows);
        self.step = state.step;
        state.callbacks
    }

    /// Adds a callback; they are called in the order in which they were added.
    ///
    /// # Errors
    ///
    /// If a checkpoint holds a state for it that it does not understand.
    pub fn with_callback(
        mut self,
        mut callback: impl Callback<M> + 'static,
    ) -> Result<Self, TrainError> {
        if let Some(state) = self.saved_states.remove(callback.name()) {
            callback.restore(state)?;
        }
        self.callbacks.push(Box::new(callback));
        Ok(self)
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
        cut: impl FnOnce(M) -> Result<(M, Vec<Selection>), (M, ModelError)>,
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
        let model = self.session.model();
        self.tell(&Event::Start {
            step: self.step,
            steps: self.config.steps,
            parameters: model.num_parameters(),
            experts_per_layer: model.experts_per_layer(),
        })?;
        while self.step < self.config.steps {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error @ TrainError::NotFinite { .. }) => self.recover(error)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One step with everything around it; whether the run goes on.
    fn turn(&mut self) -> Result<bool, TrainError> {
        let metrics = match self.train_step() {
            Ok(metrics) => metrics,
            Err(error @ TrainError::NotFinite { .. }) => return self.skip(error).map(|()| true),
            Err(error) => return Err(error),
        };
        self.skipped_in_a_row = 0;
        let mut requests = Requests::default();
        self.tell(&Event::Step(metrics.clone()))?;
        self.call(&mut requests, |callback, context| callback.on_step(context, &metrics))?;
        let is_last = self.step == self.config.steps;
        if requests.validate || requests.stop || is_last {
            let loss = self.validate()?;
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
            Checkpoint::prune(&self.run_dir, self.config.keep_checkpoints)?;
        }
        if requests.discard_snapshot {
            Checkpoint::discard_snapshot(&self.run_dir)?;
        }
        Ok(!last)
    }

    /// Leaves a batch out whose loss or gradient is no number: the step is taken with the next one.
    fn skip(&mut self, error: TrainError) -> Result<(), TrainError> {
        match self.recover(error) {
            Err(TrainError::NotFinite { step, what, value }) => {
                self.skipped_in_a_row += 1;
                let in_a_row = self.skipped_in_a_row;
                if in_a_row > self.config.max_skipped {
                    return Err(TrainError::NeverFinite { step, what, value, in_a_row });
                }
                self.tell(&Event::Skip {
                    step: self.step,
                    what: what.into(),
                    value: value.to_string(),
                })
            }
            recovered => {
                self.skipped_in_a_row = 0;
                recovered
            }
        }
    }

    /// Goes back to the snapshot if a callback wants to after a loss that is no number; else the
    /// error stands.
    fn recover(&mut self, error: TrainError) -> Result<(), TrainError> {
        let mut requests = Requests::default();
        self.call(&mut requests, |callback, context| {
            callback.on_not_finite(context);
            Ok(())
        })?;
        if requests.roll_back { self.roll_back() } else { Err(error) }
    }

    /// One optimizer step.
    ///
    /// # Errors
    ///
    /// If loss or gradient is not finite, or the device fails.
    pub fn train_step(&mut self) -> Result<StepMetrics, TrainError> {
        let started = Instant::now();
        let devices = self.place.devices();
        // Dropout draws from the device: a seed per step makes a resumed run draw alike.
        let step_seed = self.config.seed.wrapping_add(self.step + 1);
        for (index, device) in devices.iter().enumerate() {
            device.seed(step_seed.wrapping_add((index as u64).wrapping_mul(OTHER_DEVICE)));
        }
        let model = self.session.take_model();
        let mut accumulator = GradientsAccumulator::<M>::new();
        let mut sums: Option<StepSums> = None;
        for micro_batch in 0..self.config.accumulation {
            let batch = self.train.next_batch(self.config.batch_size, &devices[0]);
            let options = LossOptions {
                balance: self.config.balance,
                precision: self.config.precision,
                recompute: self
                    .config
                    .recompute
                    .then(|| step_seed.wrapping_add(micro_batch as u64) ^ RECOMPUTED),
            };
            let share = 1.0 / self.config.accumulation as f64;
            let (output, gradients) = match model.loss_and_gradients(batch, options, share) {
                Ok(computed) => computed,
                Err(error) => {
                    self.session.model = Some(model);
                    return Err(error);
                }
            };
            let part = StepSums {
                loss: output.loss.mul_scalar(share),
                balance: output.balance_loss.map(|loss| loss.mul_scalar(share)),
                loads: output.tokens_per_expert,
                rows_per_device: output.rows_per_device,
            };
            sums = Some(match sums {
                None => part,
                Some(sums) => sums.plus(part),
            });
            accumulator.accumulate(&model, gradients);
        }
        let stored = model.stored_parameters();
        let gradients = reduce_gradients(&model, accumulator.grads(), &stored);
        let norm_squared = global_norm_squared(&model, &gradients, &stored);
        let step = self.step + 1;
        let read = match sums {
            Some(sums) => sums.read(step, norm_squared),
            None => Err(TrainError::Setting("accumulation must be at least 1".into())),
        };
        let ReadStep { loss, balance_loss, norm, loads, rows_per_device } = match read {
            Ok(numbers) => numbers,
            Err(error) => {
                self.session.model = Some(model);
                return Err(error);
            }
        };
        let learning_rate = self.config.learning_rate_at(self.step);
        let scale = clip_factor(norm, self.config.clip_norm);
        self.session.model =
            Some(self.session.optimizer.step(model, gradients, learning_rate, scale));
        self.step = step;
        Ok(StepMetrics {
            step,
            loss,
            balance_loss,
            learning_rate,
            gradient_norm: norm,
            tokens: self.config.tokens_per_step() as u64,
            seconds: started.elapsed().as_secs_f64(),
            max_over_mean: loads.iter().map(LayerLoad::max_over_mean).collect(),
            // Where one device has all experts there is nothing to balance.
            device_max_over_mean: rows_per_device
                .iter()
                .filter(|rows| rows.num_experts() > 1)
                .map(LayerLoad::max_over_mean)
                .collect(),
            loads,
        })
    }

    /// Mean loss over the same rows of the validation stream every time.
    ///
    /// # Errors
    ///
    /// If the loss is not finite, or the device fails.
    pub fn validate(&mut self) -> Result<f64, TrainError> {
        let model = self.session.model().valid();
        let device = self.place.devices()[0].clone().inner();
        self.validation.seek(0);
        let options = LossOptions { precision: self.config.precision, ..LossOptions::default() };
        let mut sum = 0.0;
        for _ in 0..self.config.validation_batches {
            let batch = self.validation.next_batch(self.config.batch_size, &device);
            sum += read_floats(model.loss(batch, options)?.loss)?[0];
        }
        let value = sum / self.config.validation_batches as f64;
        let not_finite = TrainError::NotFinite { step: self.step, what: "validation loss", value };
        if value.is_finite() { Ok(value) } else { Err(not_finite) }
    }

    fn state(&self) -> CheckpointState {
        let states = self.callbacks.iter().filter_map(|c| Some((c.name().to_owned(), c.state()?)));
        CheckpointState {
            step: self.step,
            consumed_rows: self.train.consumed(),
            optimizer_updates: self.session.optimizer().updates(),
            callbacks: states.collect(),
        }
    }

    fn save_checkpoint(&mut self) -> Result<(), TrainError> {
        Checkpoint::save(
            &self.run_dir,
            self.session.model(),
            self.session.optimizer(),
            &self.state(),
        )?;
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
        self.session.optimizer = AdamW::new(&self.config);
        let snapshot = Checkpoint::snapshot(&self.run_dir);
        let (model, optimizer, state) = snapshot.load::<M>(&self.config, &self.place)?;
        let left = self.step;
        self.session = Session::new(model, optimizer);
        let mut states = self.take_up(state);
        for callback in &mut self.callbacks {
            callback.roll_back(states.remove(callback.name()))?;
        }
        self.tell(&Event::RollBack { step: left, to_step: self.step })?;
        self.save_checkpoint()?;
        Checkpoint::remove_after(&self.run_dir, self.step)?;
        Checkpoint::prune(&self.run_dir, self.config.keep_checkpoints)?;
        Checkpoint::discard_snapshot(&self.run_dir)
    }

    /// Calls every callback, then tells all of them what any of them emitted.
    fn call(
        &mut self,
        requests: &mut Requests,
        mut hook: impl FnMut(&mut dyn Callback<M>, &mut Context<'_, M>) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let mut events = Vec::new();
        for callback in &mut self.callbacks {
            let mut context = Context {
                step: self.step,
                config: &self.config,
                run_dir: &self.run_dir,
                session: &mut self.session,
                requests,
                events: &mut events,
            };
            hook(callback.as_mut(), &mut context)?;
        }
        events.iter().try_for_each(|event| self.tell(event))
    }

    fn tell(&mut self, event: &Event) -> Result<(), TrainError> {
        self.callbacks.iter_mut().try_for_each(|callback| callback.on_event(event))
    }
}

/// Keeps the seeds of recomputed layers apart from those of steps.
const RECOMPUTED: u64 = 0x5eed_0000_0000_0000;

/// Keeps the seeds of a mesh's devices apart.
const OTHER_DEVICE: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the micro-batches of one step add up to, on their device.
struct StepSums {
    loss: Tensor<1>,
    balance: Option<Tensor<1>>,
    loads: Vec<Tensor<1, Int>>,
    rows_per_device: Vec<Vec<u64>>,
}

/// The same on the host.
struct ReadStep {
    loss: f64,
    balance_loss: Option<f64>,
    norm: f64,
    loads: Vec<LayerLoad>,
    rows_per_device: Vec<LayerLoad>,
}

impl StepSums {
    fn plus(self, part: Self) -> Self {
        let loads = self.loads.into_iter().zip(part.loads).map(|(sum, more)| sum + more).collect();
        let balance = self.balance.zip(part.balance).map(|(sum, more)| sum + more);
        let add =
            |(sum, more): (Vec<u64>, Vec<u64>)| sum.iter().zip(more).map(|(a, b)| a + b).collect();
        let rows_per_device =
            self.rows_per_device.into_iter().zip(part.rows_per_device).map(add).collect();
        Self { loss: self.loss + part.loss, balance, loads, rows_per_device }
    }

    /// Reads losses, gradient norm and loads from the device in a single transfer.
    fn read(self, step: u64, norm_squared: Option<Tensor<1>>) -> Result<ReadStep, TrainError> {
        let norm_squared = norm_squared.unwrap_or_else(|| self.loss.zeros_like());
        let has_balance = self.balance.is_some();
        let floats = [Some(self.loss), Some(norm_squared), self.balance].into_iter().flatten();
        let transaction = floats.fold(Transaction::default(), Transaction::register);
        let transaction = self.loads.into_iter().fold(transaction, Transaction::register);
        let mut read = transaction
            .try_execute()
            .map_err(|error| TrainError::Device(error.to_string()))?
            .into_iter();
        let mut float = || {
            let value = read.next().and_then(|data| data.convert::<f32>().iter::<f32>().next());
            f64::from(value.unwrap_or(f32::NAN))
        };
        let (loss, norm) = (float(), float().sqrt());
        let balance_loss = has_balance.then(float);
        let checked = [
            ("loss", loss),
            ("balancing loss", balance_loss.unwrap_or(0.0)),
            ("gradient norm", norm),
        ];
        if let Some(&(what, value)) = checked.iter().find(|(_, value)| !value.is_finite()) {
            return Err(TrainError::NotFinite { step, what, value });
        }
        let counts =
            |data: TensorData| data.convert::<i64>().iter::<i64>().map(|n| n as u64).collect();
        Ok(ReadStep {
            loss,
            balance_loss,
            norm,
            loads: read.map(|data| LayerLoad::new(counts(data))).collect(),
            rows_per_device: self.rows_per_device.into_iter().map(LayerLoad::new).collect(),
        })
    }
}

fn read_floats(tensor: Tensor<1>) -> Result<Vec<f64>, TrainError> {
    let data = tensor.try_into_data().map_err(|error| TrainError::Device(error.to_string()))?;
    Ok(data.convert::<f32>().iter::<f32>().map(f64::from).collect())
}
