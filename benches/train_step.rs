//! One training step of a configuration, forward to update, in tokens per second.
//!
//!     cargo bench --bench train_step                       # the toy: 8 rows of 256 tokens
//!     YUAN_BENCH_CONFIG=config.json cargo bench --bench train_step
//!
//! `scripts/compare_with_torch.sh` runs the PyTorch program of the same step beside it.

use std::path::Path;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use yuan::{
    model::{YuanConfig, YuanModel, named},
    train::{TrainConfig, Trainer, data::RowStream},
};

/// Every step allocates and frees the same large tensors, which glibc returns to the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn train_step(c: &mut Criterion) {
    let model = match std::env::var_os("YUAN_BENCH_CONFIG") {
        Some(path) => YuanConfig::load(Path::new(&path)).expect("YUAN_BENCH_CONFIG is a model configuration"),
        None => YuanConfig::toy(4096),
    };
    let (batch_size, seq_len) = (number("YUAN_BENCH_BATCH", 8), number("YUAN_BENCH_SEQ", 256));
    let device = yuan::device(&std::env::var("YUAN_DEVICE").unwrap_or_else(|_| "flex".into()))
        .expect("YUAN_DEVICE is a device of this build")
        .autodiff();
    let config =
        TrainConfig { batch_size, seq_len, steps: 1 << 20, learning_rate: 3e-4, ..TrainConfig::default() };
    // Random tokens, as the PyTorch program has.
    let mut state = 1_u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % model.vocab_size as u64) as u32
    };
    let tokens: Vec<u32> = (0..256 * (seq_len + 1)).map(|_| token()).collect();
    let rows = || RowStream::new(tokens.clone(), u32::MAX, seq_len, Some(0)).expect("enough tokens");
    device.seed(0);
    let weights = named::initialized(YuanModel::new(&model, &device).expect("a valid model"));
    let run_dir = std::env::temp_dir();
    let mut trainer =
        Trainer::new(config.clone(), &run_dir, &device, weights, [rows(), rows()]).expect("valid settings");

    let mut group = c.benchmark_group("train_step");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(config.tokens_per_step() as u64));
    let id = BenchmarkId::from_parameter(format!("{batch_size} x {seq_len} tokens"));
    group.bench_function(id, |b| b.iter(|| trainer.train_step().expect("a finite step")));
    group.finish();
}

criterion_group!(benches, train_step);
criterion_main!(benches);
