//! What the user may choose, and the configurations that follow from it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::Parser;
use yuan::{
    laep::{PerLayer, PruneLimits, PrunePlan, StabilityTest},
    model::{BalanceLosses, RouterType, SpecialTokens, YuanConfig},
    train::{
        LaepConfig, Precision, TrainConfig,
        callback::{Guard, Trigger},
        checkpoint::Checkpoint,
    },
};

/// Pre-train a toy Yuan3.0 mixture of experts; LAEP prunes it when the expert loads are stable.
#[derive(Parser)]
#[command(args_override_self = true)] // of an option given twice, the later holds
pub struct Arguments {
    /// Directory of text files to learn; default: the crates that this program was built from
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Directory of the run; default: the first free of runs/pretrain, runs/pretrain-2, …
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Go on with the run in --run from its latest checkpoint; other options are then ignored
    #[arg(long)]
    pub resume: bool,
    /// Start from the weights and the tokenizer of this model: a run, or a directory in Hugging
    /// Face's layout
    #[arg(long, value_name = "DIR", conflicts_with_all = ["vocab", "layers", "hidden", "experts", "router", "no_lfa"])]
    pub init: Option<PathBuf>,
    /// Where to compute: flex, or another backend that this build has; several devices
    /// (cuda:0,cuda:1, or ws://host:port of workers) share the batch and the experts
    #[arg(long, default_value = "flex", value_delimiter = ',')]
    pub device: Vec<String>,
    /// Of several devices: rows that each hold all experts; the devices of a row share them
    #[arg(long, default_value_t = 1, value_name = "ROWS")]
    pub data_parallel: usize,
    /// Of devices of other processes: longest time in seconds in which nothing happens before they
    /// are given up
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub patience: u64,
    /// Type of activations and products: f32, or bf16 with everything sensitive and the parameters
    /// in f32
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    pub precision: String,
    /// Save memory: compute every layer a second time for its gradients instead of keeping what it
    /// computed
    #[arg(long)]
    pub recompute: bool,
    /// No fast versions: every operation as plain Burn computes it, to tell whether a fast one is
    /// to blame for something
    #[arg(long)]
    pub portable: bool,
    /// Optimizer steps
    #[arg(long, default_value_t = 240)]
    pub steps: u64,
    /// Rows of a micro-batch
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 256)]
    pub seq: usize,
    /// Micro-batches of an optimizer step
    #[arg(long, default_value_t = 1)]
    pub accumulation: usize,
    /// Entries of the tokenizer's vocabulary
    #[arg(long, default_value_t = 4096)]
    pub vocab: usize,
    /// Layers of the model
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// Width of the model
    #[arg(long, default_value_t = 256)]
    pub hidden: usize,
    /// Experts of each layer
    #[arg(long, default_value_t = 16)]
    pub experts: usize,
    /// Router: linear (Yuan3.0 Ultra) or attention (Yuan3.0 Flash)
    #[arg(long, default_value = "linear", value_parser = ["linear", "attention"])]
    pub router: String,
    /// Peak learning rate
    #[arg(long, default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// Decides initial weights and the order of the data
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Steps between validations
    #[arg(long, default_value_t = 60)]
    pub validate_every: u64,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 60)]
    pub checkpoint_every: u64,
    /// Train without pruning
    #[arg(long)]
    pub no_laep: bool,
    /// Prune after this step, or after each of these (80,160), instead of waiting for stable loads
    #[arg(long, value_name = "STEPS", value_delimiter = ',', conflicts_with = "no_laep")]
    pub prune_at: Vec<u64>,
    /// Prune so many times at most, each time when the loads have become stable again
    #[arg(long, default_value_t = 1, conflicts_with_all = ["no_laep", "prune_at"])]
    pub rounds: usize,
    /// Apply this plan instead of making one
    #[arg(long, value_name = "PLAN.json", conflicts_with = "no_laep")]
    pub plan: Option<PathBuf>,
    /// Undo a prune unless the validation loss returns to within this share of what it was before
    /// it
    #[arg(long, value_name = "MARGIN", conflicts_with = "no_laep")]
    pub guard: Option<f64>,
    /// Steps in which it must return
    #[arg(long, default_value_t = 40, requires = "guard")]
    pub guard_steps: u64,
    /// Steps whose loads are summed into one window
    #[arg(long, default_value_t = 10)]
    pub window: u64,
    /// Windows in a row that must be stable
    #[arg(long, default_value_t = 3)]
    pub stable_windows: usize,
    /// Largest share of a layer's load that may move between stable windows
    #[arg(long, default_value_t = 0.12)]
    pub max_change: f64,
    /// Smallest rank correlation of the loads of stable windows
    #[arg(long, default_value_t = 0.6)]
    pub min_rank_correlation: f64,
    /// Individual load constraint: an expert may go if its load is at most alpha times the mean; a
    /// number or "inf", or one for each layer (0.2,0.4,inf,inf)
    #[arg(long, default_value = "inf")]
    pub alpha: PerLayer,
    /// Cumulative load constraint: the pruned experts of a layer carry at most this share of its
    /// load; a number, or one for each layer
    #[arg(long, default_value = "0.19")]
    pub beta: PerLayer,
    /// Round the kept experts of each layer up to a multiple of this; default: the groups
    #[arg(long)]
    pub multiple_of: Option<usize>,
    /// Keep at least this many experts in each layer
    #[arg(long, default_value_t = 8)]
    pub min_experts: usize,
    /// Device groups that the kept experts are spread over; default: the devices that share them,
    /// or 2 on one
    #[arg(long)]
    pub groups: Option<usize>,
    /// Spread the experts over the groups anew after so many windows, pruned or not; 0: only when
    /// pruning
    #[arg(long, default_value_t = 0, value_name = "WINDOWS")]
    pub rearrange_every: u64,
    /// Coefficient of the auxiliary loss of Switch and Mixtral
    #[arg(long, default_value_t = 0.0, value_name = "C")]
    pub aux_loss: f64,
    /// Coefficient of DeepSeek-V3's sequence-wise auxiliary loss
    #[arg(long, default_value_t = 0.0, value_name = "C")]
    pub sequence_aux_loss: f64,
    /// Coefficient of the router z-loss
    #[arg(long, default_value_t = 0.0, value_name = "C")]
    pub z_loss: f64,
    /// Balance without an auxiliary loss: how far the routers' biases move after a step
    /// (DeepSeek-V3)
    #[arg(long, default_value_t = 0.0, value_name = "RATE")]
    pub bias_update_rate: f64,
    /// Train without localized filtering
    #[arg(long)]
    pub no_lfa: bool,
}

