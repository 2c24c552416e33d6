//! One training step of a configuration, forward to update: the same measurement as `torch_yuan.py`'s, in the same words.
//!
//!     cargo bench --bench train_step                                        # the toy, 8 rows of 256 tokens
//!     cargo bench --bench train_step --features cuda -- CONFIG.json --device cuda --seq 2048 --precision bf16
//!
//! `scripts/compare_with_torch.sh` and `scripts/gpu.sh` run the PyTorch program beside it.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use burn::module::Module;
use clap::Parser;
use serde_json::json;
use yuan::{
    model::{YuanConfig, YuanModel, named, ops},
    train::{Precision, TrainConfig, Trainer, data::RowStream},
};

/// Every step allocates and frees the same large tensors, which glibc returns to the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Time training steps on random tokens and print one line of JSON.
#[derive(Parser)]
struct Arguments {
    /// A model's config.json; absent: the toy of 29.9 M parameters
    config: Option<PathBuf>,
    /// Where to compute
    #[arg(long, default_value = "flex")]
    device: String,
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

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ops::set_fast_paths(!arguments.portable);
    let mut model = match &arguments.config {
        Some(path) => YuanConfig::load(path)?,
        None => YuanConfig::toy(4096),
    };
    model.router_selection_bias |= arguments.skew != 0.0;
    let device = yuan::device(&arguments.device)?.autodiff();
    let config = TrainConfig {
        batch_size: arguments.batch,
        seq_len: arguments.seq,
        steps: 1 << 20,
        learning_rate: 3e-4,
        precision: match arguments.precision.as_str() {
            "f32" => Precision::F32,
            "bf16" => Precision::Bf16,
            other => anyhow::bail!("--precision is f32 or bf16, not {other}"),
        },
        recompute: arguments.recompute,
        ..TrainConfig::default()
    };
    device.seed(0);
    let started = Instant::now();
    let mut weights = named::initialized(YuanModel::new(&model, &device)?);
    if arguments.skew != 0.0 {
        let falling = |experts: usize| {
            (0..experts).map(|e| -arguments.skew * e as f32 / (experts - 1).max(1) as f32).collect()
        };
        let shifts: Vec<Vec<f32>> = model.experts_per_layer.iter().map(|&experts| falling(experts)).collect();
        weights = weights.shift_selection_bias(&shifts);
    }
    let (total, active) = (weights.num_params(), active_parameters(&model));
    let tokens = random_tokens(model.vocab_size, 256 * (arguments.seq + 1));
    let rows = || RowStream::new(tokens.clone(), u32::MAX, arguments.seq, Some(0));
    let (train, valid) = (rows()?, rows()?);
    let run_dir = std::env::temp_dir();
    let mut trainer = Trainer::new(config.clone(), &run_dir, &device, weights, [train, valid])?;

    let (mut times, mut first, mut loss, mut peak) = (Vec::new(), None, 0.0, 0);
    let mut busiest = 0.0_f64;
    for step in 0..arguments.warmup + arguments.steps {
        let metrics = trainer.train_step()?;
        loss = metrics.loss;
        first.get_or_insert_with(|| started.elapsed().as_secs_f64());
        if step >= arguments.warmup {
            times.push(metrics.seconds);
            busiest = metrics.max_over_mean.iter().copied().fold(busiest, f64::max);
        }
        peak = peak.max(device.memory_pool_usage().map_or(0, |usage| usage.bytes_reserved));
    }
    times.sort_by(f64::total_cmp);
    let (median, tokens) = (times[times.len() / 2], config.tokens_per_step());
    let (layers, width) = (model.num_hidden_layers(), model.attention_projection_size);
    let flops = 6.0 * active as f64 * tokens as f64 + 6.0 * (layers * width * arguments.seq * tokens) as f64;
    let line = json!({
        "device": arguments.device,
        "precision": arguments.precision,
        "portable": arguments.portable,
        "recompute": arguments.recompute,
        "skew": arguments.skew,
        "busiest_over_mean": round(busiest, 2),
        "total_params": total,
        "active_params": active,
        "tokens_per_step": tokens,
        "first_step_s": first.map(|seconds| round(seconds, 2)),
        "median_step_s": round(median, 5),
        "min_step_s": round(times[0], 5),
        "tokens_per_s": round(tokens as f64 / median, 1),
        "tflops": round(flops / median / 1e12, 3),
        "device_gib": round(peak as f64 / f64::from(1 << 30), 2),
        "host_gib": yuan::train::memory::peak_resident().map(|bytes| round(bytes as f64 / f64::from(1 << 30), 2)),
        "last_loss": round(loss, 4),
    });
    println!("{line}");
    Ok(())
}

/// Parameters that a token meets in a product, counted as the peer counts them.
fn active_parameters(model: &YuanConfig) -> usize {
    let (hidden, width, ffn) = (model.hidden_size, model.attention_projection_size, model.ffn_hidden_size);
    let layer = 4 * width * hidden + 2 * hidden * hidden + 3 * model.moe_top_k * hidden * ffn;
    model.num_hidden_layers() * layer + hidden * model.vocab_size
}

/// Random tokens, as the PyTorch program has.
fn random_tokens(vocab_size: usize, count: usize) -> Vec<u32> {
    let mut state = 1_u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab_size as u64) as u32
    };
    (0..count).map(|_| token()).collect()
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}
