//! `yuan pretrain`: a run from text to report.

use std::{collections::BTreeSet, path::Path, time::Duration};

use anyhow::{Context, anyhow, bail};
use yuan::{
    data::tokenizer::SMALLEST_VOCABULARY,
    model::{
        ops,
        ranks::{Grid, Meeting, Ranks, connect},
    },
    prelude::*,
    report::History,
    rl, toy,
    train::{
        Checkpoint, Claim, Display, ModelDirectory, RunData, check_ranks, check_rows,
        check_settings,
        data::{ConversationCounts, DataKind, PageCounts},
        peak_resident,
    },
};

use crate::{
    console::{Console, Interrupted, WrongOption},
    ranks, report,
    resume::RUNS,
    signals::Signals,
    text::{Bar, note_conversations, note_dataset, note_pages, quoted, run_data},
};

mod options;

pub use options::{Devices, Options};

/// What the user gave.
pub struct Given {
    /// All options, as a file for `--config`.
    pub file: String,
    /// Names of the options that were typed or in the file of `--config`.
    pub names: BTreeSet<String>,
}

/// What `yuan finetune` has beside the options of a pre-training.
pub struct Tuning {
    pub model: ModelDirectory,
    /// Conversations, or questions about images.
    pub data: RunData,
    /// In place of the model's.
    pub template: Option<String>,
    pub isolate: bool,
}

/// A run on text, or, of `yuan finetune`, on conversations.
pub fn run(
    options: &Options,
    console: &Console,
    given: Given,
    tuning: Option<Tuning>,
) -> anyhow::Result<()> {
    train(&options.devices, console, |grid| match options.resume {
        true => reopen(options, console, grid, &given.names),
        false => create(options, console, grid, given.file, tuning),
    })
}

/// Trains what `prepare` makes ready for some ranks, on one device, on several, or as one of the
/// processes that a launcher started.
pub fn train(
    devices: &Devices,
    console: &Console,
    prepare: impl FnOnce(Grid) -> anyhow::Result<Run>,
) -> anyhow::Result<()> {
    ops::set_fast_paths(!devices.portable);
    let patience = Duration::from_secs(devices.patience);
    if let Some(meeting) = Meeting::of_environment(patience).wrong_option()? {
        return run_on_rank(devices, console, prepare, &meeting);
    }
    for name in &devices.device {
        yuan::device(name).wrong_option()?;
    }
    let run = prepare(Grid::new(devices.device.len(), devices.data_parallel).wrong_option()?)?;
    finish(run, devices, console)
}

/// How long a run may be prepared before its ranks meet.
const PREPARATION: Duration = Duration::from_secs(7 * 24 * 3600);

/// One of several processes that a launcher started: the first one prepares the run and tells of it.
fn run_on_rank(
    devices: &Devices,
    console: &Console,
    prepare: impl FnOnce(Grid) -> anyhow::Result<Run>,
    meeting: &Meeting,
) -> anyhow::Result<()> {
    let mut run = None;
    // The others wait for the first rank to listen, however long it prepares.
    if meeting.rank == 0 {
        let grid = Grid::new(meeting.size, devices.data_parallel).wrong_option()?;
        run = Some(prepare(grid)?.unlocked()?);
    }
    let meeting = &Meeting { start: PREPARATION, ..meeting.clone() };
    let ranks = Ranks::new(connect(meeting)?, devices.data_parallel).wrong_option()?;
    let world = ranks.world().clone();
    let directory = run.as_ref().map(|run| run.directory().to_string_lossy().into_owned());
    let directory = world.broadcast(directory.unwrap_or_default().into_bytes())?;
    let directory = String::from_utf8(directory).context("the run has no name in UTF-8")?;
    let run = match run {
        Some(run) => run,
        None => Run::open(Path::new(&directory))?,
    };
    let signals = match world.is_first() {
        true => Signals::listen(),
        false => Signals::listen_quietly(),
    };
    let signals = signals.context("cannot listen to signals")?;
    if steps_taken(&run)? < run.config().steps {
        let device = ranks::device_of(meeting, &devices.device)?;
        ranks::train(&run, device, ranks, meeting.patience, console, &signals)?;
    }
    match (world.is_first(), signals.received()) {
        (false, _) => Ok(()),
        (true, Some(signal)) if steps_taken(&run)? < run.config().steps => {
            interrupted(&run, console, signal)
        }
        (true, _) => close(&run, console, false),
    }
}

