//! One optimizer step: micro-batches to gradients, sums and numbers.

use std::{collections::BTreeMap, time::Instant};

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData, Transaction},
};
use yuan_laep::LayerLoad;
use yuan_model::{DeviceRows, LossOutput, ObjectiveLoss, ops, ranks::Ranks};

use crate::{
    Batch, LanguageModel, Learns, LossOptions, Pass, StepMetrics, TrainConfig, TrainError,
    data::{Row, StepData, batch_of},
    gradients,
    optim::{clip_factor, global_norm_squared},
    session::Session,
    sharded::{Holders, Parts, Sums},
};

/// What came of an attempt at a step.
#[derive(Debug, Clone, PartialEq)]
pub enum StepOutcome {
    /// The parameters were updated.
    Taken(StepMetrics),
    /// Loss or gradient was no number, and nothing was changed.
    NotFinite(NotFinite),
}

/// A number of a step that is infinite or no number at all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NotFinite {
    /// Which number: loss, balancing loss or gradient norm.
    pub what: &'static str,
    /// What it is.
    pub value: f64,
}

/// Which step is taken, and what learns in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Position {
    /// Completed steps.
    pub step: u64,
    pub learns: Learns,
}

/// Takes the step after some completed ones with the next rows of `data`.
///
/// Its loss is the mean over all learnt labels of the step: a micro-batch weighs as many as it has,
/// so that it makes no difference how the rows are cut into micro-batches.
pub(super) fn take<M: LanguageModel>(
    session: &mut Session<M>,
    device: &Device,
    data: &mut dyn StepData<M>,
    config: &TrainConfig,
    Position { step, learns }: Position,
) -> Result<StepOutcome, TrainError> {
    // Dropout draws from the device: a seed per step makes a resumed run draw alike.
    let seed = config.seed.wrapping_add(step + 1);
    let model = session.unread_model();
    let ranks = model.ranks().cloned();
    let rank = ranks.as_ref().map_or(0, |ranks| ranks.world().rank());
    let of_rank = (rank as u64).wrapping_mul(OTHER_RANK);
    let model = if data.reads_model() { session.model() } else { session.unread_model() };
    let mut began = Instant::now();
    let rows = data.next_rows(model, config, step)?;
    if data.reads_model() {
        // What the model took to make its rows is told apart.
        began = Instant::now();
    }
    let objective = data.objective();
    device.seed(seed.wrapping_add(of_rank));
    let learnt_in_step = learnt(&rows).max(1.0);
    // Text alone leaves the image tower as it is, weight decay included.
    let has_images = rows.iter().any(|row| !row.tiles.is_empty());
    let learns = |path: &str| {
        let is_used = has_images || !path.starts_with("images.");
        is_used && learns.includes(path) && !config.freeze.includes(path)
    };
    let mut accumulator = GradientsAccumulator::<M>::new();
    let mut earlier = GradientsParams::new();
    let mut sums_of_ranks =
        session.optimizer().holders().map(|holders| Sums::new(holders, model, learns));
    let mut sums: Option<StepSums> = None;
    for (micro_batch, rows) in rows.chunks(config.batch_size).enumerate() {
        let share = learnt(rows) / learnt_in_step;
        let batch = own_batch(rows, ranks.as_ref(), device)?;
        let batch = Batch { objective: objective.clone(), ..batch };
        let recompute_seed =
            seed.wrapping_add(micro_batch as u64).wrapping_add(of_rank) ^ RECOMPUTED;
        let options = LossOptions {
            balance: config.balance,
            precision: config.precision,
            recompute: config.recompute.then_some(recompute_seed),
            freeze: config.freeze,
        };
        let is_last = micro_batch + 1 == config.accumulation;
        let mut pass = MicroBatch {
            session,
            accumulator: &mut accumulator,
            earlier: &mut earlier,
            sums: sums_of_ranks.as_mut().filter(|_| is_last),
        };
        let output = model.gradients(batch, options, share, &mut pass)?;
        let part = StepSums::of(output, share);
        sums = Some(match sums {
            None => part,
            Some(sums) => sums.plus(part),
        });
        if micro_batch + 2 == config.accumulation && sums_of_ranks.is_some() {
            earlier = accumulator.grads();
        }
    }
    let sums = sums.expect("`TrainConfig::validate` wants at least one micro-batch");
    let (numbers, update) = match sums_of_ranks {
        Some(mut sums_of_ranks) => {
            sums_of_ranks.add(model, earlier);
            let parts = sums_of_ranks.finish(model);
            let squares = parts.iter().map(|(_, part)| ops::sum_of_squares(part.clone()));
            let holders = session.optimizer().holders().expect("sums are those of holders");
            let numbers = sums.read(squares.reduce(|sum, more| sum + more))?.over(holders)?;
            (numbers, Update::Parts(parts))
        }
        None => {
            let gradients = gradients::of_learning(model, accumulator.grads(), learns);
            let numbers = sums.read(global_norm_squared(model, &gradients))?;
            (numbers, Update::Whole(gradients))
        }
    };
    if let Some(not_finite) = numbers.not_finite() {
        return Ok(StepOutcome::NotFinite(not_finite));
    }
    let learning_rate = config.learning_rate_at(step);
    let scale = clip_factor(numbers.norm, config.clip_norm);
    match update {
        Update::Parts(parts) => session.step_parts(parts, learning_rate, scale),
        Update::Whole(gradients) => session.step(gradients, learning_rate, scale),
    }
    Ok(StepOutcome::Taken(StepMetrics {
        step: step + 1,
        loss: numbers.loss,
        balance_loss: numbers.balance_loss,
        learning_rate,
        gradient_norm: numbers.norm,
        tokens: rows.iter().map(|row| row.input_ids.len() as u64).sum(),
        seconds: began.elapsed().as_secs_f64(),
        max_over_mean: numbers.loads.iter().map(LayerLoad::max_over_mean).collect(),
        // Where one device has all experts there is nothing to balance.
        device_max_over_mean: numbers
            .rows_per_device
            .iter()
            .filter(|rows| rows.num_devices() > 1)
            .map(DeviceRows::max_over_mean)
            .collect(),
        measures: numbers.measures,
        loads: numbers.loads,
        image_loads: numbers.image_loads,
    }))
}

