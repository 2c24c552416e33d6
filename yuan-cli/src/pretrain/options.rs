//! What the user may choose, and the configurations that follow from it. What is not chosen is as
//! in the toy run ([`yuan::toy`]).

use std::{collections::BTreeSet, path::PathBuf};

use clap::{ArgAction, Args};
use yuan::{
    laep::{PruneLimits, PrunePlan, StabilityTest},
    model::{BalanceLosses, RouterType, YuanConfig, ranks::Grid},
    toy,
    train::{
        Freeze, Guard, LaepConfig, Learns, Precision, Recovery, Schedule, TrainConfig, Trigger,
    },
};

use crate::{limits::LimitOptions, numbers::layers, plan::file, text::DataArgument};

/// Peak learning rate of instruction tuning, unless another one is given.
const TUNING_RATE: f64 = 2e-4;

/// Where a run is computed.
#[derive(Args)]
pub struct Devices {
    /// Where to compute: flex, or another backend that this build has; several devices
    /// (cuda:0,cuda:1) share the batch and the experts
    #[arg(long, value_name = "DEVICES", default_value = "flex", value_delimiter = ',')]
    #[arg(help_heading = "Devices")]
    pub device: Vec<String>,
    /// Of several devices: rows that each hold all experts; the devices of a row share them
    #[arg(long, default_value_t = 1, value_name = "ROWS", help_heading = "Devices")]
    pub data_parallel: usize,
    /// With several devices: longest wait for another one before the run is given up; a validation, the
    /// answers to a batch of prompts and the writing of a checkpoint that the run waits for may take
    /// twice as long
    #[arg(long, default_value_t = 600, value_name = "SECONDS", help_heading = "Devices")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=crate::ranks::MOST_PATIENCE))]
    pub patience: u64,
    /// No fast versions: every operation as plain Burn computes it, to tell whether a fast one is
    /// to blame for something
    #[arg(long, help_heading = "Devices")]
    pub portable: bool,
}

/// Options of `yuan pretrain`.
#[derive(Args)]
#[command(
    after_help = "Limits that are not given: alpha inf, beta 0.19, min-experts 8 (or half of the \
    experts), groups 2 (of several devices: those that share the experts), multiple-of the groups. A \
    run keeps its options in options.toml, which --config takes."
)]
pub struct Options {
    /// Text to learn: a file, a directory of files, or a data set that `yuan prepare` made; several
    /// of these are mixed by weight with --data NAME=WEIGHT:DIR; default: the crates that this
    /// program was built from
    #[arg(long, value_name = "PATH", help_heading = "Data", action = ArgAction::Append)]
    pub data: Vec<DataArgument>,
    /// Tokens of a row
    #[arg(long, value_name = "TOKENS", help_heading = "Data")]
    #[arg(default_value_t = toy::train_config().seq_len)]
    seq: usize,
    /// Entries of the tokenizer's vocabulary: at least the 256 bytes and the end of a document
    #[arg(long, value_name = "ENTRIES", help_heading = "Data")]
    #[arg(default_value_t = toy::model().vocab_size)]
    pub vocab: usize,

    /// Start from the weights and the tokenizer of this model: a run, or a directory in Hugging
    /// Face's layout
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    #[arg(conflicts_with_all = ["vocab", "layers", "hidden", "experts", "router", "no_lfa"])]
    pub init: Option<PathBuf>,
    /// Layers of the model
    #[arg(long, value_parser = layers, value_name = "LAYERS", help_heading = "Model")]
    #[arg(default_value_t = toy::model().num_layers())]
    layers: usize,
    /// Width of the model, a multiple of 4
    #[arg(long, value_name = "WIDTH", help_heading = "Model")]
    #[arg(default_value_t = toy::model().hidden_size)]
    hidden: usize,
    /// Experts of each layer
    #[arg(long, value_name = "EXPERTS", help_heading = "Model")]
    #[arg(default_value_t = toy::model().experts_per_layer[0])]
    experts: usize,
    /// Router: linear (Yuan3.0 Ultra) or attention (Yuan3.0 Flash)
    #[arg(long, value_parser = ["linear", "attention"], help_heading = "Model")]
    #[arg(default_value = "linear")]
    router: String,
    /// Train without localized filtering
    #[arg(long, help_heading = "Model")]
    no_lfa: bool,

