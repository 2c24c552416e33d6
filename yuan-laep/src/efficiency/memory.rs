//! What every rank would hold: a calculation of memory, for clusters that are not there.
//!
//! A model is cut into `stages` of neighbouring layers (pipeline parallelism, which is in this
//! calculation and not in the library), each spread over `data` rows of `expert` ranks. A rank holds
//!
//! - parameters in f32: all that is no expert's of its stage, and its experts;
//! - AdamW's two moments in f32 of the part that it updates (ZeRO-1): dense parameters are cut over all
//!   ranks of the stage, experts over the rows;
//! - gradients in f32 of that part, of the layer that is differentiated, and of two layers whose sums
//!   are on their way;
//! - activations of the passes that are not finished: of every layer, or, with recomputation, the input
//!   of every layer and one layer whole;
//! - while parameters are updated, the new values beside the old ones.
//!
//! Assumed: bf16 activations, layers cut into stages as evenly as their number allows, the embedding on
//! the first stage and the head on the last one, and as many micro-batches on their way in the first
//! stage as there are stages (one forward, one backward). What the runtime itself takes, some GB of a
//! GPU, is not in it.

use serde::{Deserialize, Serialize};

/// A mixture-of-experts model, as far as memory depends on it. Numbers of parameters, and of values
/// that are kept for the backward pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemoryShape {
    /// Parameters of a layer that are no expert's.
    pub dense_per_layer: f64,
    /// Parameters of the embedding.
    pub embedding: f64,
    /// Parameters of the head.
    pub head: f64,
    /// Parameters of one expert.
    pub expert: f64,
    /// Experts of every layer.
    pub experts_per_layer: Vec<usize>,
    /// Values of a token that a layer keeps outside its experts.
    pub kept_per_token: f64,
    /// Values that a row keeps in an expert.
    pub kept_per_row: f64,
    /// Experts that each token visits.
    pub top_k: usize,
    /// Values of a token between two layers.
    pub hidden: f64,
    /// Bytes that the head and the loss take at once.
    pub head_bytes: f64,
}

/// How a model is spread over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spread {
    /// Parts of neighbouring layers, one after the other.
    pub stages: usize,
    /// Copies of every expert.
    pub data: usize,
    /// Ranks that share the experts of a layer.
    pub expert: usize,
}

impl Spread {
    /// Ranks of all stages.
    pub fn ranks(&self) -> usize {
        self.stages * self.data * self.expert
    }
}

/// What a rank computes of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RankWork {
    /// Tokens.
    pub tokens: f64,
    /// Rows of the busiest rank of a layer over the mean.
    pub busiest: f64,
    /// Whether layers are computed again for their gradients.
    pub recompute: bool,
}

/// Bytes of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RankMemory {
    /// Parameters, f32.
    pub parameters: f64,
    /// AdamW's moments, f32.
    pub moments: f64,
    /// Gradients, f32.
    pub gradients: f64,
    /// What the forward pass keeps for the backward pass.
    pub activations: f64,
    /// New values of parameters beside the old ones.
    pub update: f64,
}

impl RankMemory {
    /// The most that is held at once: gradients with activations, or with new values.
    pub fn peak(&self) -> f64 {
        let Self { parameters, moments, gradients, activations, update } = self;
        parameters + moments + gradients + activations.max(*update)
    }
}

const F32: f64 = 4.0;
const BF16: f64 = 2.0;

impl MemoryShape {
    /// Parameters of the model.
    pub fn parameters(&self) -> f64 {
        let layers = self.experts_per_layer.len() as f64;
        let experts = self.experts_per_layer.iter().sum::<usize>() as f64;
        self.embedding + self.head + layers * self.dense_per_layer + experts * self.expert
    }

    /// What a rank of the fullest stage holds.
    pub fn fullest_rank(&self, spread: Spread, work: RankWork) -> RankMemory {
        let stages = (0..spread.stages).map(|stage| self.rank_of_stage(stage, spread, work));
        let fuller = |a: RankMemory, b: RankMemory| if b.peak() > a.peak() { b } else { a };
        stages.reduce(fuller).unwrap_or_default()
    }

