//! `yuan convert`: models from one form to another, a run to Hugging Face's layout and back, or
//! weights in another type or other files.

use std::{path::PathBuf, time::Instant};

use clap::Args;
use yuan::{
    model::host_device,
    train::{Inventory, ModelDirectory},
};

use crate::{
    console::Console,
    weights::{self, WeightOptions},
};

/// Options of `yuan convert`; FROM is recognised by its files, TO is in Hugging Face's layout
/// unless
/// --run is given.
#[derive(Args)]
pub struct Options {
    /// A run, one of its checkpoints, or a directory in Hugging Face's layout
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// Directory to write; it appears when it is complete
    #[arg(value_name = "TO")]
    to: PathBuf,
    #[command(flatten)]
    weights: WeightOptions,
    /// Write the first checkpoint of a run instead, for `yuan generate` and `yuan pretrain --init`
    #[arg(long, help_heading = "Output", conflicts_with_all = ["shard_size", "allow_overflow"])]
    run: bool,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    let from = match options.run {
        true => ModelDirectory::open(&options.from)?,
        false => weights::open(&options.from, console)?,
    };
    let to = &options.to;
    let _lock = options.weights.check_free(&options.from, to)?;
    let start = Instant::now();
    match &from {
        // Tensor by tensor; no model is built.
        ModelDirectory::Hf(checkpoint) if !options.run => {
            let saved = checkpoint.rewrite(to, None, &options.weights.save_options(Vec::new()))?;
            options.weights.warn(&saved, console);
        }
        ModelDirectory::Run { checkpoint, .. } if !options.run => {
            let save = options.weights.save_options(from.tokenizer_files());
            options.weights.warn(&checkpoint.save_hf(to, &save)?, console);
        }
        _ => {
            let model = from.load(&host_device(), options.weights.dtype)?;
            ModelDirectory::write_run(to, &model, &from.tokenizer_files())?;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let inventory = Inventory::of(to)?;
    console.say(format_args!("{inventory}\nwritten to {} in {seconds:.1} s", to.display()))
}
