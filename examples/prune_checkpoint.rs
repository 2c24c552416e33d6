//! Prune published weights by a plan, tensor by tensor: the model is never in memory.
//!
//!     cargo run --release --example prune_checkpoint -- FROM PLAN.json TO

use std::{fs, io::Write, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, bail};
use burn::tensor::FloatDType;
use clap::Parser;
use yuan::{
    laep::PrunePlan,
    model::{
        hf::{SaveOptions, parse_shard_size},
        storage::parse_float_dtype,
    },
    train::{Inventory, ModelDirectory},
};

/// Apply a plan of `plan --save` or of a run's LAEP to a directory in Hugging Face's layout.
#[derive(Parser)]
struct Arguments {
    /// Directory in Hugging Face's layout
    from: PathBuf,
    /// The plan: which experts of every layer are kept, in which order
    plan: PathBuf,
    /// Directory to write; it appears when it is complete
    to: PathBuf,
    /// Type of the weights: f32, f16 or bf16; default: as they are
    #[arg(long, value_parser = parse_float_dtype)]
    dtype: Option<FloatDType>,
    /// Largest size of one file, such as 5GB or 500MB
    #[arg(long, default_value = "5GB", value_parser = parse_shard_size)]
    shard_size: u64,
    /// Replace TO if it exists
    #[arg(long)]
    overwrite: bool,
}

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let (path, to) = (arguments.plan.display(), &arguments.to);
    let text =
        fs::read_to_string(&arguments.plan).with_context(|| format!("cannot read {path}"))?;
    let plan = PrunePlan::from_json(&text).with_context(|| format!("cannot use {path}"))?;
    let ModelDirectory::Hf(checkpoint) = ModelDirectory::open(&arguments.from)? else {
        bail!(
            "{} is a run: `convert` makes it a directory in Hugging Face's layout",
            arguments.from.display()
        );
    };
    let config = checkpoint.config();
    let fits = plan.check_against(&config.experts_per_layer, config.moe_top_k);
    fits.with_context(|| format!("{path} is no plan for this model"))?;
    if to.exists() && !arguments.overwrite {
        bail!("{} already exists: add --overwrite to replace it", to.display());
    }
    let kept: Vec<Vec<usize>> = plan.layers.iter().map(|layer| layer.kept.clone()).collect();
    let options = SaveOptions {
        dtype: arguments.dtype,
        shard_size: arguments.shard_size,
        overwrite: arguments.overwrite,
        side_files: Vec::new(),
    };
    let (before, start) = (Inventory::of(&arguments.from)?, Instant::now());
    checkpoint.rewrite(to, Some(&kept), &options)?;
    let (after, seconds) = (Inventory::of(to)?, start.elapsed().as_secs_f64());
    let pruned = 100.0 * (1.0 - after.parameters as f64 / before.parameters as f64);
    writeln!(
        std::io::stdout(),
        "{after}\n\n{} → {} parameters ({pruned:.1} % pruned), written to {} in {seconds:.1} s",
        before.parameters,
        after.parameters,
        to.display()
    )
    .context("cannot write to standard output")
}
