//! Models from one form to another: a run to Hugging Face's layout and back, or weights in another
//! type or files.
//!
//!     cargo run --release --example convert -- runs/pretrain exported --dtype bf16

use std::{io::Write, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, bail};
use burn::tensor::FloatDType;
use clap::Parser;
use yuan::{
    model::{
        hf::{SaveOptions, parse_shard_size},
        storage::parse_float_dtype,
    },
    train::{Inventory, ModelDirectory},
};

/// Convert a model; FROM is recognised by its files, TO is in Hugging Face's layout unless --run is
/// given.
#[derive(Parser)]
struct Arguments {
    /// A run, one of its checkpoints, or a directory in Hugging Face's layout
    from: PathBuf,
    /// Directory to write; it appears when it is complete
    to: PathBuf,
    /// Type of the weights: f32, f16 or bf16; default: as they are
    #[arg(long, value_parser = parse_float_dtype)]
    dtype: Option<FloatDType>,
    /// Largest size of one file, such as 5GB or 500MB
    #[arg(long, default_value = "5GB", value_parser = parse_shard_size, conflicts_with = "run")]
    shard_size: u64,
    /// Write a run instead, for `generate` and `pretrain --init`
    #[arg(long)]
    run: bool,
    /// Replace TO if it exists
    #[arg(long)]
    overwrite: bool,
}

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let (from, to) = (ModelDirectory::open(&arguments.from)?, &arguments.to);
    if to.exists() && !arguments.overwrite {
        bail!("{} already exists: add --overwrite to replace it", to.display());
    }
    let start = Instant::now();
    let options = SaveOptions {
        dtype: arguments.dtype,
        shard_size: arguments.shard_size,
        overwrite: arguments.overwrite,
        side_files: Vec::new(),
    };
    match &from {
        // Tensor by tensor; no model is built.
        ModelDirectory::Hf(checkpoint) if !arguments.run => {
            checkpoint.rewrite(to, None, &options)?
        }
        _ => {
            // The types are converted on the way out, so that each value is rounded once.
            let model =
                from.load(&yuan::device("flex")?, arguments.dtype.filter(|_| arguments.run))?;
            if arguments.run {
                ModelDirectory::write_run(to, &model, &from.tokenizer_files())?;
            } else {
                model
                    .save_hf(to, &SaveOptions { side_files: from.tokenizer_files(), ..options })?;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    writeln!(
        std::io::stdout(),
        "{}\nwritten to {} in {seconds:.1} s",
        Inventory::of(to)?,
        to.display()
    )
    .context("cannot write to standard output")
}
