//! What images cost: pages a second from files to normalised tiles on all cores, and a training step of
//! the toy with an image tower before it. `benches/peers/torch_pages.py` does the same with Pillow and
//! PyTorch; `scripts/compare_pages.sh` runs both in turn.
//!
//!     cargo bench --bench pages -- DIR        # writes the pages into DIR if they are not there

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context;
use image::{Rgb, RgbImage};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rayon::prelude::*;
use serde_json::json;
use yuan::{
    burn::tensor::{Device, FloatDType, Int, Tensor, TensorData},
    model::{
        Batch, BatchImages, YuanConfig, YuanModel, named,
        vision::{ImageConfig, Picture, VisionConfig, pixels_of},
    },
    train::{AdamW, AdamWConfig, LanguageModel, LossOptions},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pages, half of them PNG and half JPEG, in the size of A4 at 150 dots an inch.
const PAGES: usize = 32;
const PAGE: [u32; 2] = [1240, 1754];
const ROWS: usize = 8;
const TOKENS: usize = 256;
const TILES_PER_ROW: usize = 2;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(directory) = arguments.next() else {
        println!("usage: cargo bench --bench pages -- DIR [STEPS]");
        return Ok(());
    };
    let steps = arguments.next().map_or(Ok(10), |steps| steps.parse())?;
    let pages = write_pages(Path::new(&directory))?;
    let (pages_per_s, tiles) = preprocess(&pages)?;
    let step = median(training_steps(steps)?);
    let line = json!({
        "threads": rayon::current_num_threads(),
        "pages_per_s": pages_per_s,
        "tiles": tiles,
        "median_step_s": step.as_secs_f64(),
        "tokens_per_s": (ROWS * TOKENS) as f64 / step.as_secs_f64(),
    });
    println!("{line}");
    Ok(())
}

/// Pages with lines of what looks like text.
fn write_pages(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    fs::create_dir_all(directory)?;
    let mut rng = StdRng::seed_from_u64(0);
    let mut paths = Vec::new();
    for number in 0..PAGES {
        let ending = if number.is_multiple_of(2) { "png" } else { "jpg" };
        let path = directory.join(format!("{number:02}.{ending}"));
        paths.push(path.clone());
        if path.exists() {
            continue;
        }
        let mut page = RgbImage::from_pixel(PAGE[0], PAGE[1], Rgb([250, 250, 246]));
        for line in 0..60 {
            for column in 0..90 {
                let glyph: u64 = rng.random();
                for bit in (0..64).filter(|bit| glyph >> bit & 1 == 1) {
                    let (x, y) = (80 + column * 12 + bit % 8, 90 + line * 26 + 2 * (bit / 8));
                    page.put_pixel(x, y, Rgb([20, 20, 30]));
                }
            }
        }
        page.save(&path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(paths)
}

/// Pages a second, the best of four passes over them, and tiles of all pages.
fn preprocess(pages: &[PathBuf]) -> anyhow::Result<(f64, usize)> {
    let (mut best, mut tiles) = (Duration::MAX, 0);
    for _ in 0..4 {
        let started = Instant::now();
        let counts: Result<Vec<usize>, _> = pages
            .par_iter()
            .map(|page| {
                let tiles = Picture::open(page)?.tiles(448, 9);
                let normalised: Vec<Vec<f32>> = tiles.iter().map(Picture::normalised).collect();
                Ok::<_, anyhow::Error>(normalised.len())
            })
            .collect();
        tiles = counts?.iter().sum();
        best = best.min(started.elapsed());
    }
    Ok((pages.len() as f64 / best.as_secs_f64(), tiles))
}

/// The toy, and a tower of 5 M parameters: 64 rows a tile of 224 pixels.
fn model() -> YuanConfig {
    let tower = VisionConfig {
        hidden_size: 256,
        intermediate_size: 1024,
        num_hidden_layers: 6,
        num_attention_heads: 8,
        image_size: 224,
        ..VisionConfig::intern_vit_300m()
    };
    let images = ImageConfig { tower, placeholder: 0, max_tiles: 9, positions: None };
    YuanConfig { images: Some(images), ..yuan::toy::model() }
}

fn training_steps(steps: usize) -> anyhow::Result<Vec<Duration>> {
    let device = yuan::device("flex")?.autodiff();
    let mut model = named::initialized(YuanModel::new(&model(), &device)?);
    let mut optimizer = AdamW::new(&AdamWConfig::default());
    let mut rng = StdRng::seed_from_u64(1);
    let mut times = Vec::new();
    for step in 0..steps + 3 {
        let batch = batch(&mut rng, &device);
        let started = Instant::now();
        let (output, gradients) = model.loss_and_gradients(batch, LossOptions::default(), 1.0)?;
        model = optimizer.step(model, gradients, 3e-4, 1.0);
        let loss = output.loss.into_scalar::<f32>();
        anyhow::ensure!(loss.is_finite(), "the loss is {loss}");
        if step >= 3 {
            times.push(started.elapsed());
        }
    }
    Ok(times)
}

/// Rows of random tokens, each with the tiles of an image at its beginning.
fn batch(rng: &mut StdRng, device: &Device) -> Batch {
    let side = 224;
    let mut tile = || {
        let values = (0..side * side * 3).map(|_| rng.random()).collect();
        Picture::new(side, side, values).expect("it has pixels")
    };
    let tiles: Vec<Picture> = (0..ROWS * TILES_PER_ROW).map(|_| tile()).collect();
    let tiles = pixels_of(&tiles, FloatDType::F32, device);
    let rows = TILES_PER_ROW * 64;
    let places = (0..ROWS).flat_map(|row| (1..=rows).map(move |at| row * TOKENS + at)).collect();
    let tensor = |values: &mut dyn FnMut(usize) -> i64| {
        let values: Vec<i64> = (0..ROWS * TOKENS).map(values).collect();
        Tensor::<2, Int>::from_data(TensorData::new(values, [ROWS, TOKENS]), device)
    };
    let ids = tensor(&mut |_| rng.random_range(0..4096));
    let positions = tensor(&mut |at| (at % TOKENS) as i64);
    Batch::new(ids.clone(), ids, positions).with_images(BatchImages { tiles, places })
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
