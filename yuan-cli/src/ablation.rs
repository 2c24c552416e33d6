//! `yuan ablation`: the paper's Tables 1 and 2 in miniature, LAEP and auxiliary losses on the same
//! data, several seeds.
//!
//! Runs that differ only in their prune share all steps before it: they go on from a checkpoint of
//! the base run.

use std::{ffi::OsStr, fs, path::Path};

use anyhow::{Context, bail};
use burn::tensor::Device;
use yuan::{
    data::{Dataset, prepare_documents, thin_out, tokenizer},
    files::write_whole,
    report::History,
    toy,
    train::{
        Checkpoint, MetricsFile, RunLock, Trainer,
        data::{DataSet, DataSets},
        fresh_model,
    },
};

use crate::{
    console::{Console, WrongOption},
    text::read_text,
};

mod options;
mod tables;
mod variants;

pub use options::Options;
use variants::{Outcome, Variant};

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    options.train_config(&Variant::base(), 0).wrong_option()?;
    // The tokenizer says later how many entries there are, and which ends a document.
    options.model_config(&Variant::base(), options.vocab, 0).validate().wrong_option()?;
    let device = yuan::device(&options.device).wrong_option()?.autodiff();
    let _lock = claim(options)?;
    let dataset = dataset(options, console)?;
    let set = DataSet::of_dataset("text".into(), 1.0, DATA.into(), &dataset);
    let data = DataSets { sets: vec![set] };
    let (vocab, eod) = (dataset.info().vocab_size, dataset.info().eod);
    let study = Study { options, device, vocab, eod, data };

    let mut outcomes = Vec::new();
    for seed in 0..options.seeds {
        for lfa in [true, false] {
            let mut base = None;
            for variant in
                Variant::all(options.layers).into_iter().filter(|variant| variant.lfa == lfa)
            {
                let directory = options.out.join(format!("{}-{seed}", variant.key()));
                let outcome = study.outcome(&variant, seed, &directory, base.as_deref())?;
                let parameters = outcome.parameters as f64 / 1e6;
                console.note(format_args!(
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
    let report = tables::report(&outcomes, options.layers);
    let write = |name: &str, text: &str| write_whole(&options.out.join(name), text.as_bytes());
    write("ablation.txt", &report)?;
    write("ablation.json", &serde_json::to_string_pretty(&outcomes)?)?;
    write("ablation.svg", &tables::picture(&outcomes, options.layers)?)?;
    console.say(format_args!("\n{report}\nEverything is in {}", options.out.display()))
}

/// Name of the directory with the tokens of all runs.
const DATA: &str = "data";

/// The tokens of all runs, made now or by an earlier call.
fn dataset(options: &Options, console: &Console) -> anyhow::Result<Dataset> {
    let directory = options.out.join(DATA);
    if Dataset::is_in(&directory) {
        return Ok(Dataset::open(&directory)?);
    }
    let documents = match &options.data {
        Some(path) => read_text(path, console)?,
        None => toy::corpus()?,
    };
    let documents = thin_out(documents, options.megabytes.saturating_mul(1_000_000));
    let texts = documents.iter().map(|document| document.text.clone());
    let tokenizer = tokenizer::train(texts, options.vocab, false)?;
    Ok(prepare_documents(&directory, documents, &tokenizer, tokenizer::END_OF_DOCUMENT, 0.05)?)
}

/// Takes the directory for these settings: it is empty, or holds an ablation with the same.
fn claim(options: &Options) -> anyhow::Result<RunLock> {
    let (file, shown) = (options.out.join("settings.json"), options.out.display());
    let settings = serde_json::to_string_pretty(options)?;
    let is_lock = |name: &OsStr| name == RunLock::FILE;
    let mut found = options.out.read_dir().into_iter().flatten().flatten();
    let is_taken = found.any(|entry| !is_lock(&entry.file_name()));
    if is_taken && !file.exists() {
        bail!("{shown} holds no ablation: name an empty directory with --out");
    }
    fs::create_dir_all(&options.out).with_context(|| format!("cannot create {shown}"))?;
    let lock = RunLock::take(&options.out)?;
    match fs::read_to_string(&file) {
        Ok(earlier) if earlier == settings => {}
        Ok(_) => bail!(
            "{shown} holds an ablation with other settings (settings.json): name another directory \
             with --out"
        ),
        Err(_) => write_whole(&file, settings.as_bytes())?,
    }
    Ok(lock)
}

/// What all runs share.
struct Study<'a> {
    options: &'a Options,
    device: Device,
    vocab: usize,
    eod: u32,
    data: DataSets,
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
        write_whole(&file, serde_json::to_string(&outcome)?.as_bytes())?;
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
        let config = self.options.train_config(variant, seed)?;
        let shared = match base {
            Some(base) if variant.prunes() => {
                let earlier = |checkpoint: &Checkpoint| checkpoint.step < self.options.prune_at;
                Checkpoint::list(base)?.into_iter().rfind(earlier)
            }
            _ => None,
        };
        let streams = self.data.streams(&self.options.out, &config, self.eod, self.vocab)?;
        let trainer = match shared {
            Some(shared) => Trainer::resume(config, directory, &self.device, &shared, streams)?,
            None => {
                let model = self.options.model_config(variant, self.vocab, self.eod);
                let model = fresh_model(&model, seed, &self.device)?;
                Trainer::new(config, directory, &self.device, model, streams)?
            }
        };
        trainer.with_callback(MetricsFile::default())?.run()?;
        let history = History::read(directory)?;
        let stage = history.stages().pop().context("nothing was recorded")?;
        let (_, loss) = stage.validation.context("the run was not validated")?;
        let gini = history.windows().last().map_or(0.0, |w| {
            w.statistics.iter().map(|s| s.gini).sum::<f64>() / w.statistics.len() as f64
        });
        // The tables need numbers, not gigabytes of weights; only a base is gone on from.
        let is_base = base.is_none();
        remove_checkpoints(directory, |step| !is_base || step != self.options.prune_at - 1)?;
        Ok(Outcome {
            variant: variant.key(),
            seed,
            parameters: stage.parameters,
            experts_per_layer: stage.experts_per_layer,
            loss,
            gini,
        })
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
