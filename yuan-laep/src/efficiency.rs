//! What pruning and rearranging do to the speed of training: a calculation, not a measurement.
//!
//! A layer is as slow as its slowest device group. With the loads, where the experts sit, the shape
//! of the model and four numbers about the devices, [`Cluster::step`] adds up
//!
//! - dense work: attention, norms and head, the same on every device (data parallel);
//! - experts: per expert the larger of its arithmetic and the traffic of its weights;
//! - exchange: rows to their experts and back over the link, in every pass but one (a backward pass
//!   does the arithmetic of two);
//! - per optimizer step: the moments' traffic and the reduction of gradients over the copies of the
//!   model.
//!
//! Assumed: the same devices everywhere, each holding its share of all layers (no pipeline), tokens
//! spread evenly over them before routing, nothing overlaps, no latency, memory without end, and
//! tokens of pruned experts go to the kept ones in proportion to their loads.

use serde::{Deserialize, Serialize};

use crate::{LayerLoad, LayerPlan, rearrange::cut_in_order};

mod memory;

pub use memory::{MemoryShape, RankMemory, RankWork, Spread};

/// What one device sustains, rather than what its data sheet says.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DeviceSpeed {
    /// FLOP/s of its matrix products.
    pub flops: f64,
    /// Bytes a second from its memory.
    pub memory_bandwidth: f64,
    /// Bytes a second over its link to the others; the largest number for a device alone (JSON has
    /// no infinity).
    pub link_bandwidth: f64,
}

/// A mixture-of-experts model, as far as speed depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// FLOP of a token in one layer outside the experts, forward.
    pub dense_flops_per_layer: f64,
    /// FLOP of a token outside the layers (the head), forward.
    pub head_flops: f64,
    /// FLOP of a token in one expert, forward.
    pub expert_flops: f64,
    /// Experts that each token visits.
    pub top_k: usize,
    /// Parameters of one expert.
    pub expert_parameters: f64,
    /// All parameters that are no expert's.
    pub dense_parameters: f64,
    /// Bytes of one token's hidden state.
    pub row_bytes: f64,
}

/// How the training is spread over devices.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// The devices.
    pub device: DeviceSpeed,
    /// Tokens of one device in a micro-batch.
    pub tokens_per_device: f64,
    /// Micro-batches of an optimizer step.
    pub micro_batches: f64,
    /// Copies of every expert over which gradients are reduced; the dense parameters have as many
    /// on every group.
    pub data_parallel: f64,
    /// Passes over the products: 3 for forward and backward, 4 with recomputation.
    pub passes: f64,
    /// Bytes of one weight or gradient as it is computed with.
    pub weight_bytes: f64,
    /// Bytes that one update reads and writes per parameter.
    pub optimizer_bytes: f64,
}

/// The experts of one layer on their device groups.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacedLayer {
    /// Tokens per expert.
    pub load: LayerLoad,
    /// Experts of every group.
    pub groups: Vec<Vec<usize>>,
}

/// Seconds of one optimizer step by part; the experts' and the exchange's are the slowest groups'.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct StepTime {
    /// Work outside the experts.
    pub dense: f64,
    /// Products of the slowest groups.
    pub experts: f64,
    /// Rows sent and received by the slowest groups.
    pub exchange: f64,
    /// Traffic of the update.
    pub optimizer: f64,
    /// Reduction of gradients.
    pub reduction: f64,
    /// FLOP that the model asks for, a device: no recomputation, no waiting.
    pub useful_flops: f64,
}

impl StepTime {
    /// Seconds of the step.
    pub fn seconds(&self) -> f64 {
        self.dense + self.experts + self.exchange + self.optimizer + self.reduction
    }

    /// Useful FLOP/s of a device, the paper's measure of throughput.
    pub fn flops_per_second(&self) -> f64 {
        self.useful_flops / self.seconds()
    }
}

impl Cluster {
    /// Seconds of a step whose layers are cut into so many stages, one after the other: each does its
    /// part, and waits while the first micro-batch comes and the last one goes (one forward, one
    /// backward).
    pub fn seconds_in_stages(&self, step: &StepTime, stages: usize) -> f64 {
        let stages = stages as f64;
        let of_stage = (step.dense + step.experts + step.exchange) / stages;
        let waiting = 1.0 + (stages - 1.0) / self.micro_batches;
        of_stage * waiting + (step.optimizer + step.reduction) / stages
    }
}

impl PlacedLayer {
    /// The experts before a plan: old order, cut into as many groups as the plan has.
    pub fn before(plan: &LayerPlan) -> Self {
        Self { load: plan.load.clone(), groups: plan.groups_before() }
    }