impl Arguments {
    /// Settings of the loop, checked against the model that it starts from, or else the one of
    /// these arguments.
    pub fn train_config(&self, init: Option<&YuanConfig>) -> anyhow::Result<TrainConfig> {
        let model = match init {
            Some(model) => model.clone(),
            None => self.model_config(self.vocab, 0)?,
        };
        let plan = match &self.plan {
            Some(path) => {
                let text = fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                Some(
                    PrunePlan::from_json(&text)
                        .with_context(|| format!("cannot use {}", path.display()))?,
                )
            }
            None => None,
        };
        let config = TrainConfig {
            steps: self.steps,
            batch_size: self.batch,
            seq_len: self.seq,
            accumulation: self.accumulation,
            learning_rate: self.learning_rate,
            min_learning_rate: self.learning_rate / 10.0,
            warmup_steps: (self.steps / 12).min(2000),
            seed: self.seed,
            validate_every: self.validate_every,
            checkpoint_every: self.checkpoint_every,
            laep: LaepConfig {
                window_steps: self.window,
                trigger: match &self.prune_at[..] {
                    _ if self.no_laep => Trigger::Never,
                    [] => Trigger::Stable { rounds: self.rounds },
                    steps => Trigger::Steps(steps.to_vec()),
                },
                stability: StabilityTest {
                    windows: self.stable_windows,
                    max_change: self.max_change,
                    min_rank_correlation: self.min_rank_correlation,
                },
                limits: PruneLimits {
                    alpha: self.alpha.clone(),
                    beta: self.beta.clone(),
                    multiple_of: self.multiple_of.unwrap_or(self.groups()),
                    min_experts: self.min_experts,
                    top_k: model.moe_top_k,
                    max_pruned_fraction: None,
                },
                groups: self.groups(),
                rearrange_every: self.rearrange_every,
                plan,
                speed: None,
                guard: self.guard.map(|margin| Guard { margin, steps: self.guard_steps }),
            },
            balance: BalanceLosses {
                auxiliary: self.aux_loss,
                sequence: self.sequence_aux_loss,
                router_z: self.z_loss,
            },
            bias_update_rate: self.bias_update_rate,
            recompute: self.recompute,
            precision: self.train_precision(),
            ..TrainConfig::default()
        };
        config.validate()?;
        // Found out now rather than in the middle of the run.
        if !self.no_laep {
            config.laep.limits.check_model(&model.experts_per_layer)?;
        }
        if let Some(plan) = &config.laep.plan {
            let path = self.plan.as_deref().unwrap_or(Path::new("")).display();
            let fits = plan.check_against(&model.experts_per_layer, model.moe_top_k);
            fits.with_context(|| format!("{path} is no plan for this model"))?;
        }
        Ok(config)
    }

