//! `yuan rl`: reinforcement learning from rewards, with RIRM and RAPO.

use std::{fs, path::PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use yuan::{
    model::{Precision, ranks::Grid},
    prelude::*,
    rl::{
        EntropyScope, Order, Overlong, RapoLoss, RewardRule, RlConfig, RlSettings, Scheme, TaskKind,
    },
    train::{Claim, ModelDirectory, Schedule, check_ranks, check_settings},
};

use crate::{
    console::{Console, WrongOption},
    numbers::{at_least_one, positive},
    pretrain::{self, Devices},
};

/// Options of `yuan rl`.
#[derive(Args)]
#[group(skip)]
#[command(
    after_help = "A line of FILE.jsonl is {\"prompt\": …, \"answer\": …}. An answer of the model is right \
    if what it concludes with is the answer: what follows **Final Answer**, else what \\boxed{} holds, else \
    its last line. About a twentieth of the prompts is held out and measured on. A run that was \
    interrupted goes on with yuan pretrain --resume --run DIR."
)]
pub struct Options {
    /// Model to begin with: a run, or a directory in Hugging Face's layout
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// Prompts with their answers: JSON lines
    #[arg(long, value_name = "FILE", required_unless_present = "task", help_heading = "Task")]
    data: Option<PathBuf>,
    /// Prompts that the program makes itself
    #[arg(long, value_name = "TASK", conflicts_with = "data", help_heading = "Task")]
    task: Option<MadeTask>,
    /// Prompts are turns of a conversation, written by the model's chat template
    #[arg(long, help_heading = "Task")]
    chat: bool,
    /// Tokens that a prompt may have
    #[arg(long, value_name = "TOKENS", default_value_t = 256, help_heading = "Task")]
    #[arg(value_parser = at_least_one::<u64>)]
    prompt_tokens: u64,

    /// What is rewarded: outcome (right or wrong), rirm (as Ultra: stopping pays too), or rirm-flash
    #[arg(long, value_name = "SCHEME", default_value = "rirm", help_heading = "Reward")]
    reward: RewardArgument,
    /// With --reward outcome: answers lose up to 1 in their last so many tokens
    #[arg(long, value_name = "TOKENS", help_heading = "Reward")]
    #[arg(value_parser = at_least_one::<u64>)]
    overlong_buffer: Option<u64>,
    /// Answers that repeat themselves lose 1
    #[arg(long, help_heading = "Reward")]
    repetition_penalty: bool,

    /// Prompts that are answered before the model changes
    #[arg(long, value_name = "PROMPTS", help_heading = "Rollouts")]
    #[arg(default_value_t = RlConfig::default().prompts as u64, value_parser = at_least_one::<u64>)]
    prompts: u64,
    /// Answers to each prompt
    #[arg(long, value_name = "ANSWERS", help_heading = "Rollouts")]
    #[arg(default_value_t = RlConfig::default().answers as u64, value_parser = at_least_one::<u64>)]
    answers: u64,
    /// Tokens of an answer at most
    #[arg(long, value_name = "TOKENS", help_heading = "Rollouts")]
    #[arg(default_value_t = RlConfig::default().max_new_tokens as u64, value_parser = at_least_one::<u64>)]
    max_new_tokens: u64,
    /// Answers that are drawn at the same time, all to one prompt at least; fewer take less memory
    #[arg(long, value_name = "ANSWERS", help_heading = "Rollouts")]
    #[arg(default_value_t = RlConfig::default().at_once as u64, value_parser = at_least_one::<u64>)]
    at_once: u64,
    /// Learn from hard prompts first
    #[arg(long, help_heading = "Rollouts")]
    hard_first: bool,

    /// Optimizer steps
    #[arg(long, value_name = "STEPS", default_value_t = 100, help_heading = "Optimisation")]
    steps: u64,
    /// Prompts of an update
    #[arg(long, value_name = "PROMPTS", help_heading = "Optimisation")]
    #[arg(default_value_t = RlConfig::default().mini_batch as u64, value_parser = at_least_one::<u64>)]
    mini_batch: u64,
    /// Answers of a micro-batch, of which an update has as many as it needs [default: the largest
    /// divisor of its answers up to 32]
    #[arg(long, value_name = "ROWS", help_heading = "Optimisation")]
    #[arg(value_parser = at_least_one::<u64>)]
    batch: Option<u64>,
    /// Learning rate; the papers' is 5e-7
    #[arg(long, value_name = "RATE", default_value_t = 1e-5, help_heading = "Optimisation")]
    #[arg(value_parser = positive)]
    learning_rate: f64,
    /// How far the ratio of a token may fall: 1 less this
    #[arg(long, value_name = "SHARE", help_heading = "Optimisation")]
    #[arg(default_value_t = RapoLoss::default().clip_low)]
    clip_low: f64,
    /// How far it may rise: 1 plus this
    #[arg(long, value_name = "SHARE", help_heading = "Optimisation")]
    #[arg(default_value_t = RapoLoss::default().clip_high)]
    clip_high: f64,
    /// Share of the tokens that count, those with the largest entropies
    #[arg(long, value_name = "SHARE", help_heading = "Optimisation")]
    #[arg(default_value_t = RapoLoss::default().share)]
    entropy_share: f64,
    /// Among which tokens they are chosen: response (as the paper says) or batch (as the code does)
    #[arg(long, value_name = "SCOPE", default_value = "response", help_heading = "Optimisation")]
    entropy_scope: ScopeArgument,
    /// Decides prompts and draws
    #[arg(long, value_name = "NUMBER", default_value_t = 0, help_heading = "Optimisation")]
    seed: u64,