/// The gradients of a step.
enum Update {
    /// Over ranks: the part of each that this rank updates.
    Parts(Parts),
    /// On one device.
    Whole(GradientsParams),
}

/// The pass of one micro-batch.
struct MicroBatch<'a, 'b, M> {
    session: &'a Session<M>,
    accumulator: &'a mut GradientsAccumulator<M>,
    earlier: &'a mut GradientsParams,
    /// In the last micro-batch, whose gradients complete those of the step: ranks add them up while
    /// the rest is still computed.
    sums: Option<&'a mut Sums<'b>>,
}

impl<M: LanguageModel> Pass for MicroBatch<'_, '_, M> {
    fn before(&mut self, parameters: &[ParamId]) {
        self.session.wait_for(parameters);
    }

    fn take(&mut self, gradients: GradientsParams) {
        let model = self.session.unread_model();
        match &mut self.sums {
            Some(sums) => sums.add(model, with_earlier(model, self.earlier, gradients)),
            None => self.accumulator.accumulate(model, gradients),
        }
    }
}

/// Gradients with those of the same parameters of earlier micro-batches added.
fn with_earlier<M: Module>(
    model: &M,
    earlier: &mut GradientsParams,
    gradients: GradientsParams,
) -> GradientsParams {
    struct Add<'a>(&'a mut GradientsParams, GradientsParams);
    impl ModuleVisitor for Add<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(gradient) = self.1.remove::<D>(param.id) else { return };
            let sum = match self.0.remove::<D>(param.id) {
                Some(earlier) => earlier + gradient,
                None => gradient,
            };
            self.1.register::<D>(param.id, sum);
        }
    }
    let mut add = Add(earlier, gradients);
    model.visit(&mut add);
    add.1
}

