//! `yuan inspect`: what is in a checkpoint, from its headers alone.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use yuan::train::{Inventory, Run, problems_of_run};

use crate::console::Console;

/// Options of `yuan inspect`.
#[derive(Args)]
pub struct Options {
    /// A run, one of its checkpoints, or a directory in Hugging Face's layout
    #[arg(value_name = "MODEL")]
    directory: PathBuf,
    /// Read every file of a run and compare it with its checksum
    #[arg(long)]
    verify: bool,
    /// Print JSON instead of a table
    #[arg(long, help_heading = "Output")]
    json: bool,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    let inventory = match Inventory::checked(&options.directory, options.verify) {
        Ok(inventory) => inventory,
        Err(error) => {
            // Of a run, what else is wrong is worth knowing.
            if options.directory.join(Run::SETTINGS).exists() && !options.json {
                for problem in problems_of_run(&options.directory, options.verify)? {
                    console.say(format_args!("  {problem}"))?;
                }
            }
            return Err(error.into());
        }
    };
    match options.json {
        true => console.say(serde_json::to_string_pretty(&inventory)?)?,
        false => console.say(&inventory)?,
    }
    match inventory.problems.len() {
        0 => Ok(()),
        1 => bail!("{} has a problem, which is listed", options.directory.display()),
        count => bail!("{} has {count} problems, which are listed", options.directory.display()),
    }
}