/// Trains a run that is prepared, and tells what came of it.
fn finish(run: Run, devices: &Devices, console: &Console) -> anyhow::Result<()> {
    if steps_taken(&run)? >= run.config().steps {
        if let Some(checkpoint) = Checkpoint::latest(run.directory())? {
            // Nobody would look at it before it is needed.
            checkpoint.verify()?;
        }
        console.note(format_args!(
            "{} is finished: all its {} steps are taken. --steps with a larger number extends it.",
            run.directory().display(),
            run.config().steps
        ));
        return close(&run, console, false);
    }
    let signals = Signals::listen().context("cannot listen to signals")?;
    let run = match &devices.device[..] {
        [_, _, ..] => {
            let run = run.unlocked()?;
            let Devices { device, data_parallel, patience, portable } = devices;
            ranks::start(
                run.directory(),
                device,
                *data_parallel,
                *patience,
                *portable,
                console,
                &signals,
            )?;
            run
        }
        _ => {
            let device = yuan::device(&devices.device[0]).wrong_option()?.autodiff();
            let trainer = match run.data().learns_from_rewards() {
                true => rl::trainer(&run, &device)?,
                false => run.trainer(&device)?,
            };
            let trainer = trainer.with_callback(signals.clone())?;
            let mut trainer = match console.is_quiet() {
                true => trainer,
                false => trainer.with_callback(Display::new(console.steps_between_lines()))?,
            };
            if let Err(error) = trainer.run() {
                // A run that has nothing more to learn from has something to show.
                if let TrainError::RewardedAlike { .. } = error {
                    let page = Report::of(run.directory())?;
                    page.save()?;
                    report::say_where(&page, console)?;
                }
                return Err(error.into());
            }
            run
        }
    };
    match signals
        .received()
        .filter(|_| steps_taken(&run).is_ok_and(|step| step < run.config().steps))
    {
        Some(signal) => interrupted(&run, console, signal),
        None => close(&run, console, devices.device.len() == 1),
    }
}

fn steps_taken(run: &Run) -> Result<u64, TrainError> {
    Ok(Checkpoint::latest(run.directory())?.map_or(0, |checkpoint| checkpoint.step))
}

/// Opens a run to go on with, with what the user wants otherwise.
fn reopen(
    options: &Options,
    console: &Console,
    grid: Grid,
    given: &BTreeSet<String>,
) -> anyhow::Result<Run> {
    let Some(directory) = &options.run else {
        bail!("there is no run in {RUNS} to resume: name one with --run");
    };
    let mut run = Run::open(directory)?;
    let config = options.changed(run.config(), given);
    let taken = steps_taken(&run)?;
    if config.steps != run.config().steps && config.steps <= taken {
        let steps = config.steps;
        return Err(anyhow!(
            "--steps {steps}: the run in {} has taken {taken} steps already",
            directory.display()
        ))
        .wrong_option();
    }
    check_rows(&config, grid).wrong_option()?;
    run.reconfigure(|config| *config = options.changed(config, given)).wrong_option()?;
    if config.steps != run.config().steps {
        console.note(format_args!(
            "The learning rate goes on along the schedule of {} steps; it was made for {}.",
            config.steps,
            run.config().steps
        ));
    }
    let (groups, sharing) = (run.config().laep.groups, grid.expert());
    if !groups.is_multiple_of(sharing) {
        console.note(format_args!(
            "The run's {groups} groups of experts cannot be shared equally by {sharing} devices, \
             whose loads will differ; --groups changes them."
        ));
    }
    Ok(run)
}

