//! A dry run of LAEP: what would be pruned, and where the rest would sit, from loads alone.
//!
//!     cargo run --release --example plan -- LOADS.json --beta 0.1 --multiple-of 2 --groups 2

use std::{fs, io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use serde_json::json;
use yuan_laep::{LoadWindow, PruneLimits, PrunePlan};

/// Plan a layer-adaptive expert prune from token loads, without loading a model.
#[derive(Parser)]
struct Arguments {
    /// File with {"layers": [[tokens of expert 0, …], …]}
    loads: PathBuf,
    /// Individual load constraint: an expert may go if its load is at most alpha times the mean; a number or "inf"
    #[arg(long, default_value = "inf")]
    alpha: f64,
    /// Cumulative load constraint: the pruned experts of a layer carry at most this share of its load
    #[arg(long, default_value_t = 0.1)]
    beta: f64,
    /// Round the kept experts of each layer up to a multiple of this
    #[arg(long, default_value_t = 1, value_name = "M")]
    multiple_of: usize,
    /// Keep at least this many experts in each layer
    #[arg(long, default_value_t = 1, value_name = "K")]
    min_experts: usize,
    /// Experts that each token visits; no layer keeps fewer
    #[arg(long, default_value_t = 1, value_name = "K")]
    top_k: usize,
    /// Spread the kept experts over this many device groups
    #[arg(long, default_value_t = 1, value_name = "G")]
    groups: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line with all causes, whatever RUST_BACKTRACE says; a closed pipe is no failure.
            drop(writeln!(std::io::stderr(), "Error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let path = arguments.loads.display();
    let text = fs::read_to_string(&arguments.loads).with_context(|| format!("cannot read {path}"))?;
    let loads = LoadWindow::from_json(&text).with_context(|| format!("cannot use {path}"))?;
    let limits = PruneLimits {
        alpha: arguments.alpha,
        beta: arguments.beta,
        multiple_of: arguments.multiple_of,
        min_experts: arguments.min_experts,
        top_k: arguments.top_k,
        max_pruned_fraction: None,
    };
    let plan = PrunePlan::new(&loads.layers, &limits, arguments.groups)?;
    let output = if arguments.json {
        let layer =
            |l: &yuan_laep::LayerPlan| json!({"kept": l.kept, "pruned": l.pruned, "groups": l.groups});
        json!({"layers": plan.layers.iter().map(layer).collect::<Vec<_>>()}).to_string()
    } else {
        plan.to_string()
    };
    writeln!(std::io::stdout(), "{output}").context("cannot write to standard output")
}
