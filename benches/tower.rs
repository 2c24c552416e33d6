//! The image tower alone, InternViT-300M as Yuan3.0 has it: its tokens, and its gradients.
//!
//!     cargo bench --bench tower --features cuda -- --device cuda --precision bf16
//!
//! `benches/peers/torch_tower.py` does the same in PyTorch.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::Parser;
use serde_json::json;
use yuan::{
    burn::{
        module::Module,
        tensor::{Distribution, FloatDType, Tensor},
    },
    model::{
        named, ops,
        vision::{VisionConfig, VisionTower},
    },
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Time the image tower on random tiles and print one line of JSON.
#[derive(Parser)]
struct Arguments {
    /// Where to compute
    #[arg(long, default_value = "flex")]
    device: String,
    /// f32 or bf16
    #[arg(long, default_value = "f32")]
    precision: String,
    /// Tiles of 448 × 448 pixels at a time
    #[arg(long, default_value_t = 8)]
    tiles: usize,
    /// Blocks of the tower, of its 24
    #[arg(long, default_value_t = 24)]
    blocks: usize,
    /// Passes that count
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// No fast versions: every operation as Burn computes it
    #[arg(long)]
    portable: bool,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let dtype = match arguments.precision.as_str() {
        "f32" => FloatDType::F32,
        "bf16" => FloatDType::BF16,
        other => return Err(anyhow!("--precision {other}: expected f32 or bf16")),
    };
    ops::set_fast_paths(!arguments.portable);
    let device = yuan::device(&arguments.device)?.autodiff();
    let config =
        VisionConfig { num_hidden_layers: arguments.blocks, ..VisionConfig::intern_vit_300m() };
    let tower = named::initialized(VisionTower::new(&config, &device)?);
    let shape = [arguments.tiles, config.num_channels, config.image_size, config.image_size];
    let pixels = Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &device).cast(dtype);
    let inner = tower.valid();
    let still = pixels.clone().inner();
    let forward = timed(arguments.steps, || {
        let tokens = inner.forward(still.clone());
        drop(tokens.slice_dim(0, 0..1).sum().into_data());
    });
    let both = timed(arguments.steps, || {
        let loss = tower.forward(pixels.clone()).cast(FloatDType::F32).mean();
        let gradients = loss.clone().backward();
        // The gradient of the first operation is the last one to be known.
        let first = tower.class_embedding.grad(&gradients).expect("it learns");
        drop(first.sum().into_data());
    });
    let tiles_per_s = |time: Duration| arguments.tiles as f64 / time.as_secs_f64();
    let line = json!({
        "device": arguments.device,
        "precision": arguments.precision,
        "tiles": arguments.tiles,
        "forward_s": forward.as_secs_f64(),
        "forward_tiles_per_s": tiles_per_s(forward),
        "forward_backward_s": both.as_secs_f64(),
        "forward_backward_tiles_per_s": tiles_per_s(both),
    });
    println!("{line}");
    Ok(())
}

/// The median of some passes, after three that do not count.
fn timed(steps: usize, mut pass: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..steps + 3)
        .map(|_| {
            let started = Instant::now();
            pass();
            started.elapsed()
        })
        .skip(3)
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}