    /// Optimizer steps
    #[arg(long, value_name = "STEPS", help_heading = "Optimisation")]
    #[arg(default_value_t = toy::train_config().steps)]
    steps: u64,
    /// Rows of a micro-batch
    #[arg(long, value_name = "ROWS", help_heading = "Optimisation")]
    #[arg(default_value_t = toy::train_config().batch_size)]
    batch: usize,
    /// Micro-batches of an optimizer step
    #[arg(long, value_name = "MICRO_BATCHES", help_heading = "Optimisation")]
    #[arg(default_value_t = toy::train_config().accumulation)]
    accumulation: usize,
    /// Peak learning rate
    #[arg(long, value_name = "RATE", help_heading = "Optimisation")]
    #[arg(default_value_t = toy::train_config().learning_rate)]
    learning_rate: f64,
    /// How the learning rate goes on after the warm-up: cosine (to a tenth of the peak), constant,
    /// or wsd (warm-up, stable, decay: at the peak, then to a tenth of it over the last steps, so
    /// that the run can be extended from a checkpoint before these)
    #[arg(long, value_parser = ["cosine", "constant", "wsd"], help_heading = "Optimisation")]
    #[arg(default_value = "cosine")]
    schedule: String,
    /// With --schedule wsd: steps of the decay; default: a tenth of the steps
    #[arg(long, value_name = "STEPS", help_heading = "Optimisation")]
    decay_steps: Option<u64>,
    /// What learns: all, routers, experts or attention
    #[arg(long = "train", value_name = "PARAMETERS", help_heading = "Optimisation")]
    #[arg(default_value_t = Learns::All)]
    learns: Learns,
    /// Parts of a model that sees images that do not learn: vision, language, or both (vision,language),
    /// so that the projector between them learns first
    #[arg(long, value_name = "PARTS", help_heading = "Optimisation")]
    freeze: Option<Freeze>,
    /// Decides initial weights and the order of the data
    #[arg(long, value_name = "NUMBER", help_heading = "Optimisation")]
    #[arg(default_value_t = toy::train_config().seed)]
    seed: u64,
    /// Coefficient of the auxiliary loss of Switch and Mixtral
    #[arg(long, value_name = "COEFFICIENT", help_heading = "Optimisation")]
    #[arg(default_value_t = 0.0)]
    aux_loss: f64,
    /// Coefficient of DeepSeek-V3's sequence-wise auxiliary loss
    #[arg(long, value_name = "COEFFICIENT", help_heading = "Optimisation")]
    #[arg(default_value_t = 0.0)]
    sequence_aux_loss: f64,
    /// Coefficient of the router z-loss
    #[arg(long, value_name = "COEFFICIENT", help_heading = "Optimisation")]
    #[arg(default_value_t = 0.0)]
    z_loss: f64,
    /// Balance without an auxiliary loss: how far the routers' biases move after a step
    /// (DeepSeek-V3)
    #[arg(long, value_name = "RATE", help_heading = "Optimisation")]
    bias_update_rate: Option<f64>,

    #[command(flatten)]
    limits: LimitOptions,
    /// Train without pruning
    #[arg(long, help_heading = "LAEP")]
    no_laep: bool,
    /// Prune after this step, or after each of these (80,160), instead of waiting for stable loads
    #[arg(long, value_name = "STEPS", value_delimiter = ',', conflicts_with = "no_laep")]
    #[arg(help_heading = "LAEP")]
    prune_at: Vec<u64>,
    /// Prune so many times at most, each time when the loads have become stable again
    #[arg(long, value_name = "PRUNES", conflicts_with_all = ["no_laep", "prune_at"])]
    #[arg(default_value_t = 1, help_heading = "LAEP")]
    rounds: usize,
    /// Apply this plan instead of making one
    #[arg(long, value_name = "PLAN.json", conflicts_with = "no_laep", help_heading = "LAEP")]
    plan: Option<PathBuf>,
    /// Undo a prune unless the validation loss returns to within this share of what it was before
    #[arg(long, value_name = "SHARE", conflicts_with = "no_laep", help_heading = "LAEP")]
    guard: Option<f64>,
    /// Steps in which it must return
    #[arg(long, value_name = "STEPS", default_value_t = 40, requires = "guard")]
    #[arg(help_heading = "LAEP")]
    guard_steps: u64,
    /// After a prune, train these parameters alone for so many steps, as routers:100
    #[arg(long, value_name = "PARAMETERS:STEPS", value_parser = recovery, help_heading = "LAEP")]
    recover: Option<Recovery>,
    /// Steps whose loads are summed into one window
    #[arg(long, value_name = "STEPS", help_heading = "LAEP")]
    #[arg(default_value_t = toy::train_config().laep.window_steps)]
    window: u64,
    /// Windows in a row that must be stable
    #[arg(long, value_name = "WINDOWS", help_heading = "LAEP")]
    #[arg(default_value_t = toy::train_config().laep.stability.windows)]
    stable_windows: usize,
    /// Largest share of a layer's load that may move between stable windows
    #[arg(long, value_name = "SHARE", help_heading = "LAEP")]
    #[arg(default_value_t = toy::train_config().laep.stability.max_change)]
    max_change: f64,
    /// Smallest rank correlation of the loads of stable windows
    #[arg(long, value_name = "CORRELATION", help_heading = "LAEP")]
    #[arg(default_value_t = toy::train_config().laep.stability.min_rank_correlation)]
    min_rank_correlation: f64,
    /// Spread the experts over the groups anew after so many windows, pruned or not; 0: only when
    /// pruning
    #[arg(long, value_name = "WINDOWS", default_value_t = 0, help_heading = "LAEP")]
    rearrange_every: u64,

