//! The prediction of a run beside what it measured.

use std::path::Path;

use anyhow::Context;
use yuan::{report::History, train::Event};

use crate::console::Console;

/// The prediction of a run beside what it measured.
pub fn compare(run: &Path, console: &Console) -> anyhow::Result<()> {
    let history = History::read(run)?;
    let stages = history.stages();
    let prunes = history.lasting().filter_map(|(_, event)| match event {
        Event::Prune { step, predicted_gain, .. } => Some((*step, *predicted_gain)),
        _ => None,
    });
    console.say(format_args!(
        "{:>5}  {:>14}  {:>13}  {:>9}  {:>9}",
        "prune", "tokens/s before", "after", "measured", "predicted"
    ))?;
    let mut any = false;
    for ((step, predicted), pair) in prunes.zip(stages.windows(2)) {
        let (Some(before), Some(after)) = (pair[0].tokens_per_second, pair[1].tokens_per_second)
        else {
            continue;
        };
        let predicted = predicted.context("the run was made without a prediction of its speed")?;
        console.say(format_args!(
            "{step:>5}  {before:>15.0}  {after:>13.0}  {:>8.1}%  {:>8.1}%",
            100.0 * (after / before - 1.0),
            100.0 * (predicted - 1.0)
        ))?;
        any = true;
    }
    anyhow::ensure!(any, "{} holds no run with a prune and steps after it", run.display());
    Ok(())
}