    fn groups(&self) -> usize {
        let sharing = self.device.len() / self.data_parallel.max(1);
        self.groups.unwrap_or(if self.device.len() == 1 { 2 } else { sharing.max(1) })
    }

    fn train_precision(&self) -> Precision {
        if self.precision == "bf16" { Precision::Bf16 } else { Precision::F32 }
    }

    /// The model, once the vocabulary is known.
    pub fn model_config(&self, vocab_size: usize, eod: u32) -> anyhow::Result<YuanConfig> {
        let config = YuanConfig {
            hidden_size: self.hidden,
            attention_projection_size: 2 * self.hidden,
            ffn_hidden_size: 2 * self.hidden,
            experts_per_layer: vec![self.experts; self.layers],
            use_lf_gate: !self.no_lfa,
            router_selection_bias: self.bias_update_rate > 0.0,
            router_type: if self.router == "linear" {
                RouterType::Linear
            } else {
                RouterType::Attention
            },
            max_position_embeddings: self.seq.max(512),
            // The published σ · √H at this width.
            initializer_range: 1.0 / (self.hidden as f64).sqrt(),
            tokens: SpecialTokens { eod: Some(eod), ..SpecialTokens::default() },
            ..YuanConfig::toy(vocab_size)
        };
        config.validate()?;
        Ok(config)
    }

    /// A directory for a new run that does not exist yet or is empty.
    pub fn new_run(&self) -> anyhow::Result<PathBuf> {
        let is_free = |path: &Path| {
            path.read_dir().map_or(!path.exists(), |mut entries| entries.next().is_none())
        };
        if let Some(run) = &self.run {
            if !is_free(run) {
                bail!(
                    "{} is not empty: add --resume to go on with the run in it, or name another --run",
                    run.display()
                );
            }
            return Ok(run.clone());
        }
        let default = PathBuf::from("runs/pretrain");
        let numbered = (2..).map(|n| PathBuf::from(format!("runs/pretrain-{n}")));
        Ok(std::iter::once(default.clone())
            .chain(numbered)
            .find(|path| is_free(path))
            .unwrap_or(default))
    }

    /// The directory of the run to resume.
    pub fn existing_run(&self) -> anyhow::Result<PathBuf> {
        let Some(run) = &self.run else { bail!("--resume needs --run DIR, the run to go on with") };
        if !run.is_dir() {
            bail!("{} holds no run to resume", run.display());
        }
        Checkpoint::list(run)?;
        Ok(run.clone())
    }
}
