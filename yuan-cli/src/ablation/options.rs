//! What the user may choose, and the configurations that follow from it.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use yuan::{
    laep::{PruneLimits, StabilityTest},
    model::{BalanceLosses, SpecialTokens, YuanConfig},
    train::{LaepConfig, TrainConfig, Trigger},
};

use super::variants::Variant;
use crate::numbers::{at_least_one, layers, positive};

/// Options of `yuan ablation`. What is trained depends on those that are serialized: the directory
/// keeps them, and outcomes of others do not mix with it.
#[derive(Args, Serialize)]
#[command(
    after_help = "What --out holds already is not trained again; with more seeds only those \
    that are missing are."
)]
pub struct Options {
    /// Directory of text files to learn, UTF-8 and up to 1 MiB each; default: the crates that this
    /// program was built from
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    pub data: Option<PathBuf>,
    /// Use the first so many megabytes of it
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "MEGABYTES")]
    #[arg(default_value_t = 4, help_heading = "Data")]
    pub megabytes: usize,
    /// Directory for the runs and tables
    #[arg(long, value_name = "DIR", default_value = "runs/ablation", help_heading = "Output")]
    #[serde(skip)]
    pub out: PathBuf,
    /// Where to compute
    #[arg(long, value_name = "DEVICE", default_value = "flex", help_heading = "Devices")]
    #[serde(skip)]
    pub device: String,
    /// Seeds of every variant
    #[arg(long, value_parser = at_least_one::<u64>, value_name = "SEEDS", default_value_t = 3)]
    #[arg(help_heading = "Optimisation")]
    #[serde(skip)]
    pub seeds: u64,
    /// Optimizer steps
    #[arg(long, value_parser = at_least_one::<u64>, value_name = "STEPS", default_value_t = 150)]
    #[arg(help_heading = "Optimisation")]
    pub steps: u64,
    /// Step after which LAEP prunes
    #[arg(long, value_name = "STEP", default_value_t = 60, help_heading = "LAEP")]
    pub prune_at: u64,
    /// Rows of a batch
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "ROWS", default_value_t = 8)]
    #[arg(help_heading = "Optimisation")]
    pub batch: usize,
    /// Tokens of a row
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "TOKENS", default_value_t = 128)]
    #[arg(help_heading = "Data")]
    pub seq: usize,
    /// Entries of the tokenizer's vocabulary
    #[arg(long, value_name = "ENTRIES", default_value_t = 1024, help_heading = "Data")]
    pub vocab: usize,
    /// Layers of the model
    #[arg(long, value_parser = layers, value_name = "LAYERS", default_value_t = 3)]
    #[arg(help_heading = "Model")]
    pub layers: usize,
    /// Width of the model
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "WIDTH", default_value_t = 64)]
    #[arg(help_heading = "Model")]
    pub hidden: usize,
    /// Experts of each layer
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "EXPERTS", default_value_t = 16)]
    #[arg(help_heading = "Model")]
    pub experts: usize,
    /// Peak learning rate
    #[arg(long, value_parser = positive, value_name = "RATE", default_value_t = 3e-3)]
    #[arg(help_heading = "Optimisation")]
    pub learning_rate: f64,
}

impl Options {
    /// Settings of the loop for a variant.
    pub fn train_config(&self, variant: &Variant, seed: u64) -> anyhow::Result<TrainConfig> {
        let (limits, trigger) = match &variant.limits {
            Some((alpha, beta)) => (
                PruneLimits {
                    alpha: alpha.clone(),
                    beta: (*beta).into(),
                    ..PruneLimits::default()
                },
                Trigger::Steps(vec![self.prune_at]),
            ),
            None => (PruneLimits::default(), Trigger::Never),
        };
        let [auxiliary, sequence, bias_update_rate] = variant.balance;
        let config = TrainConfig {
            steps: self.steps,
            batch_size: self.batch,
            seq_len: self.seq,
            learning_rate: self.learning_rate,
            min_learning_rate: self.learning_rate / 10.0,
            warmup_steps: (self.steps / 12).min(2000),
            seed,
            validate_every: None,
            validation_batches: 16,
            // One right before the prune, for the variants that branch off from a base there.
            checkpoint_every: variant.is_base().then(|| self.prune_at.saturating_sub(1)),
            keep_checkpoints: usize::MAX,
            laep: LaepConfig {
                window_steps: (self.prune_at / 4).max(1),
                trigger,
                stability: StabilityTest { windows: 1, ..StabilityTest::default() },
                limits,
                ..LaepConfig::default()
            },
            balance: BalanceLosses { auxiliary, sequence, router_z: 0.0 },
            bias_update_rate: (bias_update_rate > 0.0).then_some(bias_update_rate),
            ..TrainConfig::default()
        };
        anyhow::ensure!(
            (2..self.steps).contains(&self.prune_at),
            "--prune-at {} must lie between 2 and --steps {}",
            self.prune_at,
            self.steps
        );
        config.validate()?;
        Ok(config)
    }

    /// The model of a variant.
    pub fn model_config(&self, variant: &Variant, vocab_size: usize, eod: u32) -> YuanConfig {
        YuanConfig {
            hidden_size: self.hidden,
            attention_projection_size: 2 * self.hidden,
            expert_hidden_size: 2 * self.hidden,
            experts_per_layer: vec![self.experts; self.layers],
            max_seq_len: self.seq.max(512),
            init_std: 1.0 / (self.hidden as f64).sqrt(),
            localized_filter: variant.lfa,
            router_selection_bias: variant.balance[2] > 0.0,
            tokens: SpecialTokens { eod: Some(eod), ..SpecialTokens::default() },
            ..YuanConfig::toy(vocab_size)
        }
    }
}
