//! What is in a checkpoint, from its headers alone.
//!
//!     cargo run --release --example inspect -- runs/pretrain

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use yuan::train::Inventory;

/// Show tensors, sizes, experts per layer and types of a model, and what is wrong with it.
#[derive(Parser)]
struct Arguments {
    /// A run, one of its checkpoints, or a directory in Hugging Face's layout
    directory: PathBuf,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let inventory = Inventory::of(&arguments.directory)?;
    let text = if arguments.json {
        serde_json::to_string_pretty(&inventory)?
    } else {
        inventory.to_string()
    };
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")?;
    // 2: shown, but it cannot be loaded.
    Ok(if inventory.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}
