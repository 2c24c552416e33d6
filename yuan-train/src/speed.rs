//! How fast is this device, and what would a plan do to the speed of a Yuan model on it?

use std::time::Instant;

use burn::tensor::{Device, FloatDType, Tensor};
use serde::{Deserialize, Serialize};
use yuan_laep::{
    LayerPlan, PrunePlan,
    efficiency::{Cluster, DeviceSpeed, MemoryShape, ModelShape, PlacedLayer},
};
use yuan_model::{
    Precision, YuanConfig,
    loss::ROWS_AT_ONCE,
    ops::{self, RowsToRanks},
    ranks::{Communicator, Grid, Ranks, evenly},
};

use crate::TrainError;

/// What a prediction of speed rests on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SpeedModel {
    /// The devices and how the work is spread over them.
    pub cluster: Cluster,
    /// The model.
    pub shape: ModelShape,
    /// Ranks that share the experts of a layer; each holds as many of a plan's groups.
    #[serde(default = "one")]
    pub sharing: usize,
}

/// What one optimizer step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepWork {
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Tokens of a row.
    pub seq_len: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Type of activations and products.
    pub precision: Precision,
    /// Whether layers are computed again for their gradients.
    pub recompute: bool,
}

fn one() -> usize {
    1
}

impl SpeedModel {
    /// Measures what this device sustains now, for a model that is trained there; over ranks, which
    /// all call it together, what the slowest of them does and the links between them.
    ///
    /// # Errors
    ///
    /// If a device fails, or a rank is gone.
    pub fn measure(
        model: &YuanConfig,
        device: &Device,
        ranks: Option<&Ranks>,
        work: StepWork,
    ) -> Result<Self, TrainError> {
        let (device, grid) = (device.clone().inner(), ranks.map_or(Grid::ONE, Ranks::grid));
        let mut speed = measure_device(&device, work.precision.dtype())?;
        if let Some(ranks) = ranks.filter(|_| grid.size() > 1) {
            speed.link_bandwidth = measure_links(&device, ranks.world())?;
            speed = slowest(speed, ranks.world())?;
        }
        let cluster = Cluster {
            device: speed,
            tokens_per_device: (work.batch_size * work.seq_len) as f64 / grid.size() as f64,
            micro_batches: work.accumulation as f64,
            data_parallel: grid.data() as f64,
            passes: if work.recompute { 4.0 } else { 3.0 },
            weight_bytes: 4.0,
            // Value, both moments and gradient are read, value and moments written.
            optimizer_bytes: 28.0,
        };
        let row_bytes = if work.precision == Precision::Bf16 { 2.0 } else { 4.0 };
        Ok(Self {
            cluster,
            shape: model_shape(model, work.seq_len, row_bytes),
            sharing: grid.expert(),
        })
    }

    /// Whether it was measured on ranks of this shape.
    pub fn is_of(&self, grid: Grid) -> bool {
        (self.cluster.data_parallel, self.sharing) == (grid.data() as f64, grid.expert())
    }

    /// Seconds of a step with the experts of every layer as `placed` says.
    pub fn seconds(&self, plan: &PrunePlan, placed: fn(&LayerPlan) -> PlacedLayer) -> f64 {
        let on_devices = |layer: &LayerPlan| {
            let layer = placed(layer);
            let groups_of_each = layer.groups.len().div_ceil(self.sharing).max(1);
            let groups = layer.groups.chunks(groups_of_each).map(<[Vec<usize>]>::concat).collect();
            PlacedLayer { groups, ..layer }
        };
        self.cluster
            .step(&self.shape, &plan.layers.iter().map(on_devices).collect::<Vec<_>>())
            .seconds()
    }

    /// Step time before the plan over that after it.
    pub fn gain(&self, plan: &PrunePlan) -> f64 {
        self.seconds(plan, PlacedLayer::before) / self.seconds(plan, PlacedLayer::rearranged)
    }
}

