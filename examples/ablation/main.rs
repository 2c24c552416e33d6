//! The paper's Tables 1 and 2 in miniature: LAEP and auxiliary losses on the same data, several
//! seeds.
//!
//!     cargo run --release --example ablation
//!
//! Runs that differ only in their prune share all steps before it: they go on from a checkpoint of
//! the base run.

mod arguments;
mod tables;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use arguments::Arguments;
use burn::tensor::Device;
use clap::Parser;
use tables::{Outcome, Variant};
use yuan::{
    model::{YuanModel, named},
    train::{
        PruneExperts, TrainConfig, Trainer,
        callback::{BalanceBias, CheckpointEvery, MetricsFile},
        checkpoint::Checkpoint,
        data::{self, RowStream, TokenStreams},
        report::{History, save},
    },
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.train_config(&Variant::base(), 0)?;
    let device = yuan::device(&arguments.device)?.autodiff();
    let documents = match &arguments.data {
        Some(directory) => data::read_directory(directory)?,
        None => {
            data::read_crate_sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))?
        }
    };
    let documents = data::thin_out(documents, arguments.megabytes * 1_000_000);
    let tokenizer = data::train_tokenizer(&documents, arguments.vocab, false)?;
    let streams = TokenStreams::new(&documents, &tokenizer)?;
    let study = Study { arguments, device, vocab: tokenizer.get_vocab_size(true), streams };

    let mut outcomes = Vec::new();
    for seed in 0..arguments.seeds {
        for lfa in [true, false] {
            let mut base = None;
            for variant in
                Variant::all(arguments.layers).into_iter().filter(|variant| variant.lfa == lfa)
            {
                let directory = arguments.out.join(format!("{}-{seed}", variant.key()));
                let outcome = study.outcome(&variant, seed, &directory, base.as_deref())?;
                let parameters = outcome.parameters as f64 / 1e6;
                note(&format!(
                    "seed {seed}  {:<34}  {parameters:>7.2} M  {:.4}",
                    variant.key(),
                    outcome.loss
                ));
                outcomes.push(outcome);
                // The first of its kind never prunes; those that do go on from it.
                base.get_or_insert(directory);
            }
            base.iter().try_for_each(|base| remove_checkpoints(base, |_| true))?;
        }
    }
    let report = tables::report(&outcomes, arguments.layers);
    save(&arguments.out.join("ablation.txt"), &report)?;
    save(&arguments.out.join("ablation.json"), &serde_json::to_string_pretty(&outcomes)?)?;
    save(&arguments.out.join("ablation.svg"), &tables::picture(&outcomes, arguments.layers)?)?;
    writeln!(std::io::stdout(), "\n{report}\nEverything is in {}", arguments.out.display())?;
    Ok(())
}

/// What all runs share.
struct Study<'a> {
    arguments: &'a Arguments,
    device: Device,
    vocab: usize,
    streams: TokenStreams,
}

impl Study<'_> {
    /// What a variant came to: read, if an earlier call has trained it, else trained now.
    fn outcome(
        &self,
        variant: &Variant,
        seed: u64,
        directory: &Path,
        base: Option<&Path>,
    ) -> anyhow::Result<Outcome> {
        let file = directory.join("outcome.json");
        // A base whose checkpoint is gone is trained again: variants may still want to go on from
        // it.
        if let Ok(text) = fs::read_to_string(&file)
            && (variant.prunes() || base.is_some())
        {
            return serde_json::from_str(&text)
                .with_context(|| format!("cannot use {}", file.display()));
        }
        let outcome = self.train(variant, seed, directory, base)?;
        save(&file, &serde_json::to_string(&outcome)?)?;
        Ok(outcome)
    }

    /// Trains a variant; one that prunes goes on from the checkpoint of `base` before its prune.
    fn train(
        &self,
        variant: &Variant,
        seed: u64,
        directory: &Path,
        base: Option<&Path>,
    ) -> anyhow::Result<Outcome> {
        if directory.exists() {
            fs::remove_dir_all(directory)
                .with_context(|| format!("cannot replace {}", directory.display()))?;
        }
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let config = self.arguments.train_config(variant, seed)?;
        let shared = match base {
            Some(base) if variant.prunes() => {
                let earlier = |checkpoint: &Checkpoint| checkpoint.step < self.arguments.prune_at;
                Checkpoint::list(base)?.into_iter().rfind(earlier)
            }
            _ => None,
        };
        let trainer = match shared {
            Some(shared) => Trainer::resume(
                config.clone(),
                directory,
                &self.device,
                &shared,
                self.rows(&config)?,
            )?,
            None => {
                // As if the first step drew the weights.
                self.device.seed(seed.wrapping_add(1));
                let model = self.arguments.model_config(variant, self.vocab, self.streams.eod);
                let model = named::initialized(YuanModel::new(&model, &self.device)?);
                Trainer::new(config.clone(), directory, &self.device, model, self.rows(&config)?)?
            }
        };
        let mut trainer = trainer
            .with_callback(BalanceBias { update_rate: config.bias_update_rate })?
            .with_callback(PruneExperts::new(config.laep.clone())?)?
            .with_callback(CheckpointEvery(config.checkpoint_every))?
            .with_callback(MetricsFile::default())?;
        trainer.run()?;
        let history = History::read(directory)?;
        let phase = history.phases().pop().context("nothing was recorded")?;
        let (_, loss) = phase.validation.context("the run was not validated")?;
        let gini = history.windows().last().map_or(0.0, |w| {
            w.statistics.iter().map(|s| s.gini).sum::<f64>() / w.statistics.len() as f64
        });
        // The tables need numbers, not gigabytes of weights; only a base is gone on from.
        let is_base = base.is_none();
        remove_checkpoints(directory, |step| !is_base || step != self.arguments.prune_at - 1)?;
        Ok(Outcome {
            variant: variant.key(),
            seed,
            parameters: phase.parameters,
            experts_per_layer: phase.experts_per_layer,
            loss,
            gini,
        })
    }

    fn rows(&self, config: &TrainConfig) -> anyhow::Result<[RowStream; 2]> {
        let rows = |tokens: &[u32], seed| {
            RowStream::new(tokens.to_vec(), self.streams.eod, config.seq_len, seed)
        };
        Ok([rows(&self.streams.train, Some(config.seed))?, rows(&self.streams.validation, None)?])
    }
}

fn remove_checkpoints(directory: &Path, which: impl Fn(u64) -> bool) -> anyhow::Result<()> {
    for checkpoint in
        Checkpoint::list(directory)?.into_iter().filter(|checkpoint| which(checkpoint.step))
    {
        let path = &checkpoint.path;
        fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

fn note(line: &str) {
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// A place for the runs.
fn default_out() -> PathBuf {
    PathBuf::from("runs/ablation")
}