    #[command(flatten)]
    pub devices: Devices,
    /// Type of activations and products: f32, or bf16 with everything sensitive and the parameters
    /// in f32
    #[arg(long, value_name = "TYPE", default_value = "f32", help_heading = "Devices")]
    precision: Precision,
    /// Save memory: compute every layer a second time for its gradients instead of keeping what it
    /// computed
    #[arg(long, help_heading = "Devices")]
    recompute: bool,

    /// Directory of the run; default: the first free of runs/pretrain, runs/pretrain-2, …, and with
    /// --resume the run below runs that was written into last
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub run: Option<PathBuf>,
    /// Go on with a run from its latest checkpoint, by the options it was made with; only --steps,
    /// --batch, --accumulation, --validate-every, --checkpoint-every, --async-checkpoint, --groups,
    /// --multiple-of and the devices may be others
    #[arg(long, help_heading = "Output")]
    pub resume: bool,
    /// Steps between validations; 0: only at the end
    #[arg(long, value_name = "STEPS", default_value_t = 60, help_heading = "Output")]
    validate_every: u64,
    /// Steps between checkpoints; 0: only at the end
    #[arg(long, value_name = "STEPS", default_value_t = 60, help_heading = "Output")]
    checkpoint_every: u64,
    /// Write checkpoints while training goes on, from a copy in main memory; default of a new run: on
    /// with CUDA
    #[arg(long, value_name = "on|off", value_parser = ["on", "off"], help_heading = "Output")]
    async_checkpoint: Option<String>,
}

impl Options {
    /// What is not given is as instruction tuning wants it: a lower rate, and no pruning.
    pub fn be_tuning(&mut self, given: &BTreeSet<String>) {
        if !given.contains("learning-rate") {
            self.learning_rate = TUNING_RATE;
        }
        let prunes = ["prune-at", "rounds", "plan", "guard", "recover"];
        self.no_laep |= !prunes.iter().any(|&name| given.contains(name));
    }

    /// Settings of the loop.
    ///
    /// # Errors
    ///
    /// If the plan cannot be read.
    pub fn train_config(&self, model: &YuanConfig, grid: Grid) -> anyhow::Result<TrainConfig> {
        let toy = toy::train_config();
        let present = |steps: u64| (steps != 0).then_some(steps);
        Ok(TrainConfig {
            steps: self.steps,
            batch_size: self.batch,
            seq_len: self.seq,
            accumulation: self.accumulation,
            learning_rate: self.learning_rate,
            min_learning_rate: self.learning_rate / 10.0,
            warmup_steps: (self.steps / 12).min(2000),
            schedule: match self.schedule.as_str() {
                "constant" => Schedule::Constant,
                "wsd" => Schedule::WarmupStableDecay {
                    decay_steps: self.decay_steps.unwrap_or((self.steps / 10).max(1)),
                },
                _ => Schedule::Cosine,
            },
            learns: self.learns,
            freeze: self.freeze.unwrap_or_default(),
            seed: self.seed,
            validate_every: present(self.validate_every),
            checkpoint_every: present(self.checkpoint_every),
            async_checkpoint: match self.async_checkpoint.as_deref() {
                Some(wanted) => wanted == "on",
                None => self.devices.device.iter().any(|name| name.starts_with("cuda")),
            },
            laep: self.laep_config(toy.laep, model, grid)?,
            balance: BalanceLosses {
                auxiliary: self.aux_loss,
                sequence: self.sequence_aux_loss,
                router_z: self.z_loss,
            },
            bias_update_rate: self.bias_update_rate.filter(|&rate| rate != 0.0),
            recompute: self.recompute,
            precision: self.precision,
            ..TrainConfig::default()
        })
    }