/// The shape of a model as the efficiency calculation wants it; hidden states travel in
/// `row_bytes_per_value`.
pub fn model_shape(config: &YuanConfig, seq_len: usize, row_bytes_per_value: f64) -> ModelShape {
    let count = config.parameter_count();
    let layers = config.num_layers() as f64;
    // Two FLOP per weight and token; a query meets half of the sequence on average, twice.
    let scores = 2.0 * seq_len as f64 * config.attention_projection_size as f64;
    let matrices = (count.attention + count.filter + count.routers) as f64 / layers;
    let expert = 3.0 * config.hidden_size as f64 * config.expert_hidden_size as f64;
    ModelShape {
        dense_flops_per_layer: 2.0 * matrices + scores,
        head_flops: 2.0 * count.head as f64,
        expert_flops: 2.0 * expert,
        top_k: config.top_k,
        expert_parameters: expert,
        dense_parameters: (count.total() - count.experts) as f64,
        row_bytes: config.hidden_size as f64 * row_bytes_per_value,
    }
}

/// The shape of a model as the calculation of memory wants it.
///
/// A token keeps five hidden states and queries, keys, values and attended values outside the experts,
/// a row its input and output and three values for each of the expert's width: what the tensors add
/// up to that the operations keep for their gradients.
pub fn memory_shape(config: &YuanConfig) -> MemoryShape {
    let count = config.parameter_count();
    let layers = config.num_layers() as f64;
    let ends = count.embedding + count.head;
    let [hidden, width, expert] =
        [config.hidden_size, config.attention_projection_size, config.expert_hidden_size]
            .map(|size| size as f64);
    MemoryShape {
        dense_per_layer: (count.total() - count.experts - ends) as f64 / layers,
        embedding: count.embedding as f64,
        head: count.head as f64,
        expert: 3.0 * hidden * expert,
        experts_per_layer: config.experts_per_layer.clone(),
        kept_per_token: 5.0 * hidden + 4.0 * width,
        kept_per_row: 2.0 * hidden + 3.0 * expert,
        top_k: config.top_k,
        hidden,
        // Logits, their gradient and their copy in the type of the products.
        head_bytes: (ROWS_AT_ONCE * config.vocab_size) as f64 * 10.0,
    }
}

/// Measures what a device sustains, in a second or less: square products in `dtype` by the
/// operation that the model uses, and sums of two vectors in f32, each as large as it must be for
/// the device to take some milliseconds, or as it can hold. It has no link.
///
/// # Errors
///
/// If the device fails at the smallest of them.
pub fn measure_device(device: &Device, dtype: FloatDType) -> Result<DeviceSpeed, TrainError> {
    // Filling costs less than drawing, and multiplying does not depend on what is multiplied.
    let filled = |shape: [usize; 2]| Tensor::<2>::full(shape, 0.5, device);
    let flops = largest_rate([512, 1024, 2048, 4096, 8192], |n| {
        let [a, b] = [(); 2].map(|()| filled([n, n]).cast(dtype));
        (2.0 * (n as f64).powi(3), move || finish(ops::dense(a.clone(), b.clone())))
    });
    let memory_bandwidth = largest_rate([1 << 10, 1 << 12, 1 << 14], |n| {
        let (x, y) = (filled([n, 4096]), filled([n, 4096]));
        // Two are read, one is written.
        (3.0 * 4.0 * n as f64 * 4096.0, move || finish(x.clone() + y.clone()))
    });
    Ok(DeviceSpeed { flops: flops?, memory_bandwidth: memory_bandwidth?, link_bandwidth: f64::MAX })
}