    /// The plan's pruning without its rearranging: the kept experts in their old order.
    pub fn pruned(plan: &LayerPlan) -> Self {
        let mut kept = plan.kept.clone();
        kept.sort_unstable();
        Self { load: without_pruned(plan), groups: cut_in_order(&kept, plan.groups.len()) }
    }

    /// The whole plan.
    pub fn rearranged(plan: &LayerPlan) -> Self {
        Self { load: without_pruned(plan), groups: plan.groups.clone() }
    }

    /// The same experts under perfect balance, which no plan can beat.
    pub fn balanced(&self) -> Self {
        let mut tokens = vec![0; self.load.num_experts()];
        self.groups.iter().flatten().for_each(|&expert| tokens[expert] = 1);
        Self { load: LayerLoad::new(tokens), groups: self.groups.clone() }
    }
}

fn without_pruned(plan: &LayerPlan) -> LayerLoad {
    let mut tokens = plan.load.tokens_per_expert().to_vec();
    plan.pruned.iter().for_each(|&expert| tokens[expert] = 0);
    LayerLoad::new(tokens)
}

impl Cluster {
    /// Time of one optimizer step with the experts of every layer placed so; without load, experts
    /// cost their weights.
    pub fn step(&self, shape: &ModelShape, layers: &[PlacedLayer]) -> StepTime {
        let speed = &self.device;
        let groups = layers.iter().map(|layer| layer.groups.len()).max().unwrap_or(1).max(1) as f64;
        let (mut experts, mut exchange, mut held) = (0.0, 0.0, 0.0_f64);
        for layer in layers {
            let rows = self.tokens_per_device * groups * shape.top_k as f64;
            let fractions = layer.load.fractions();
            let group_time = |members: &Vec<usize>| {
                let weights = self.passes * shape.expert_parameters * self.weight_bytes
                    / speed.memory_bandwidth;
                let compute = members.iter().map(|&expert| {
                    let arithmetic =
                        self.passes * shape.expert_flops * rows * fractions[expert] / speed.flops;
                    arithmetic.max(weights)
                });
                let received: f64 = members.iter().map(|&expert| rows * fractions[expert]).sum();
                // A row travels in and out, unless its expert is on its own device.
                let trips = 2.0 * (self.passes - 1.0);
                let bytes = trips * received * shape.row_bytes * (groups - 1.0) / groups;
                (compute.sum::<f64>(), bytes / speed.link_bandwidth)
            };
            let slowest = layer
                .groups
                .iter()
                .map(group_time)
                .max_by(|a, b| (a.0 + a.1).total_cmp(&(b.0 + b.1)));
            let (compute, sent) = slowest.unwrap_or_default();
            experts += compute;
            exchange += sent;
            held += layer.groups.iter().map(Vec::len).max().unwrap_or(0) as f64
                * shape.expert_parameters;
        }
        let tokens = self.tokens_per_device * self.micro_batches;
        let dense = layers.len() as f64 * shape.dense_flops_per_layer + shape.head_flops;
        let visited = layers.len() as f64 * shape.top_k as f64 * shape.expert_flops;
        let parameters = shape.dense_parameters + held;
        // A ring sends every gradient twice, less a share.
        let ring = |parameters: f64, copies: f64| 2.0 * parameters * (copies - 1.0) / copies;
        let copies = self.data_parallel.max(1.0);
        let reduced = self.weight_bytes
            * (ring(held, copies) + ring(shape.dense_parameters, copies * groups));
        StepTime {
            dense: self.passes * dense * tokens / speed.flops,
            experts: experts * self.micro_batches,
            exchange: exchange * self.micro_batches,
            optimizer: parameters * self.optimizer_bytes / speed.memory_bandwidth,
            reduction: reduced / speed.link_bandwidth,
            useful_flops: 3.0 * (dense + visited) * tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExpertLayout, PruneLimits, PrunePlan};

    const SHAPE: ModelShape = ModelShape {
        dense_flops_per_layer: 100.0,
        head_flops: 0.0,
        expert_flops: 50.0,
        top_k: 2,
        expert_parameters: 10.0,
        dense_parameters: 0.0,
        row_bytes: 0.0,
    };

    fn cluster() -> Cluster {
        Cluster {
            device: DeviceSpeed {
                flops: 1.0,
                memory_bandwidth: f64::INFINITY,
                link_bandwidth: f64::INFINITY,
            },
            tokens_per_device: 4.0,
            micro_batches: 1.0,
            data_parallel: 1.0,
            passes: 3.0,
            weight_bytes: 2.0,
            optimizer_bytes: 16.0,
        }
    }

    fn placed(tokens: &[u64], groups: &[&[usize]]) -> PlacedLayer {
        let groups = groups.iter().map(|members| members.to_vec()).collect();
        PlacedLayer { load: LayerLoad::new(tokens.to_vec()), groups }
    }

    #[test]
    fn a_layer_is_as_slow_as_its_slowest_group() {
        // Two devices of 4 tokens, 16 rows; group 0 has three quarters of them: 12 · 50 · 3.
        let step = cluster().step(&SHAPE, &[placed(&[60, 15, 20, 5], &[&[0, 1], &[2, 3]])]);
        assert!((step.experts - 1800.0).abs() < 1e-9, "{step:?}");
        assert!((step.dense - 1200.0).abs() < 1e-9);
        assert!((step.useful_flops - 3.0 * 4.0 * (100.0 + 2.0 * 50.0)).abs() < 1e-9);
        let balanced =
            cluster().step(&SHAPE, &[placed(&[60, 15, 20, 5], &[&[0, 1], &[2, 3]]).balanced()]);
        assert!((balanced.experts - 1200.0).abs() < 1e-6, "8 rows a device");
        assert!((balanced.flops_per_second() - 1.0).abs() < 1e-6, "all time is useful");
    }

    #[test]
    fn an_expert_with_few_rows_costs_its_weights() {
        let slow = DeviceSpeed { memory_bandwidth: 0.1, ..cluster().device };
        let step = Cluster { device: slow, ..cluster() }
            .step(&SHAPE, &[placed(&[98, 1, 1, 0], &[&[0], &[1], &[2], &[3]])]);
        // 32 rows: the busy expert computes 31.36 · 150; an idle one would read 10 · 2 · 3 / 0.1 =
        // 600.
        assert!((step.experts - 31.36 * 150.0).abs() < 1e-9);
        let step =
            Cluster { device: slow, ..cluster() }.step(&SHAPE, &[placed(&[1, 1], &[&[0], &[1]])]);
        assert!((step.experts - 1200.0).abs() < 1e-9, "8 rows · 150 are more than 600");
    }

    #[test]
    fn stages_share_the_work_and_wait_for_each_other() {
        let cluster = Cluster { micro_batches: 6.0, ..cluster() };
        let step = StepTime { dense: 12.0, optimizer: 4.0, ..StepTime::default() };
        assert!((cluster.seconds_in_stages(&step, 1) - step.seconds()).abs() < 1e-9);
        // A quarter each, and three of nine slots without work.
        assert!((cluster.seconds_in_stages(&step, 4) - (3.0 * 1.5 + 1.0)).abs() < 1e-9);
    }

    #[test]
    fn rows_travel_twice_in_each_direction() {
        let device = DeviceSpeed { link_bandwidth: 2.0, ..cluster().device };
        let shape = ModelShape { row_bytes: 3.0, ..SHAPE };
        let step = Cluster { device, ..cluster() }.step(&shape, &[placed(&[3, 1], &[&[0], &[1]])]);
        // 12 of 16 rows in the busy group, half of them from its own device: 4 · 12 · 3 / 2 / 2.
        assert!((step.exchange - 36.0).abs() < 1e-9, "{step:?}");
    }

    #[test]
    fn pruning_and_rearranging_are_told_apart() {
        let loads = [LayerLoad::new(vec![1, 40, 2, 38, 30, 3, 29, 1])];
        let limits = PruneLimits { beta: 0.06.into(), multiple_of: 2, ..PruneLimits::default() };
        let plan = PrunePlan::new(&loads, &limits, ExpertLayout { top_k: 2, groups: 2 }).unwrap();
        assert_eq!(plan.layers[0].pruned, [0, 2, 5, 7]);
        let time = |layer: PlacedLayer| cluster().step(&SHAPE, &[layer]).seconds();
        let layer = &plan.layers[0];
        let (before, pruned, rearranged) = (
            time(PlacedLayer::before(layer)),
            time(PlacedLayer::pruned(layer)),
            time(PlacedLayer::rearranged(layer)),
        );
        // Old order: 81 of 144 rows in the busiest group; kept in old order: 78 of 137; rearranged:
        // 69 of 137.
        let expected = |share: f64| 1200.0 + 3.0 * 50.0 * 16.0 * share;
        assert!((before - expected(81.0 / 144.0)).abs() < 1e-9);
        assert!((pruned - expected(78.0 / 137.0)).abs() < 1e-9);
        assert!((rearranged - expected(69.0 / 137.0)).abs() < 1e-9, "{:?}", layer.groups);
    }
}
