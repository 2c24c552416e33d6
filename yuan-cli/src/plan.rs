//! `yuan plan`: a dry run of LAEP, from loads alone, and the same under many limits.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use yuan::{
    files::write_whole,
    laep::{ExpertLayout, LayerPlan, LoadFile, ModelSize, PruneLimits, PrunePlan, WhatIf},
    report::pictures,
    train::{PruneExperts, Run, TrainError},
};

use crate::{console::Console, limits::LimitOptions};

pub mod file;

/// Options of `yuan plan`.
#[derive(Args)]
#[command(after_help = "Of a run, the limits that are not given are the run's own: without any, \
    the plan is the one that the run makes of its first loads. Groups that do not divide the \
    multiple become it. Of a file they are alpha inf, beta 0.1, \
    multiple-of 1, min-experts 1 and groups 1.")]
pub struct Options {
    /// Directory of a run, or a file with {"layers": [[tokens of expert 0, …], …]}
    #[arg(value_name = "RUN|LOADS.json")]
    loads: PathBuf,
    #[command(flatten)]
    limits: LimitOptions,
    /// Experts that each token visits; no layer keeps fewer [default: the run's, else 1]
    #[arg(long, value_name = "EXPERTS", help_heading = "LAEP")]
    top_k: Option<usize>,
    /// Try every alpha of --alphas with every beta of --betas instead
    #[arg(long, conflicts_with_all = ["alpha", "beta"], help_heading = "LAEP")]
    sweep: bool,
    /// Values of alpha to try
    #[arg(long, value_name = "TIMES_THE_MEAN", value_delimiter = ',', requires = "sweep")]
    #[arg(default_value = "0.2,0.4,0.6,inf", help_heading = "LAEP")]
    alphas: Vec<f64>,
    /// Values of beta to try
    #[arg(long, value_name = "SHARES", value_delimiter = ',', requires = "sweep")]
    #[arg(default_value = "0.02,0.05,0.1,0.15,0.2,0.3", help_heading = "LAEP")]
    betas: Vec<f64>,
    /// Print the kept and pruned experts as JSON instead of a table; a plan to apply is written by
    /// --save
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Write the plan, to be applied by `yuan pretrain --plan` or `yuan prune`
    #[arg(long, value_name = "PLAN.json", conflicts_with = "sweep", help_heading = "Output")]
    save: Option<PathBuf>,
    /// Draw the sweep
    #[arg(long, value_name = "SVG", requires = "sweep", help_heading = "Output")]
    picture: Option<PathBuf>,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    let (path, limits, groups) = source(&options.loads, console)?;
    let loads = file::read(&path, LoadFile::from_json)?;
    let limits = options.limits.over(limits);
    let layout = ExpertLayout {
        top_k: options.top_k.or(loads.model.map(|model| model.top_k)).unwrap_or(1),
        groups: options.limits.groups.unwrap_or(groups),
    };
    let layers = &loads.window.layers;
    let output = if options.sweep {
        let (alphas, betas) = (&options.alphas, &options.betas);
        let rows = WhatIf::sweep(layers, &limits, layout, loads.model, alphas, betas)?;
        if let Some(picture) = &options.picture {
            write_whole(picture, pictures::sweep(&rows)?.as_bytes())?;
        }
        match options.json {
            true => json!({ "sweep": rows }).to_string(),
            false => WhatIf::table(&rows),
        }
    } else {
        let plan = PrunePlan::new(layers, &limits, layout)?;
        if let Some(path) = &options.save {
            write_whole(path, plan.to_json().as_bytes())?;
        }
        if options.json { plan_json(&plan) } else { dry_run(&plan, loads.model) }
    };
    console.say(output.trim_end())
}

/// The file of loads, and the limits and groups that hold unless others are given.
fn source(path: &Path, console: &Console) -> anyhow::Result<(PathBuf, PruneLimits, usize)> {
    if !path.is_dir() {
        return Ok((path.to_path_buf(), PruneLimits::default(), 1));
    }
    let file = path.join(PruneExperts::LOADS);
    match Run::open(path) {
        Ok(run) if !file.is_file() => anyhow::bail!(
            "{} has no loads yet: the first window is complete after {} steps",
            path.display(),
            run.config().laep.window_steps
        ),
        Ok(run) => {
            let laep = &run.config().laep;
            if laep.plan.is_some() {
                console.note(
                    "The run was given a plan (`plan` in run.json); this is the plan that its own \
                     loads would give.",
                );
            }
            Ok((file, laep.limits.clone(), laep.groups))
        }
        // Loads without the settings that they were made with.
        Err(TrainError::NoRun(_)) => Ok((file, PruneLimits::default(), 1)),
        Err(error) => Err(error.into()),
    }
}

/// The plan as a table, and what it would save and cost.
fn dry_run(plan: &PrunePlan, size: Option<ModelSize>) -> String {
    format!("{plan}\n\n{}", WhatIf::table(&[WhatIf::of(plan, size)]))
}

fn plan_json(plan: &PrunePlan) -> String {
    let layer = |l: &LayerPlan| json!({"kept": l.kept, "pruned": l.pruned, "groups": l.groups});
    json!({"layers": plan.layers.iter().map(layer).collect::<Vec<_>>()}).to_string()
}
