//! `yuan pretrain`: a run from text to report.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use yuan::{
    model::{DeviceMesh, REMOTE, files::write_whole, ops},
    prelude::*,
    toy,
    train::{Display, ModelDirectory, Watch, check_mesh, check_settings, data, peak_resident},
};

use crate::{
    console::{Console, WrongOption},
    report,
};

mod options;

pub use options::Options;

/// Name of the file in a run that holds the options it was made with.
const OPTIONS: &str = "options.toml";

/// `given` writes the options that were given as a file for `--config`.
pub fn run(
    options: &Options,
    console: &Console,
    given: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    ops::set_fast_paths(!options.portable);
    let mut devices = Vec::new();
    for name in &options.device {
        devices.push(yuan::device(name).wrong_option()?);
    }
    let mesh = DeviceMesh::new(devices, options.data_parallel).wrong_option()?.autodiff();
    let run = match &options.run {
        Some(directory) if options.resume => Run::open(directory)?,
        directory => {
            let directory = directory.clone().unwrap_or_else(first_free);
            let run = create(options, console, &directory, &mesh)?;
            write_whole(&directory.join(OPTIONS), given().as_bytes())?;
            run
        }
    };
    train(&run, options, console, mesh)?;
    close(&run, console)
}

/// Prepares a new run; whatever is wrong with the options is said before any text is read.
fn create(
    options: &Options,
    console: &Console,
    directory: &Path,
    mesh: &DeviceMesh,
) -> anyhow::Result<Run> {
    let init = options.init.as_deref().map(ModelDirectory::open).transpose()?;
    let config = options.train_config()?;
    let model = match &init {
        Some(init) => init.config().clone(),
        None => options.model_config(),
    };
    model.validate().wrong_option()?;
    options.check_plan(&config, &model)?;
    check_settings(&config, &model).wrong_option()?;
    check_mesh(&config, &model, mesh).wrong_option()?;
    Run::check_free(directory)?;
    let documents = match &options.data {
        Some(directory) => data::read_directory(directory)?,
        None => toy::corpus()?,
    };
    let bytes: usize = documents.iter().map(|document| document.text.len()).sum();
    console.note(format!("{} documents, {:.1} MB of text", documents.len(), bytes as f64 / 1e6));
    let prunes = config.laep.trigger != Trigger::Never;
    let mut new = match init {
        Some(init) => NewRun::from_model(config, init, documents),
        None => {
            console.note("training the tokenizer");
            NewRun::new(config, model, documents).with_progress(console.shows_progress())
        }
    };
    if prunes {
        // Measuring takes a moment, which only a prediction is worth.
        new = new.with_speed_prediction(mesh.clone());
    }
    let run = Run::create(directory, new)?;
    let [train, validation] = run.tokens();
    console.note(format_args!("{train} tokens to train on, {validation} to validate"));
    Ok(run)
}

/// Trains to the end; devices of other processes are watched, and given up when one is lost.
fn train(run: &Run, options: &Options, console: &Console, mesh: DeviceMesh) -> anyhow::Result<()> {
    let display = || {
        let display = Display::new(console.steps_between_lines());
        if console.is_quiet() { None } else { Some(display) }
    };
    let is_remote = options.device.iter().any(|name| name.starts_with(REMOTE));
    if let ([device], false) = (mesh.devices(), is_remote) {
        let trainer = run.trainer(device)?;
        return Ok(shown(trainer, display())?.run()?);
    }
    let servers = options.device.iter().filter_map(|name| name.strip_prefix(REMOTE));
    let watch = Watch {
        servers: servers.map(str::to_owned).collect(),
        patience: Duration::from_secs(options.patience),
    };
    let (run, display) = (run.clone(), display());
    watch.supervise(move |pulse| {
        let trainer = run.trainer_on_mesh(&mesh)?.with_callback(pulse)?;
        Ok(shown(trainer, display)?.run()?)
    })
}

fn shown<M: LanguageModel>(
    trainer: Trainer<M>,
    display: Option<Display>,
) -> Result<Trainer<M>, TrainError> {
    match display {
        Some(display) => trainer.with_callback(display),
        None => Ok(trainer),
    }
}

/// Writes the report and says what came of the run.
fn close(run: &Run, console: &Console) -> anyhow::Result<()> {
    let report = Report::of(run.directory())?;
    report.save()?;
    console.say(format_args!("\n{}", report.table()))?;
    if report.history().prunes().next().is_none() {
        let why = match &run.config().laep.trigger {
            _ if report.history().undone().next().is_some() => "the guard undid the prune",
            Trigger::Never => "LAEP was off",
            Trigger::Steps(_) => "the run ended before the step to prune at",
            Trigger::Stable { .. } => "the loads of all layers were never stable",
        };
        console.say(format_args!("Nothing was pruned: {why}."))?;
    }
    if let Some(peak) = peak_resident() {
        let gigabytes = peak as f64 / 1e9;
        console.say(format_args!("Peak memory of the process: {gigabytes:.2} GB."))?;
    }
    report::say_where(&report, console)
}

/// The first of runs/pretrain, runs/pretrain-2, … that is free.
fn first_free() -> PathBuf {
    let default = PathBuf::from("runs/pretrain");
    let numbered = (2..).map(|number| PathBuf::from(format!("runs/pretrain-{number}")));
    let mut candidates = std::iter::once(default.clone()).chain(numbered);
    candidates.find(|path| Run::is_free(path)).unwrap_or(default)
}