fn learnt(rows: &[Row]) -> f64 {
    rows.iter().map(Row::learnt_labels).sum::<u64>() as f64
}

/// The rows that this rank computes of those of a micro-batch, which are all without ranks.
pub(super) fn own_batch(
    rows: &[Row],
    ranks: Option<&Ranks>,
    device: &Device,
) -> Result<Batch, TrainError> {
    let Some(ranks) = ranks else { return Ok(batch_of(rows, device)) };
    // The ranks add up the same gradients in the same order, so all of them see images or none does.
    let has_images: Vec<bool> = rows.iter().map(|row| !row.tiles.is_empty()).collect();
    if has_images.contains(&true) && has_images.contains(&false) {
        return Err(TrainError::RowWithoutImage);
    }
    let own = &rows[ranks.share(rows.len())?];
    Ok(batch_of(own, device).with_share(learnt(own) / learnt(rows).max(1.0)))
}

/// Keeps the seeds of recomputed layers apart from those of steps.
const RECOMPUTED: u64 = 0x5eed_0000_0000_0000;

/// Keeps the seeds of ranks apart.
const OTHER_RANK: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the micro-batches of one step add up to, on their device.
struct StepSums {
    loss: Tensor<1>,
    measures: Vec<(&'static str, Tensor<1>)>,
    balance: Option<Tensor<1>>,
    tokens_per_expert: Vec<Tensor<1, Int>>,
    image_tokens_per_expert: Vec<Tensor<1, Int>>,
    rows_per_device: Vec<DeviceRows>,
}

/// The same on the host.
struct StepNumbers {
    loss: f64,
    measures: BTreeMap<String, f64>,
    balance_loss: Option<f64>,
    norm: f64,
    loads: Vec<LayerLoad>,
    image_loads: Vec<LayerLoad>,
    rows_per_device: Vec<DeviceRows>,
}

impl StepSums {
    fn of(output: LossOutput, share: f64) -> Self {
        let LossOutput { loss, measures, .. } = output;
        let ObjectiveLoss { loss, measures } = ObjectiveLoss { loss, measures }.times(share);
        Self {
            loss,
            measures,
            balance: output.balance_loss.map(|loss| loss.mul_scalar(share)),
            tokens_per_expert: output.tokens_per_expert,
            image_tokens_per_expert: output.image_tokens_per_expert,
            rows_per_device: output.rows_per_device,
        }
    }

    fn plus(mut self, part: Self) -> Self {
        self.loss = self.loss + part.loss;
        for ((_, sum), (_, more)) in self.measures.iter_mut().zip(part.measures) {
            *sum = sum.clone() + more;
        }
        self.balance = self.balance.zip(part.balance).map(|(sum, more)| sum + more);
        self.tokens_per_expert = summed(self.tokens_per_expert, part.tokens_per_expert);
        self.image_tokens_per_expert =
            summed(self.image_tokens_per_expert, part.image_tokens_per_expert);
        for (sum, more) in self.rows_per_device.iter_mut().zip(&part.rows_per_device) {
            sum.add(more);
        }
        self
    }

