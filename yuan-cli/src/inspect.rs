//! `yuan inspect`: what is in a checkpoint, from its headers alone.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use yuan::train::Inventory;

use crate::console::Console;

/// Options of `yuan inspect`.
#[derive(Args)]
pub struct Options {
    /// A run, one of its checkpoints, or a directory in Hugging Face's layout
    #[arg(value_name = "MODEL")]
    directory: PathBuf,
    /// Print JSON instead of a table
    #[arg(long, help_heading = "Output")]
    json: bool,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    let inventory = Inventory::of(&options.directory)?;
    match options.json {
        true => console.say(serde_json::to_string_pretty(&inventory)?)?,
        false => console.say(&inventory)?,
    }
    match inventory.problems.len() {
        0 => Ok(()),
        _ => bail!("{} cannot be loaded: its problems are listed", options.directory.display()),
    }
}