    #[command(flatten)]
    devices: Devices,
    /// Type of activations and products: f32 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32", help_heading = "Devices")]
    precision: Precision,
    /// Save memory: compute every layer a second time for its gradients
    #[arg(long, help_heading = "Devices")]
    recompute: bool,

    /// Directory of the run; default: the first free of runs/rl, runs/rl-2, …
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    run: Option<PathBuf>,
    /// Steps between measurements on held-out prompts; 0: only at the beginning and the end
    #[arg(long, value_name = "STEPS", default_value_t = 10, help_heading = "Output")]
    measure_every: u64,
    /// Steps between checkpoints, which wait until all rollouts are learnt from; 0: only at the end
    #[arg(long, value_name = "STEPS", default_value_t = 50, help_heading = "Output")]
    checkpoint_every: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MadeTask {
    /// Sums of two numbers of two digits
    Arithmetic,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RewardArgument {
    Outcome,
    Rirm,
    RirmFlash,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ScopeArgument {
    Response,
    Batch,
}

/// Answers of a micro-batch at most, unless more are asked for.
const MOST_ROWS: usize = 32;

impl Options {
    fn settings(&self) -> RlSettings {
        let scheme = match self.reward {
            RewardArgument::Outcome => Scheme::Outcome,
            RewardArgument::Rirm => Scheme::Rirm,
            RewardArgument::RirmFlash => Scheme::RirmFlash,
        };
        let max = size(self.max_new_tokens);
        let overlong = self.overlong_buffer.map(|buffer| Overlong { max, buffer: size(buffer) });
        RlSettings {
            task: match self.task {
                Some(MadeTask::Arithmetic) => TaskKind::Arithmetic,
                None => TaskKind::Questions,
            },
            reward: RewardRule { scheme, overlong, repetition: self.repetition_penalty },
            rollouts: RlConfig {
                prompts: size(self.prompts),
                answers: size(self.answers),
                mini_batch: size(self.mini_batch),
                max_new_tokens: size(self.max_new_tokens),
                loss: RapoLoss {
                    clip_low: self.clip_low,
                    clip_high: self.clip_high,
                    share: self.entropy_share,
                    scope: match self.entropy_scope {
                        ScopeArgument::Response => EntropyScope::Response,
                        ScopeArgument::Batch => EntropyScope::Batch,
                    },
                },
                order: if self.hard_first { Order::HardToEasy } else { Order::EasyToHard },
                at_once: size(self.at_once),
                chat: self.chat,
                measure_every: present(self.measure_every),
                ..RlConfig::default()
            },
        }
    }

    fn training(&self, rows: usize) -> TrainConfig {
        let divides = |batch: &usize| rows.is_multiple_of(*batch);
        let largest = (1..=MOST_ROWS.min(rows)).rev().find(divides).unwrap_or(1);
        let batch_size = self.batch.map_or(largest, size);
        TrainConfig {
            steps: self.steps,
            batch_size,
            accumulation: rows / batch_size.max(1),
            seq_len: size(self.prompt_tokens).saturating_add(size(self.max_new_tokens)),
            learning_rate: self.learning_rate,
            min_learning_rate: self.learning_rate,
            warmup_steps: 0,
            schedule: Schedule::Constant,
            seed: self.seed,
            validate_every: None,
            checkpoint_every: present(self.checkpoint_every),
            laep: LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() },
            precision: self.precision,
            recompute: self.recompute,
            ..TrainConfig::default()
        }
    }

    fn create(&self, console: &Console, grid: Grid) -> anyhow::Result<Run> {
        let model = ModelDirectory::open(&self.from)?;
        let settings = self.settings();
        let training = self.training(settings.rollouts.rows_per_step());
        if self.overlong_buffer.is_some() && settings.reward.scheme != Scheme::Outcome {
            let refused = anyhow::anyhow!(
                "--overlong-buffer goes with --reward outcome: by RIRM nothing is lost by length"
            );
            return Err(refused).wrong_option();
        }
        if self.overlong_buffer.is_some_and(|buffer| buffer > self.max_new_tokens) {
            let refused = anyhow::anyhow!(
                "--overlong-buffer must be at most the {} of --max-new-tokens",
                self.max_new_tokens
            );
            return Err(refused).wrong_option();
        }
        let rows = settings.rollouts.rows_per_step();
        if let Some(batch) = self.batch.filter(|&batch| !rows.is_multiple_of(size(batch))) {
            let refused = anyhow::anyhow!(
                "--batch {batch} does not divide the {rows} answers of an update (--mini-batch times \
                 --answers)"
            );
            return Err(refused).wrong_option();
        }
        settings.rollouts.validate(&training).wrong_option()?;
        check_settings(&training, model.config()).wrong_option()?;
        check_ranks(&training, model.config(), grid).wrong_option()?;
        let questions = match &self.data {
            Some(path) => {
                let text = fs::read_to_string(path);
                let text = text.with_context(|| format!("cannot read {}", path.display()))?;
                Some(text)
            }
            None => None,
        };
        let claim = match &self.run {
            Some(directory) => Claim::take(directory)?,
            None => Claim::first_free(&PathBuf::from(crate::resume::RUNS).join("rl"))?,
        };
        let run = settings.create(claim, model, training, questions.as_deref());
        let run = match &self.data {
            Some(path) => run.with_context(|| format!("cannot learn from {}", path.display()))?,
            None => run?,
        };
        console.note(format_args!("The run is {}", run.directory().display()));
        Ok(run)
    }
}

/// A count of the command line; what no machine can count is as good as the most that it can.
fn size(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

fn present(steps: u64) -> Option<u64> {
    (steps != 0).then_some(steps)
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    pretrain::train(&options.devices, console, |grid| options.create(console, grid))
}
