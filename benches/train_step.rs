//! One training step of a configuration, forward to update: the same measurement as
//! `torch_yuan.py`'s, in the same words.
//!
//!     cargo bench --bench train_step                                        # the toy, 8 rows of 256 tokens
//!     cargo bench --bench train_step --features cuda -- CONFIG.json --device cuda --seq 2048 --precision bf16
//!
//! `scripts/compare_with_torch.sh` and `scripts/gpu.sh` run the PyTorch program beside it.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use clap::Parser;
use serde_json::{Value, json};
use yuan::{
    burn::tensor::Device,
    laep::{ExpertLayout, LayerLoad, LayerPlan, PruneLimits, PrunePlan, efficiency::PlacedLayer},
    model::{
        PrunableExperts, YuanConfig, YuanModel, named, ops,
        ranks::{Grid, Meeting, Ranks, connect},
    },
    train::{LanguageModel, SpeedModel, StepOutcome, TrainConfig, Trainer, data::RowStream},
};

/// Every step allocates and frees the same large tensors, which glibc returns to the system each
/// time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Time training steps on random tokens and print one line of JSON.
#[derive(Parser)]
struct Arguments {
    /// A model's config.json; absent: the toy of 29.9 M parameters
    config: Option<PathBuf>,
    /// Where to compute; under torchrun, the devices of its processes on this machine
    #[arg(long, default_value = "flex", value_delimiter = ',')]
    device: Vec<String>,
    /// Of several processes: rows that each hold all experts
    #[arg(long, default_value_t = 1)]
    data_parallel: usize,
    /// Measure again after pruning experts that carry this share of the load, and after rearranging
    /// the rest
    #[arg(long, value_name = "BETA")]
    prune: Option<f64>,
    /// Rows of a step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Steps that count
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Steps before them
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// f32 or bf16
    #[arg(long, default_value = "f32")]
    precision: String,
    /// Lowers the routers' bias from the first expert to the last by so much: unequal loads
    #[arg(long, default_value_t = 0.0)]
    skew: f32,
    /// Compute each layer again for its gradients
    #[arg(long)]
    recompute: bool,
    /// No fast versions: every operation as Burn computes it
    #[arg(long)]
    portable: bool,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    run(&Arguments::parse())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ops::set_fast_paths(!arguments.portable);
    let mut model = match &arguments.config {
        Some(path) => YuanConfig::load(path)?,
        None => YuanConfig::toy(4096),
    };
    model.router_selection_bias |= arguments.skew != 0.0;
    // Under torchrun every process is a rank with a device of its own.
    let meeting = Meeting::of_environment(Duration::from_secs(600))?;
    let ranks = match &meeting {
        Some(meeting) => Some(Ranks::new(connect(meeting)?, arguments.data_parallel)?),
        None => None,
    };
    let place = meeting.as_ref().map_or(0, |meeting| meeting.local_rank);
    let device = yuan::device(&arguments.device[place % arguments.device.len()])?.autodiff();
    let config = TrainConfig {
        batch_size: arguments.batch,
        seq_len: arguments.seq,
        steps: 1 << 20,
        learning_rate: 3e-4,
        precision: arguments.precision.parse().map_err(|what| anyhow!("--precision is {what}"))?,
        recompute: arguments.recompute,
        ..TrainConfig::default()
    };
    let tokens = random_tokens(model.vocab_size, 256 * (arguments.seq + 1));
    let rows = || RowStream::new(tokens.clone(), u32::MAX, arguments.seq, Some(0));
    let streams = [rows()?, rows()?];
    device.seed(0);
    let started = Instant::now();
    let home = if ranks.is_some() { device.clone().inner() } else { device.clone() };
    let mut weights = named::initialized(YuanModel::new(&model, &home)?);
    if arguments.skew != 0.0 {
        let falling = |experts: usize| {
            (0..experts).map(|e| -arguments.skew * e as f32 / (experts - 1).max(1) as f32).collect()
        };
        let shifts: Vec<Vec<f32>> =
            model.experts_per_layer.iter().map(|&experts| falling(experts)).collect();
        weights = weights.shift_selection_bias(&shifts);
    }
    let run_dir = std::env::temp_dir();
    if let Some(ranks) = &ranks {
        weights = YuanModel::part_of(&weights, ranks, &device)?;
    }
    let trainer = Trainer::new(config.clone(), &run_dir, &device, weights, streams)?;
    Bench { arguments, model: &model, device: &device, ranks, config: &config, started }
        .stages(trainer)
}

struct Bench<'a> {
    arguments: &'a Arguments,
    model: &'a YuanConfig,
    device: &'a Device,
    ranks: Option<Ranks>,
    config: &'a TrainConfig,
    started: Instant,
}

