//! Teach a small model to stop thinking when it has the answer: reinforcement learning with RIRM.
//!
//!     cargo run --release --example reason
//!
//! The model first learns from worked sums, of which some contain a mistake and most check their
//! result up to four times. Then it learns from rewards, twice from the same weights: once for right
//! answers alone, and once by RIRM, which also pays for stopping at the first answer. A picture
//! shows both.
//!
//! Arguments: the steps of the reinforcement learning (120), how many seeds it is run with (1), and
//! the steps of learning from worked sums (600).

use std::{env, error::Error, fs, path::Path};

use yuan::{
    data::Document,
    prelude::*,
    report::{History, pictures},
    rl::{self, Arithmetic, RewardRule, RlConfig, RlSettings, Scheme, TaskKind},
    train::{Claim, Display, ModelDirectory, Schedule},
};

/// Every step allocates and frees the same large tensors, which the system's allocator returns to
/// the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Where the picture goes.
const PICTURE: &str = "runs/reason.svg";

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let steps = arguments.next().map_or(Ok(120), |steps| steps.parse())?;
    let seeds = arguments.next().map_or(Ok(1), |seeds| seeds.parse::<u64>())?;
    let base_steps = arguments.next().map_or(Ok(600), |steps| steps.parse())?;
    let base = learn_examples(base_steps)?;
    let mut histories = [Vec::new(), Vec::new()];
    for seed in 0..seeds {
        for (scheme, histories) in [Scheme::Outcome, Scheme::Rirm].into_iter().zip(&mut histories) {
            println!("\n{scheme:?}, seed {seed}");
            histories.push(reinforce(&base, scheme, steps, seed)?);
        }
    }
    println!("\n{:12}{:>6}{:>14}{:>14}", "reward", "seed", "right", "tokens");
    for (name, histories) in ["outcome", "RIRM"].iter().zip(&histories) {
        for (seed, history) in histories.iter().enumerate() {
            let measured: Vec<_> = history.rollouts(true).collect();
            let [Some(first), Some(last)] = [measured.first(), measured.last()] else { continue };
            println!(
                "{name:12}{seed:>6}{:>5.1} → {:>4.1} %{:>5.1} → {:>4.1}",
                100.0 * first.right,
                100.0 * last.right,
                first.tokens,
                last.tokens
            );
        }
    }
    let [outcome, rirm] = &histories;
    let groups = [("right or wrong", outcome), ("RIRM", rirm)]
        .map(|(name, runs)| pictures::SeedRuns { name, runs: runs.iter().collect() });
    if let Some(picture) = pictures::rollouts(&groups)? {
        fs::write(PICTURE, picture)?;
        println!("\nThe picture is {PICTURE}");
    }
    Ok(())
}

fn no_laep() -> LaepConfig {
    LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() }
}

/// A model of 1.7 M parameters that has learnt from worked sums.
fn learn_examples(steps: u64) -> Result<Run, Box<dyn Error>> {
    let document = |(number, [prompt, answer]): (usize, [String; 2])| Document {
        name: format!("sum-{number}"),
        text: prompt + &answer,
    };
    let examples = Arithmetic::examples(20_000, 0).into_iter();
    let documents: Vec<Document> = examples.enumerate().map(document).collect();
    let model = YuanConfig {
        hidden_size: 128,
        attention_projection_size: 256,
        expert_hidden_size: 128,
        experts_per_layer: vec![8; 3],
        // The tokens are bytes.
        ..YuanConfig::toy(257)
    };
    let config = TrainConfig {
        steps,
        warmup_steps: steps / 30,
        learning_rate: 2e-3,
        min_learning_rate: 2e-4,
        validate_every: Some(200),
        checkpoint_every: None,
        laep: no_laep(),
        ..TrainConfig::default()
    };
    let new = NewRun::new(config, model, documents).with_isolated_documents();
    let run = Run::create_in(Claim::first_free(Path::new("runs/reason-base"))?, new)?;
    let device = yuan::device("flex")?;
    run.trainer(&device.autodiff())?.with_callback(Display::new(100))?.run()?;
    Ok(run)
}

/// Learns from rewards, from the weights of another run.
fn reinforce(base: &Run, scheme: Scheme, steps: u64, seed: u64) -> Result<History, Box<dyn Error>> {
    let rollouts = RlConfig { max_new_tokens: 120, ..RlConfig::default() };
    let batch_size = 32;
    let config = TrainConfig {
        steps,
        batch_size,
        accumulation: rollouts.rows_per_step() / batch_size,
        seq_len: 128,
        learning_rate: 2e-4,
        schedule: Schedule::Constant,
        warmup_steps: 0,
        validate_every: None,
        checkpoint_every: None,
        seed,
        laep: no_laep(),
        ..TrainConfig::default()
    };
    let settings = RlSettings {
        task: TaskKind::Arithmetic,
        reward: RewardRule { scheme, ..RewardRule::default() },
        rollouts,
    };
    let directory = format!("runs/reason-{scheme:?}").to_lowercase();
    let claim = Claim::first_free(Path::new(&directory))?;
    let run = settings.create(claim, ModelDirectory::open(base.directory())?, config, None)?;
    let device = yuan::device("flex")?;
    rl::trainer(&run, &device.autodiff())?.with_callback(Display::new(20))?.run()?;
    Report::of(run.directory())?.save()?;
    Ok(History::read(run.directory())?)
}