    fn rank_of_stage(&self, stage: usize, spread: Spread, work: RankWork) -> RankMemory {
        let layers = self.experts_per_layer.len();
        let first = |stage: usize| stage * layers / spread.stages;
        let experts = &self.experts_per_layer[first(stage)..first(stage + 1)];
        let held_of = |experts: usize| experts.div_ceil(spread.expert) as f64 * self.expert;
        let held: f64 = experts.iter().map(|&experts| held_of(experts)).sum();
        let is_last = stage + 1 == spread.stages;
        let mut dense = experts.len() as f64 * self.dense_per_layer;
        dense += if stage == 0 { self.embedding } else { 0.0 };
        dense += if is_last { self.head } else { 0.0 };
        let (rows, all) = (spread.data as f64, (spread.data * spread.expert) as f64);
        let own = held / rows + dense / all;
        let layer = experts.iter().map(|&experts| held_of(experts)).fold(0.0, f64::max)
            + self.dense_per_layer;
        let is_alone = spread.data * spread.expert == 1;
        let values = self.kept_per_token + self.top_k as f64 * self.kept_per_row * work.busiest;
        let of_layer = BF16 * values * work.tokens;
        let of_layers = match work.recompute {
            false => experts.len() as f64 * of_layer,
            true => experts.len() as f64 * BF16 * self.hidden * work.tokens,
        };
        let on_their_way = (spread.stages - stage) as f64;
        RankMemory {
            parameters: F32 * (dense + held),
            moments: 2.0 * F32 * own,
            gradients: F32 * if is_alone { own } else { own + 3.0 * layer },
            activations: on_their_way * of_layers
                + if work.recompute { of_layer } else { 0.0 }
                + if is_last { self.head_bytes } else { 0.0 },
            // On one rank values are updated where they are.
            update: F32 * if is_alone { 0.0 } else { dense + held },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `benches/configs/gpu-2b.json`.
    fn two_billion() -> MemoryShape {
        MemoryShape {
            dense_per_layer: 4.0 * 2048.0 * 1024.0 + 2.0 * 1024.0 * 1024.0,
            embedding: 32768.0 * 1024.0,
            head: 32768.0 * 1024.0,
            expert: 3.0 * 1024.0 * 2048.0,
            experts_per_layer: vec![32; 12],
            kept_per_token: 5.0 * 1024.0 + 4.0 * 2048.0,
            kept_per_row: 2.0 * 1024.0 + 3.0 * 2048.0,
            top_k: 2,
            hidden: 1024.0,
            head_bytes: 0.0,
        }
    }

    #[test]
    fn one_rank_holds_sixteen_bytes_a_parameter_and_ranks_what_zero_1_predicts() {
        let (shape, alone) = (two_billion(), Spread { stages: 1, data: 1, expert: 1 });
        let work = RankWork { tokens: 0.0, busiest: 1.0, recompute: false };
        let memory = shape.fullest_rank(alone, work);
        assert!((memory.peak() / shape.parameters() - 16.0).abs() < 1e-9);
        // 4 (D + E / expert) and 8 (D + E) / ranks (Rajbhandari et al. 2020).
        let experts = 12.0 * 32.0 * shape.expert;
        let dense = shape.parameters() - experts;
        for (data, expert) in [(1, 4), (2, 2), (4, 1)] {
            let memory = shape.fullest_rank(Spread { stages: 1, data, expert }, work);
            let held = dense + experts / expert as f64;
            assert!((memory.parameters / (4.0 * held) - 1.0).abs() < 1e-9);
            assert!((memory.moments / (8.0 * (dense + experts) / 4.0) - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn stages_hold_their_layers_and_keep_what_is_on_its_way() {
        let shape = two_billion();
        let work = RankWork { tokens: 1000.0, busiest: 1.0, recompute: false };
        let one = shape.fullest_rank(Spread { stages: 1, data: 2, expert: 2 }, work);
        let four = shape.fullest_rank(Spread { stages: 4, data: 2, expert: 2 }, work);
        assert!(four.parameters < 0.3 * one.parameters);
        // A quarter of the layers, of four micro-batches.
        assert!((four.activations / one.activations - 1.0).abs() < 1e-9);
        let again = shape.fullest_rank(
            Spread { stages: 4, data: 2, expert: 2 },
            RankWork { recompute: true, ..work },
        );
        assert!(again.activations < 0.2 * four.activations);
    }

    /// `train_step` on H100s, 2,048 tokens a row, bf16 (docs/performance.md): GiB that the GPU had
    /// reserved at most.
    #[test]
    fn what_was_measured_is_within_an_eighth() {
        let shape = MemoryShape { head_bytes: 2048.0 * 32768.0 * 10.0, ..two_billion() };
        for (data, expert, rows, recompute, measured) in [
            (1, 1, 8.0, false, 49.81),
            (1, 1, 16.0, false, 60.78),
            (1, 1, 8.0, true, 41.29),
            (1, 4, 16.0, false, 36.04),
            (2, 2, 16.0, false, 40.05),
            (4, 1, 16.0, false, 46.05),
        ] {
            let work = RankWork { tokens: rows * 2048.0, busiest: 1.0, recompute };
            let spread = Spread { stages: 1, data, expert };
            let gib = shape.fullest_rank(spread, work).peak() / f64::from(1 << 30);
            assert!((gib / measured - 1.0).abs() < 0.125, "{spread:?}: {gib:.2}, {measured}");
        }
    }
}
