//! Files that a command reads as JSON: loads, and plans for a model.

use std::{error::Error, fs, path::Path};

use anyhow::Context;
use yuan::{laep::PrunePlan, model::YuanConfig};

/// Reads a file and makes of its text what `parse` does; an error names the file.
pub fn read<T, E>(path: &Path, parse: fn(&str) -> Result<T, E>) -> anyhow::Result<T>
where
    E: Error + Send + Sync + 'static,
{
    let shown = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    parse(&text).with_context(|| format!("cannot use {shown}"))
}

/// Refuses a plan, read from `path`, that does not fit the model.
pub fn check(plan: &PrunePlan, path: &Path, model: &YuanConfig) -> anyhow::Result<()> {
    plan.check_against(&model.experts_per_layer, model.top_k)
        .with_context(|| format!("{} is no plan for this model", path.display()))
}
