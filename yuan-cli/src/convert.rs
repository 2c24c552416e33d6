//! `yuan convert`: models from one form to another, a run to Hugging Face's layout and back, or
//! weights in another type or other files.

use std::{path::PathBuf, time::Instant};

use anyhow::bail;
use burn::tensor::FloatDType;
use clap::Args;
use yuan::{
    model::{
        hf::{SaveOptions, parse_shard_size},
        host_device,
        storage::parse_float_dtype,
    },
    train::{Inventory, ModelDirectory},
};

use crate::console::Console;

/// Options of `yuan convert`; FROM is recognised by its files, TO is in Hugging Face's layout unless
/// --run is given.
#[derive(Args)]
pub struct Options {
    /// A run, one of its checkpoints, or a directory in Hugging Face's layout
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// Directory to write; it appears when it is complete
    #[arg(value_name = "TO")]
    to: PathBuf,
    /// Type of the weights: f32, f16 or bf16; default: as they are
    #[arg(long, value_name = "TYPE", value_parser = parse_float_dtype, help_heading = "Output")]
    dtype: Option<FloatDType>,
    /// Largest size of one file, such as 5GB or 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_shard_size)]
    #[arg(conflicts_with = "run", help_heading = "Output")]
    shard_size: u64,
    /// Write the first checkpoint of a run instead, for `yuan generate` and `yuan pretrain --init`
    #[arg(long, help_heading = "Output")]
    run: bool,
    /// Replace TO if it exists
    #[arg(long, help_heading = "Output")]
    overwrite: bool,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    let (from, to) = (ModelDirectory::open(&options.from)?, &options.to);
    if to.exists() && !options.overwrite {
        bail!("{} already exists: add --overwrite to replace it", to.display());
    }
    let start = Instant::now();
    let save = SaveOptions {
        dtype: options.dtype,
        shard_size: options.shard_size,
        overwrite: options.overwrite,
        side_files: Vec::new(),
    };
    match &from {
        // Tensor by tensor; no model is built.
        ModelDirectory::Hf(checkpoint) if !options.run => checkpoint.rewrite(to, None, &save)?,
        _ => {
            // The types are converted on the way out, so that each value is rounded once.
            let model = from.load(&host_device(), options.dtype.filter(|_| options.run))?;
            if options.run {
                ModelDirectory::write_run(to, &model, &from.tokenizer_files())?;
            } else {
                model.save_hf(to, &SaveOptions { side_files: from.tokenizer_files(), ..save })?;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let inventory = Inventory::of(to)?;
    console.say(format_args!("{inventory}\nwritten to {} in {seconds:.1} s", to.display()))
}
