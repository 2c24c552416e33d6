//! What the user may choose, and the configurations that follow from it.

use std::path::PathBuf;

use clap::Parser;
use yuan::{
    laep::{PruneLimits, StabilityTest},
    model::{BalanceLosses, SpecialTokens, YuanConfig},
    train::{LaepConfig, TrainConfig, callback::Trigger},
};

use crate::tables::Variant;

/// Train the variants of the paper's Tables 1 and 2 in miniature and compare their losses.
#[derive(Parser)]
pub struct Arguments {
    /// Directory of text files to learn; default: the crates that this program was built from
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Use the first so many megabytes of it
    #[arg(long, default_value_t = 4)]
    pub megabytes: usize,
    /// Directory for the runs and tables
    #[arg(long, value_name = "DIR", default_value_os_t = crate::default_out())]
    pub out: PathBuf,
    /// Where to compute
    #[arg(long, default_value = "flex")]
    pub device: String,
    /// Seeds of every variant
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    /// Optimizer steps
    #[arg(long, default_value_t = 150)]
    pub steps: u64,
    /// Step after which LAEP prunes
    #[arg(long, default_value_t = 60)]
    pub prune_at: u64,
    /// Rows of a batch
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 128)]
    pub seq: usize,
    /// Entries of the tokenizer's vocabulary
    #[arg(long, default_value_t = 1024)]
    pub vocab: usize,
    /// Layers of the model
    #[arg(long, default_value_t = 3)]
    pub layers: usize,
    /// Width of the model
    #[arg(long, default_value_t = 64)]
    pub hidden: usize,
    /// Experts of each layer
    #[arg(long, default_value_t = 16)]
    pub experts: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 3e-3)]
    pub learning_rate: f64,
}

impl Arguments {
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
            validate_every: 0,
            validation_batches: 16,
            // One right before the prune, for the variants that branch off from a base there.
            checkpoint_every: if variant.name == "base" {
                self.prune_at.saturating_sub(1)
            } else {
                0
            },
            keep_checkpoints: usize::MAX,
            laep: LaepConfig {
                window_steps: (self.prune_at / 4).max(1),
                trigger,
                stability: StabilityTest { windows: 1, ..StabilityTest::default() },
                limits,
                ..LaepConfig::default()
            },
            balance: BalanceLosses { auxiliary, sequence, router_z: 0.0 },
            bias_update_rate,
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
            ffn_hidden_size: 2 * self.hidden,
            experts_per_layer: vec![self.experts; self.layers],
            max_position_embeddings: self.seq.max(512),
            initializer_range: 1.0 / (self.hidden as f64).sqrt(),
            use_lf_gate: variant.lfa,
            router_selection_bias: variant.balance[2] > 0.0,
            tokens: SpecialTokens { eod: Some(eod), ..SpecialTokens::default() },
            ..YuanConfig::toy(vocab_size)
        }
    }
}