    /// Reads losses, gradient norm and loads from the device in a single transfer.
    fn read(self, norm_squared: Option<Tensor<1>>) -> Result<StepNumbers, TrainError> {
        let norm_squared = norm_squared.unwrap_or_else(|| self.loss.zeros_like());
        let has_balance = self.balance.is_some();
        let mut transaction = Transaction::default().register(self.loss).register(norm_squared);
        if let Some(balance) = self.balance {
            transaction = transaction.register(balance);
        }
        let layers = self.tokens_per_expert.len();
        let mut names = Vec::with_capacity(self.measures.len());
        for (name, value) in self.measures {
            names.push(name);
            transaction = transaction.register(value);
        }
        for counts in self.tokens_per_expert.into_iter().chain(self.image_tokens_per_expert) {
            transaction = transaction.register(counts);
        }
        let read = transaction.try_execute();
        let mut read = read.map_err(|error| TrainError::Device(error.to_string()))?.into_iter();
        let loss = float(read.next());
        let norm = float(read.next()).sqrt();
        let balance_loss = has_balance.then(|| float(read.next()));
        let measures =
            names.into_iter().map(|name| (name.to_owned(), float(read.next()))).collect();
        let load = |counts: TensorData| {
            let counts = counts.convert::<i64>();
            LayerLoad::new(counts.iter::<i64>().map(|count| count as u64).collect())
        };
        let mut loads: Vec<LayerLoad> = read.map(load).collect();
        let image_loads = loads.split_off(layers);
        let rows_per_device = self.rows_per_device;
        Ok(StepNumbers { loss, measures, balance_loss, norm, loads, image_loads, rows_per_device })
    }
}

impl StepNumbers {
    /// The same of all ranks; the balancing losses are those of all already.
    fn over(self, holders: &Holders) -> Result<Self, TrainError> {
        let (world, column) = (holders.ranks().world(), holders.ranks().column());
        let norm = holders.norm_squared(self.norm * self.norm)?.sqrt();
        let values: Vec<f64> =
            std::iter::once(&self.loss).chain(self.measures.values()).copied().collect();
        let mut sums = world.sum(&values)?.into_iter();
        let loss = sums.next().unwrap_or(f64::NAN);
        let measures = self.measures.keys().cloned().zip(sums).collect();
        let layers = self.loads.len();
        let all = || self.loads.iter().chain(&self.image_loads);
        let flat: Vec<u64> = all().flat_map(LayerLoad::tokens_per_expert).copied().collect();
        let mut flat = world.sum_counts(&flat)?.into_iter();
        let sizes = all().map(LayerLoad::num_experts);
        let mut loads: Vec<LayerLoad> =
            sizes.map(|size| LayerLoad::new(flat.by_ref().take(size).collect())).collect();
        let image_loads = loads.split_off(layers);
        let rows: Vec<u64> =
            self.rows_per_device.iter().flat_map(DeviceRows::rows_per_device).copied().collect();
        let mut rows = column.sum_counts(&rows)?.into_iter();
        let of_layer =
            |layer: &DeviceRows| DeviceRows::new(rows.by_ref().take(layer.num_devices()).collect());
        let rows_per_device = self.rows_per_device.iter().map(of_layer).collect();
        Ok(Self { loss, measures, norm, loads, image_loads, rows_per_device, ..self })
    }

    fn not_finite(&self) -> Option<NotFinite> {
        let balance_loss = self.balance_loss.unwrap_or(0.0);
        let checked =
            [("loss", self.loss), ("balancing loss", balance_loss), ("gradient norm", self.norm)];
        let measures = self.measures.values().map(|&value| ("measure of the objective", value));
        let mut all = checked.into_iter().chain(measures);
        let (what, value) = all.find(|(_, value)| !value.is_finite())?;
        Some(NotFinite { what, value })
    }
}

/// Counts of every layer added up; no counts are none.
fn summed(counts: Vec<Tensor<1, Int>>, more: Vec<Tensor<1, Int>>) -> Vec<Tensor<1, Int>> {
    if counts.is_empty() || more.is_empty() {
        return if counts.is_empty() { more } else { counts };
    }
    counts.into_iter().zip(more).map(|(sum, more)| sum + more).collect()
}

/// The number that was read, or none.
pub(super) fn float(data: Option<TensorData>) -> f64 {
    let value = data.and_then(|data| data.convert::<f32>().iter::<f32>().next());
    f64::from(value.unwrap_or(f32::NAN))
}
