//! How fast is this device, and what would a plan do to the speed of a Yuan model on it?

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use serde::{Deserialize, Serialize};
use yuan_laep::{
    PrunePlan,
    efficiency::{Cluster, DeviceSpeed, ModelShape, PlacedLayer},
};
use yuan_model::YuanConfig;

/// What a prediction of speed rests on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SpeedModel {
    /// The devices and how the work is spread over them.
    pub cluster: Cluster,
    /// The model.
    pub shape: ModelShape,
    /// Whether a device group of the plan is a device of its own; otherwise one device has all of them.
    pub group_per_device: bool,
}

impl SpeedModel {
    /// Step time before the plan over that after it.
    pub fn gain(&self, plan: &PrunePlan) -> f64 {
        let step = |placed: fn(&yuan_laep::LayerPlan) -> PlacedLayer| {
            let layers = plan.layers.iter().map(placed).map(|layer| match self.group_per_device {
                true => layer,
                false => PlacedLayer { groups: vec![layer.groups.concat()], ..layer },
            });
            self.cluster.step(&self.shape, &layers.collect::<Vec<_>>()).seconds()
        };
        step(PlacedLayer::before) / step(PlacedLayer::rearranged)
    }
}

/// The shape of a model as the efficiency calculation wants it; hidden states travel in `row_bytes_per_value`.
pub fn model_shape(config: &YuanConfig, seq_len: usize, row_bytes_per_value: f64) -> ModelShape {
    let count = config.parameter_count();
    let layers = config.num_hidden_layers() as f64;
    // Two FLOP per weight and token; a query meets half of the sequence on average, twice.
    let scores = 2.0 * seq_len as f64 * config.attention_projection_size as f64;
    let matrices = (count.attention + count.filter + count.routers) as f64 / layers;
    let expert = 3.0 * config.hidden_size as f64 * config.ffn_hidden_size as f64;
    ModelShape {
        dense_flops_per_layer: 2.0 * matrices + scores,
        head_flops: 2.0 * count.head as f64,
        expert_flops: 2.0 * expert,
        top_k: config.moe_top_k,
        expert_parameters: expert,
        dense_parameters: (count.total() - count.experts) as f64,
        row_bytes: config.hidden_size as f64 * row_bytes_per_value,
    }
}

/// Measures what a device sustains in f32, in a fraction of a second on a CPU: products of `[1024, 512]` by
/// `[512, 512]`, and the sum of two long vectors. It has no link.
pub fn measure_device(device: &Device) -> DeviceSpeed {
    let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Uniform(-1.0, 1.0), device);
    let (a, b) = (random([1024, 512]), random([512, 512]));
    let product = 2.0 * 1024.0 * 512.0 * 512.0;
    let flops = best_rate(product, || drop(a.clone().matmul(b.clone()).slice([0..1, 0..1]).into_data()));
    let (x, y) = (random([2048, 4096]), random([2048, 4096]));
    // Two are read, one is written.
    let bytes = 3.0 * 4.0 * 2048.0 * 4096.0;
    let memory_bandwidth = best_rate(bytes, || drop((x.clone() + y.clone()).slice([0..1, 0..1]).into_data()));
    DeviceSpeed { flops, memory_bandwidth, link_bandwidth: f64::MAX }
}

/// Work a second of the fastest of some tries, the first of which warms up.
fn best_rate(work: f64, mut task: impl FnMut()) -> f64 {
    let seconds = |_| {
        let start = Instant::now();
        task();
        start.elapsed().as_secs_f64()
    };
    work / (0..6).map(seconds).skip(1).fold(f64::INFINITY, f64::min)
}