/// Bytes a second that leave each of the ranks when all of them send 64 MB to all others at once,
/// waiting included. All ranks call it together.
///
/// # Errors
///
/// If the device fails, or a rank is gone.
pub fn measure_links(device: &Device, group: &Communicator) -> Result<f64, TrainError> {
    const ROWS: usize = 1 << 12;
    let counts = evenly(ROWS, group.size());
    let to = RowsToRanks {
        group: group.clone(),
        send: counts.clone(),
        receive: vec![counts[group.rank()]; group.size()],
    };
    let source = Tensor::<2>::full([ROWS, 1 << 12], 0.5, device);
    finish(source.clone())?;
    let mut seconds = f64::INFINITY;
    for _ in 0..4 {
        group.barrier()?;
        let start = Instant::now();
        finish(ops::all_to_all(source.clone(), to.clone()))?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    let sent = ROWS - counts[group.rank()];
    Ok((sent << 14) as f64 / seconds)
}

/// What the slowest rank sustains in everything.
fn slowest(speed: DeviceSpeed, world: &Communicator) -> Result<DeviceSpeed, TrainError> {
    let DeviceSpeed { flops, memory_bandwidth, link_bandwidth } = speed;
    let own = [flops, memory_bandwidth, link_bandwidth].map(f64::to_bits);
    let all = world.gather_counts(&own)?;
    let least = |index: usize| {
        all.iter().map(|rank| f64::from_bits(rank[index])).fold(f64::INFINITY, f64::min)
    };
    Ok(DeviceSpeed { flops: least(0), memory_bandwidth: least(1), link_bandwidth: least(2) })
}

/// Waits for a result by reading one number of it.
fn finish(result: Tensor<2>) -> Result<(), TrainError> {
    let read = result.slice([0..1, 0..1]).try_into_data();
    let read = read.map_err(|error| TrainError::Device(error.to_string()))?;
    // On a GPU only looking at the number waits for it.
    std::hint::black_box(read.as_bytes()[0]);
    Ok(())
}

/// Work a second of tasks of growing size, up to one that takes long enough to be timed well or
/// that fails.
fn largest_rate<F: FnMut() -> Result<(), TrainError>>(
    sizes: impl IntoIterator<Item = usize>,
    mut task: impl FnMut(usize) -> (f64, F),
) -> Result<f64, TrainError> {
    let mut rate = Err(TrainError::Device("there was nothing to measure".into()));
    let mut begin: Option<Instant> = None;
    for size in sizes {
        // A slow device has had its time; loading libraries, which the first task waits for, does
        // not make it slow.
        if begin.is_some_and(|begin| begin.elapsed().as_secs_f64() > 0.5) {
            break;
        }
        let (work, mut run) = task(size);
        let mut seconds = || {
            let start = Instant::now();
            run().map(|()| start.elapsed().as_secs_f64())
        };
        // The first warms up.
        let times: Result<Vec<f64>, _> = (0..4).map(|_| seconds()).collect();
        let fastest = match times {
            Ok(times) => times[1..].iter().copied().fold(f64::INFINITY, f64::min),
            // What is too large for the device is no failure after something that was not.
            Err(error) => return rate.or(Err(error)),
        };
        rate = Ok(work / fastest);
        begin.get_or_insert_with(Instant::now);
        if fastest > 5e-3 {
            break;
        }
    }
    rate
}

#[cfg(test)]
mod tests {
    use yuan_laep::{ExpertLayout, LayerLoad, PruneLimits};

    use super::*;

    #[test]
    fn groups_cost_what_the_devices_that_hold_them_cost() {
        let device = DeviceSpeed {
            flops: 1.0,
            memory_bandwidth: f64::INFINITY,
            link_bandwidth: f64::INFINITY,
        };
        let cluster = Cluster {
            device,
            tokens_per_device: 10.0,
            micro_batches: 1.0,
            data_parallel: 1.0,
            passes: 3.0,
            weight_bytes: 4.0,
            optimizer_bytes: 28.0,
        };
        let shape = ModelShape {
            dense_flops_per_layer: 0.0,
            head_flops: 0.0,
            expert_flops: 1.0,
            top_k: 2,
            expert_parameters: 1.0,
            dense_parameters: 0.0,
            row_bytes: 0.0,
        };
        let limits = PruneLimits {
            max_pruned_fraction: Some(0.0),
            multiple_of: 4,
            ..PruneLimits::default()
        };
        let load = LayerLoad::new(vec![70, 10, 10, 10]);
        let plan = PrunePlan::new(&[load], &limits, ExpertLayout { top_k: 2, groups: 4 }).unwrap();
        let seconds =
            |sharing| SpeedModel { cluster, shape, sharing }.seconds(&plan, PlacedLayer::before);
        // Rows of all devices that share, times the largest share of the load that one of them has,
        // thrice.
        assert_eq!(seconds(1), 3.0 * 20.0);
        assert!((seconds(2) - 3.0 * 40.0 * 0.8).abs() < 1e-9);
        assert!((seconds(4) - 3.0 * 80.0 * 0.7).abs() < 1e-9);
    }
}