    fn laep_config(
        &self,
        toy: LaepConfig,
        model: &YuanConfig,
        grid: Grid,
    ) -> anyhow::Result<LaepConfig> {
        let groups = self.groups(toy.groups, model, grid);
        let most = model.experts_per_layer.iter().max().copied().unwrap_or(0);
        let limits = self.limits.over(PruneLimits {
            multiple_of: groups,
            min_experts: toy.limits.min_experts.min((most / 2).max(1)),
            ..toy.limits
        });
        Ok(LaepConfig {
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
            limits,
            groups,
            rearrange_every: (self.rearrange_every != 0).then_some(self.rearrange_every),
            plan: self.plan()?,
            // Measuring takes a moment, which only a prediction is worth.
            predict_speed: !self.no_laep,
            speed: None,
            guard: self.guard.map(|margin| Guard { margin, steps: self.guard_steps }),
            recovery: self.recover,
        })
    }

    /// The ranks that share the experts, or as many groups as the toy has on one device. A model whose
    /// experts cannot be cut so, as one that was pruned before, has one group on one device.
    fn groups(&self, on_one_device: usize, model: &YuanConfig, grid: Grid) -> usize {
        let mut experts = model.experts_per_layer.iter();
        let default = match grid.size() {
            1 if experts.all(|experts| experts.is_multiple_of(on_one_device)) => on_one_device,
            1 => 1,
            _ => grid.expert(),
        };
        self.limits.groups.unwrap_or(default)
    }

    /// The settings of a run with what the user wants otherwise now.
    pub fn changed(&self, run: &TrainConfig, given: &BTreeSet<String>) -> TrainConfig {
        let mut config = run.clone();
        let present = |steps: u64| (steps != 0).then_some(steps);
        if given.contains("steps") {
            config.steps = self.steps;
        }
        if given.contains("batch") {
            config.batch_size = self.batch;
        }
        if given.contains("accumulation") {
            config.accumulation = self.accumulation;
        }
        if given.contains("validate-every") {
            config.validate_every = present(self.validate_every);
        }
        if given.contains("checkpoint-every") {
            config.checkpoint_every = present(self.checkpoint_every);
        }
        if let Some(wanted) =
            self.async_checkpoint.as_ref().filter(|_| given.contains("async-checkpoint"))
        {
            config.async_checkpoint = wanted == "on";
        }
        if let Some(groups) = self.limits.groups.filter(|_| given.contains("groups")) {
            let limits = &mut config.laep.limits;
            // A multiple that was never given follows the groups.
            let follows = limits.multiple_of == config.laep.groups;
            config.laep.groups = groups;
            if groups > 0 && (follows || !limits.multiple_of.is_multiple_of(groups)) {
                limits.multiple_of = groups;
            }
        }
        if let Some(multiple_of) = self.limits.multiple_of.filter(|_| given.contains("multiple-of"))
        {
            config.laep.limits.multiple_of = multiple_of;
        }
        config
    }

    fn plan(&self) -> anyhow::Result<Option<PrunePlan>> {
        self.plan.as_deref().map(|path| file::read(path, PrunePlan::from_json)).transpose()
    }

    /// Refuses a plan of another model before any text is read.
    ///
    /// # Errors
    ///
    /// Names the file and what does not fit.
    pub fn check_plan(&self, config: &TrainConfig, model: &YuanConfig) -> anyhow::Result<()> {
        match (&config.laep.plan, &self.plan) {
            (Some(plan), Some(path)) => file::check(plan, path, model),
            _ => Ok(()),
        }
    }

    /// The model, with the vocabulary that is asked of the tokenizer.
    pub fn model_config(&self) -> YuanConfig {
        let toy = toy::model();
        let hidden = self.hidden;
        YuanConfig {
            vocab_size: self.vocab,
            hidden_size: hidden,
            attention_projection_size: 2 * hidden,
            expert_hidden_size: 2 * hidden,
            experts_per_layer: vec![self.experts; self.layers],
            localized_filter: !self.no_lfa,
            router_selection_bias: self.bias_update_rate.is_some_and(|rate| rate > 0.0),
            router_type: match self.router.as_str() {
                "attention" => RouterType::Attention,
                _ => RouterType::Linear,
            },
            max_seq_len: self.seq.max(toy.max_seq_len),
            // The published σ · √H at this width.
            init_std: 1.0 / (hidden as f64).sqrt(),
            ..toy
        }
    }
}

/// `routers:100` as what learns after a prune, and for how many steps.
fn recovery(text: &str) -> Result<Recovery, String> {
    let (learns, steps) = text
        .split_once(':')
        .ok_or("expected what learns and for how many steps, as routers:100")?;
    let steps = steps.parse().map_err(|_| format!("`{steps}` is no number of steps"))?;
    Ok(Recovery { learns: learns.parse()?, steps })
}
