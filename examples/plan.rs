//! A dry run of LAEP: what would be pruned, and where the rest would sit, from loads alone.
//!
//!     cargo run --release --example plan -- LOADS.json --beta 0.1 --multiple-of 2 --groups 2
//!
//! What if the limits were others? A table, and a picture:
//!
//!     cargo run --release --example plan -- LOADS.json --sweep --picture sweep.svg

use std::{fs, io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use serde_json::json;
use yuan::train::report::{pictures, save};
use yuan_laep::{LoadFile, ModelSize, PerLayer, PruneLimits, PrunePlan, WhatIf};

/// Plan a layer-adaptive expert prune from token loads, without loading a model.
#[derive(Parser)]
struct Arguments {
    /// File with {"layers": [[tokens of expert 0, …], …]}, or the directory of a run, which holds a
    /// loads.json
    loads: PathBuf,
    /// Individual load constraint: an expert may go if its load is at most alpha times the mean; a
    /// number or "inf", or one for each layer (0.2,0.4,inf)
    #[arg(long, default_value = "inf")]
    alpha: PerLayer,
    /// Cumulative load constraint: the pruned experts of a layer carry at most this share of its
    /// load; a number, or one for each layer
    #[arg(long, default_value = "0.1")]
    beta: PerLayer,
    /// Round the kept experts of each layer up to a multiple of this
    #[arg(long, default_value_t = 1, value_name = "M")]
    multiple_of: usize,
    /// Keep at least this many experts in each layer
    #[arg(long, default_value_t = 1, value_name = "K")]
    min_experts: usize,
    /// Experts that each token visits; no layer keeps fewer [default: the run's, else 1]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Spread the kept experts over this many device groups
    #[arg(long, default_value_t = 1, value_name = "G")]
    groups: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Write the plan, to be applied by `pretrain --plan`
    #[arg(long, value_name = "PLAN.json", conflicts_with = "sweep")]
    save: Option<PathBuf>,
    /// Try every alpha of --alphas with every beta of --betas instead
    #[arg(long, conflicts_with_all = ["alpha", "beta"])]
    sweep: bool,
    /// Values of alpha to try
    #[arg(long, value_delimiter = ',', default_value = "0.2,0.4,0.6,inf", requires = "sweep")]
    alphas: Vec<f64>,
    /// Values of beta to try
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "0.02,0.05,0.1,0.15,0.2,0.3",
        requires = "sweep"
    )]
    betas: Vec<f64>,
    /// Draw the sweep
    #[arg(long, value_name = "SVG", requires = "sweep")]
    picture: Option<PathBuf>,
}

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let file = if arguments.loads.is_dir() {
        arguments.loads.join("loads.json")
    } else {
        arguments.loads.clone()
    };
    let path = file.display();
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {path}"))?;
    let loads = LoadFile::from_json(&text).with_context(|| format!("cannot use {path}"))?;
    let limits = PruneLimits {
        alpha: arguments.alpha.clone(),
        beta: arguments.beta.clone(),
        multiple_of: arguments.multiple_of,
        min_experts: arguments.min_experts,
        top_k: arguments.top_k.or(loads.model.map(|model| model.top_k)).unwrap_or(1),
        max_pruned_fraction: None,
    };
    let (layers, groups) = (&loads.window.layers, arguments.groups);
    let output = if arguments.sweep {
        let rows = WhatIf::sweep(
            layers,
            &limits,
            groups,
            loads.model,
            &arguments.alphas,
            &arguments.betas,
        )?;
        if let Some(picture) = &arguments.picture {
            save(picture, &pictures::sweep(&rows)?)?;
        }
        if arguments.json { json!({ "sweep": rows }).to_string() } else { WhatIf::table(&rows) }
    } else {
        let plan = PrunePlan::new(layers, &limits, groups)?;
        if let Some(path) = &arguments.save {
            save(path, &plan.to_json())?;
        }
        if arguments.json { plan_json(&plan) } else { dry_run(&plan, loads.model) }
    };
    writeln!(std::io::stdout(), "{}", output.trim_end()).context("cannot write to standard output")
}

/// The plan as a table, and what it would save and cost.
fn dry_run(plan: &PrunePlan, size: Option<ModelSize>) -> String {
    format!("{plan}\n\n{}", WhatIf::table(&[WhatIf::of(plan, size)]))
}

fn plan_json(plan: &PrunePlan) -> String {
    let layer =
        |l: &yuan_laep::LayerPlan| json!({"kept": l.kept, "pruned": l.pruned, "groups": l.groups});
    json!({"layers": plan.layers.iter().map(layer).collect::<Vec<_>>()}).to_string()
}
