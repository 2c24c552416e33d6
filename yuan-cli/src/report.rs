//! `yuan report`: table, pictures and page of a run, drawn anew from its metrics.

use std::path::PathBuf;

use clap::Args;
use yuan::report::Report;

use crate::console::Console;

/// Options of `yuan report`.
#[derive(Args)]
pub struct Options {
    /// Directory of the run
    #[arg(value_name = "RUN")]
    run: PathBuf,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    let report = Report::of(&options.run)?;
    report.save()?;
    console.say(report.table())?;
    say_where(&report, console)
}

/// Says where the page is.
pub fn say_where(report: &Report, console: &Console) -> anyhow::Result<()> {
    let page = report.page();
    console.say(format_args!(
        "The report is {}; metrics, plan and checkpoints are beside it",
        page.display()
    ))
}