impl Bench<'_> {
    /// Measures the model as it is and, if asked, after a prune and after the rearrangement that
    /// belongs to it.
    fn stages<M: LanguageModel + PrunableExperts>(
        &self,
        mut trainer: Trainer<M>,
    ) -> anyhow::Result<()> {
        let loads = self.measure(&mut trainer, "base", json!({}))?;
        let Some(beta) = self.arguments.prune else { return Ok(()) };
        let groups = self.grid().expert();
        let limits =
            PruneLimits { beta: beta.into(), multiple_of: groups, ..PruneLimits::default() };
        let plan = PrunePlan::new(
            &loads,
            &limits,
            ExpertLayout { top_k: trainer.model().top_k(), groups },
        )?;
        let in_old_order = |layer: &LayerPlan| {
            let mut kept = layer.kept.clone();
            kept.sort_unstable();
            kept
        };
        let kept: Vec<Vec<usize>> = plan.layers.iter().map(in_old_order).collect();
        let speed =
            SpeedModel::measure(self.model, self.device, self.ranks.as_ref(), self.config.work())?;
        let seconds = |placed| speed.seconds(&plan, placed);
        let base = seconds(PlacedLayer::before);
        let facts = |moved: u64, placed: fn(&LayerPlan) -> PlacedLayer| {
            json!({
                "experts": plan.experts_per_layer(),
                "pruned_load": round(plan.pruned_load_fraction(), 4),
                "mb_moved": round(moved as f64 / 1e6, 1),
                "predicted_gain": round(base / seconds(placed), 3),
                "predicted_s": [round(base, 4), round(seconds(placed), 4)],
                "speed": speed.cluster.device,
            })
        };
        let moved = trainer.cut(|model| model.keep_experts(&kept))?;
        self.measure(&mut trainer, "pruned", facts(moved, PlacedLayer::pruned))?;
        if groups == 1 {
            return Ok(());
        }
        let order = |(layer, kept): (&LayerPlan, &Vec<usize>)| {
            let place =
                |expert: &usize| kept.iter().position(|old| old == expert).unwrap_or_default();
            layer.kept.iter().map(place).collect()
        };
        let order: Vec<Vec<usize>> = plan.layers.iter().zip(&kept).map(order).collect();
        let moved = trainer.cut(|model| model.keep_experts(&order))?;
        self.measure(&mut trainer, "pruned and rearranged", facts(moved, PlacedLayer::rearranged))
            .map(drop)
    }

    fn grid(&self) -> Grid {
        self.ranks.as_ref().map_or(Grid::ONE, Ranks::grid)
    }

    /// Takes steps, prints their line and returns the loads of the last.
    fn measure<M: LanguageModel + PrunableExperts>(
        &self,
        trainer: &mut Trainer<M>,
        stage: &str,
        facts: Value,
    ) -> anyhow::Result<Vec<LayerLoad>> {
        let arguments = self.arguments;
        let (mut times, mut first, mut last, mut peak) = (Vec::new(), None, None, 0);
        let (mut busiest, mut busiest_device) = (0.0_f64, Vec::new());
        for step in 0..arguments.warmup + arguments.steps {
            let metrics = match trainer.train_step()? {
                StepOutcome::Taken(metrics) => metrics,
                StepOutcome::NotFinite(found) => bail!("the {} is {}", found.what, found.value),
            };
            first.get_or_insert_with(|| self.started.elapsed().as_secs_f64());
            if step >= arguments.warmup {
                times.push(metrics.seconds);
                busiest = metrics.max_over_mean.iter().copied().fold(busiest, f64::max);
                busiest_device.extend(metrics.device_max_over_mean.iter().copied());
            }
            last = Some(metrics);
            let used = self.device.memory_pool_usage().map_or(0, |usage| usage.bytes_reserved);
            peak = used.max(peak);
        }
        let last = last.context("no step was taken")?;
        times.sort_by(f64::total_cmp);
        let (median, tokens) = (times[times.len() / 2], self.config.tokens_per_step());
        let (layers, width) = (self.model.num_layers(), self.model.attention_projection_size);
        let active = active_parameters(self.model);
        let flops = 6.0 * active as f64 * tokens as f64
            + 6.0 * (layers * width * arguments.seq * tokens) as f64;
        let gib = |bytes: u64| round(bytes as f64 / f64::from(1 << 30), 2);
        let ranks = self.ranks.as_ref();
        let grid = self.grid();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let mut line = json!({
            "stage": stage,
            "device": arguments.device.join(","),
            "ranks": ranks.map(|_| grid.size()),
            "data_parallel": grid.data(),
            "precision": arguments.precision,
            "portable": arguments.portable,
            "recompute": arguments.recompute,
            "skew": arguments.skew,
            "busiest_over_mean": round(busiest, 2),
            "total_params": trainer.model().num_parameters(),
            "active_params": active,
            "tokens_per_step": tokens,
            "first_step_s": first.map(|seconds| round(seconds, 2)),
            "median_step_s": round(median, 5),
            "min_step_s": round(times[0], 5),
            "tokens_per_s": round(tokens as f64 / median, 1),
            "tflops_per_device": round(flops / median / 1e12 / grid.size() as f64, 3),
            "device_gib": gib(peak),
            "host_gib": yuan::train::peak_resident().map(gib),
            "last_loss": round(last.loss, 4),
        });
        if let (Some(line), Value::Object(facts)) = (line.as_object_mut(), facts) {
            if !busiest_device.is_empty() {
                line.insert("device_max_over_mean".into(), json!(round(mean(&busiest_device), 3)));
            }
            line.extend(facts);
        }
        if ranks.is_none_or(|ranks| ranks.world().is_first()) {
            println!("{line}");
        }
        Ok(last.loads)
    }
}

/// Parameters that a token meets in a product, counted as the peer counts them.
fn active_parameters(model: &YuanConfig) -> usize {
    let (hidden, width, ffn) =
        (model.hidden_size, model.attention_projection_size, model.expert_hidden_size);
    let layer = 4 * width * hidden + 2 * hidden * hidden + 3 * model.top_k * hidden * ffn;
    model.num_layers() * layer + hidden * model.vocab_size
}

/// Random tokens, as the PyTorch program has.
fn random_tokens(vocab_size: usize, count: usize) -> Vec<u32> {
    let mut state = 1_u64;
    let mut token = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab_size as u64) as u32
    };
    (0..count).map(|_| token()).collect()
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}
