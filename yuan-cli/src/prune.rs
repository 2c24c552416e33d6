//! `yuan prune`: prune published weights by a plan; the model is never in memory.

use std::{path::PathBuf, time::Instant};

use anyhow::bail;
use clap::Args;
use yuan::{
    laep::PrunePlan,
    train::{Inventory, ModelDirectory},
};

use crate::{
    console::Console,
    plan::file,
    weights::{self, WeightOptions},
};

/// Options of `yuan prune`.
#[derive(Args)]
pub struct Options {
    /// Directory in Hugging Face's layout
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// The plan, as `yuan plan --save` writes it: which experts of every layer are kept, in which
    /// order
    #[arg(value_name = "PLAN.json")]
    plan: PathBuf,
    /// Directory to write; it appears when it is complete
    #[arg(value_name = "TO")]
    to: PathBuf,
    #[command(flatten)]
    weights: WeightOptions,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    let (path, to) = (&options.plan, &options.to);
    let plan = file::read(path, PrunePlan::from_json)?;
    let ModelDirectory::Hf(checkpoint) = weights::open(&options.from, console)? else {
        bail!(
            "{} is a run: `yuan convert` makes it a directory in Hugging Face's layout",
            options.from.display()
        );
    };
    file::check(&plan, path, checkpoint.config())?;
    let _lock = options.weights.check_free(&options.from, to)?;
    let (before, start) = (Inventory::of(&options.from)?, Instant::now());
    let save = options.weights.save_options(Vec::new());
    options.weights.warn(&checkpoint.rewrite(to, Some(&plan.kept()), &save)?, console);
    let (after, seconds) = (Inventory::of(to)?, start.elapsed().as_secs_f64());
    let pruned = 100.0 * (1.0 - after.parameters as f64 / before.parameters as f64);
    console.say(format_args!(
        "{after}\n\n{} → {} parameters ({pruned:.1} % pruned), written to {} in {seconds:.1} s",
        before.parameters,
        after.parameters,
        to.display()
    ))
}
