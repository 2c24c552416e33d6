//! Greedy decoding of the toy with a cache: tokens per second of the prompt pass and of the steps
//! after it.
//!
//!     cargo bench --bench decode
//!
//! `scripts/compare_decode.sh` runs Hugging Face's Mixtral of the same shape beside it.
//! `YUAN_BENCH_PROMPT`, `YUAN_BENCH_NEW`, `YUAN_BENCH_BATCH` and `YUAN_DEVICE` change what is run.
//! With `YUAN_BENCH_ANSWERS` it draws so many answers to each prompt and tells their tokens per
//! second, the pass over the prompts included; `scripts/compare_rollout.sh` has the same of
//! `transformers`.

use std::{ops::ControlFlow, time::Instant};

use serde_json::json;
use yuan::model::{GenerationOptions, YuanConfig, YuanModel, generate::Sampling, named};

/// Every token allocates and frees the same tensors, which glibc returns to the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const REPEATS: usize = 3;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn main() {
    let config = match std::env::var_os("YUAN_BENCH_CONFIG") {
        Some(path) => {
            YuanConfig::load(path.as_ref()).expect("YUAN_BENCH_CONFIG is a model configuration")
        }
        None => YuanConfig::toy(4096),
    };
    let [prompt, new, batch] =
        [("YUAN_BENCH_PROMPT", 128), ("YUAN_BENCH_NEW", 128), ("YUAN_BENCH_BATCH", 1)]
            .map(|(name, default)| number(name, default));
    let device = yuan::device(&std::env::var("YUAN_DEVICE").unwrap_or_else(|_| "flex".into()))
        .expect("YUAN_DEVICE is a device of this build");
    device.seed(0);
    let model = named::initialized(YuanModel::new(&config, &device).expect("a valid model"));
    let token = |i: usize| (i * 2_654_435_761 % config.vocab_size) as u32;
    let prompts: Vec<Vec<u32>> =
        (0..batch).map(|row| (0..prompt).map(|i| token(row * prompt + i)).collect()).collect();
    let answers = number("YUAN_BENCH_ANSWERS", 0);
    if answers > 0 {
        println!("{}", rollouts(&model, &prompts, answers, new));
        return;
    }
    let run = |max_new_tokens: usize| {
        let options = GenerationOptions { max_new_tokens, ..GenerationOptions::default() };
        let (start, mut first) = (Instant::now(), None);
        let generated = model.generate(&prompts, &options, |_| {
            first.get_or_insert_with(Instant::now);
            ControlFlow::Continue(())
        });
        generated.expect("finite scores");
        let first = first.expect("at least one token");
        [first.duration_since(start), first.elapsed()].map(|time| time.as_secs_f64())
    };
    run(8); // warm-up
    let (mut reading, mut steps): (Vec<f64>, Vec<f64>) =
        (0..REPEATS).map(|_| run(new)).map(|[a, b]| (a, b)).unzip();
    let result = json!({
        "ours": concat!("yuan-rs ", env!("CARGO_PKG_VERSION")),
        "prompt_tokens_per_s": (batch * prompt) as f64 / median(&mut reading),
        "decode_tokens_per_s": (batch * (new - 1)) as f64 / median(&mut steps),
        "parameters": config.parameter_count().total(),
    });
    println!("{result}");
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Answers that are drawn by the model's own probabilities.
fn rollouts(
    model: &YuanModel,
    prompts: &[Vec<u32>],
    answers: usize,
    new: usize,
) -> serde_json::Value {
    let run = |max_new_tokens: usize| {
        let sampling = Sampling::unchanged();
        let options = GenerationOptions { max_new_tokens, sampling, ..Default::default() };
        let start = Instant::now();
        let rollout = model.rollout(prompts, answers, &options, |_, _| ControlFlow::Continue(()));
        let rollout = rollout.expect("finite scores");
        let tokens: usize = rollout.answers.iter().map(|answer| answer.tokens.len()).sum();
        assert_eq!(tokens, prompts.len() * answers * max_new_tokens);
        start.elapsed().as_secs_f64()
    };
    run(8); // warm-up
    let mut times: Vec<f64> = (0..REPEATS).map(|_| run(new)).collect();
    let tokens = prompts.len() * answers * new;
    json!({"rollout_tokens_per_s": tokens as f64 / median(&mut times)})
}