/// Prepares a new run; whatever is wrong with the options is said before any text is read.
fn create(
    options: &Options,
    console: &Console,
    grid: Grid,
    given: String,
    tuning: Option<Tuning>,
) -> anyhow::Result<Run> {
    let init = options.init.as_deref().map(ModelDirectory::open).transpose()?;
    let model = match (&init, &tuning) {
        (_, Some(tuning)) => tuning.model.config().clone(),
        (Some(init), None) => init.config().clone(),
        (None, None) => options.model_config(),
    };
    model.validate().wrong_option()?;
    let config = options.train_config(&model, grid)?;
    let is_fresh = init.is_none() && tuning.is_none();
    if is_fresh && options.vocab < SMALLEST_VOCABULARY {
        let (vocab, smallest) = (options.vocab, SMALLEST_VOCABULARY);
        return Err(anyhow!("a vocabulary of {vocab} is below the {smallest} of bytes and <eod>"))
            .wrong_option();
    }
    options.check_plan(&config, &model)?;
    check_settings(&config, &model).wrong_option()?;
    check_ranks(&config, &model, grid).wrong_option()?;
    // From here on nobody else makes a run there.
    let claim = match &options.run {
        Some(directory) => Claim::take(directory)?,
        None => Claim::first_free(&Path::new(RUNS).join("pretrain"))?,
    };
    let bar = Bar::new(console, None);
    let new = match tuning {
        Some(tuning) => tuning.new_run(config),
        None => {
            let data = data(options, console)?;
            if is_fresh && !matches!(data, RunData::Prepared(_)) {
                console.note("training the tokenizer");
            }
            match init {
                Some(init) => NewRun::from_model(config, init, data),
                None => NewRun::new(config, model, data),
            }
        }
    };
    let new = new.with_progress(&bar);
    let run = Run::create_in(claim, new.with_options_file(given))?;
    for set in run.data().sets.iter().filter(|set| set.kind == DataKind::Text) {
        note_dataset(console, &set.open(run.directory())?);
    }
    if run.data().sets.iter().any(|set| set.kind == DataKind::Conversations) {
        note_conversations(console, &ConversationCounts::load(run.directory())?);
    }
    if run.data().sets.iter().any(|set| set.kind == DataKind::Pages) {
        note_pages(console, &PageCounts::load(run.directory())?);
    }
    let [train, validation] = run.tokens();
    console.note(format_args!("{train} tokens to train on, {validation} to validate"));
    Ok(run)
}

/// What the run learns.
fn data(options: &Options, console: &Console) -> anyhow::Result<RunData> {
    if !options.data.is_empty() {
        return run_data(&options.data);
    }
    let documents = toy::corpus()?;
    let bytes: usize = documents.iter().map(|document| document.text.len()).sum();
    let megabytes = bytes as f64 / 1e6;
    console.note(format_args!("{} documents, {megabytes:.1} MB of text", documents.len()));
    Ok(RunData::Documents(documents))
}

/// Writes the report and says what came of the run.
fn close(run: &Run, console: &Console, is_trained_here: bool) -> anyhow::Result<()> {
    let report = Report::of(run.directory())?;
    report.save()?;
    console.say(format_args!("\n{}", report.table()))?;
    let learns_from_rewards = run.data().learns_from_rewards();
    if !learns_from_rewards
        && report.history().prunes().next().is_none()
        && report.history().lost_lines() == 0
    {
        let why = match &run.config().laep.trigger {
            _ if report.history().undone().next().is_some() => "the guard undid the prune",
            Trigger::Never => "LAEP was off",
            Trigger::Steps(_) => "the guard held the prune up until the run ended",
            Trigger::Stable { .. } if was_stable(report.history()) => {
                "the loads became stable when the guard had no time left to judge a prune"
            }
            Trigger::Stable { .. } => "the loads of all layers were never stable",
        };
        console.say(format_args!("Nothing was pruned: {why}."))?;
    }
    // Of several processes this one has the least to tell.
    if let Some(peak) = peak_resident().filter(|_| is_trained_here) {
        let gigabytes = peak as f64 / 1e9;
        console.say(format_args!("Peak memory of the process: {gigabytes:.2} GB."))?;
    }
    report::say_where(&report, console)
}

/// Whether all layers were stable at some time.
fn was_stable(history: &History) -> bool {
    history.events().iter().any(|event| matches!(event, Event::Phase { stable: true, .. }))
}

/// Writes the report of a run that a signal ended, and says how to go on.
fn interrupted(run: &Run, console: &Console, signal: i32) -> anyhow::Result<()> {
    let report = Report::of(run.directory()).and_then(|report| report.save().map(|()| report));
    let shown = match report {
        Ok(report) => format!("The report is {}.", report.page().display()),
        Err(error) => format!("There is no report: {error}."),
    };
    console.note(format_args!(
        "Interrupted after step {} of {}. {shown} Go on with:\n  yuan pretrain --resume --run {}",
        steps_taken(run)?,
        run.config().steps,
        quoted(run.directory())
    ));
    Err(Interrupted(signal).into())
}
