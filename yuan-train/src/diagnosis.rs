//! What is wrong with a directory, and what to do about it.

use std::{fmt, fs, io::ErrorKind, path::Path};

use serde::Serialize;
use yuan_files::UNFINISHED;

use crate::{
    Checkpoint, Event, MetricsFile, Run, RunLock, TrainError, callback::metrics_file::Readable,
    data::DataKind, names::TOKENIZER,
};

/// Something that is wrong, in a sentence, and its remedy in another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    pub(crate) fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        // Of several lines, which a library may have said, the report would make several problems.
        let what = what.into().replace('\n', " ");
        Self { what, remedy: remedy.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

/// What is wrong with a run beside the tensors of its latest checkpoint: settings, tokens, history,
/// checkpoints and what was left unfinished. With `verify`, every file is read and compared with
/// its checksum.
///
/// # Errors
///
/// If the directory cannot be read.
pub fn problems_of_run(run_dir: &Path, verify: bool) -> Result<Vec<Problem>, TrainError> {
    let mut problems = Vec::new();
    let is_going_on = RunLock::is_held_elsewhere(run_dir);
    match Run::open(run_dir) {
        Ok(run) => {
            problems.extend(problems_of_data(run_dir, &run, verify));
            // Prompts become tokens when they are asked.
            if run.data().learns_from_rewards() && !run_dir.join(TOKENIZER).is_file() {
                let what = format!("{TOKENIZER} is missing");
                problems
                    .push(Problem::new(what, "bring it back: without it no prompt can be asked"));
            }
        }
        Err(TrainError::NoRun(_)) if run_dir.join(MetricsFile::NAME).exists() => {
            let what = format!("{} is missing", Run::SETTINGS);
            let remedy = "bring it back; the checkpoints can start another run (--init)";
            problems.push(Problem::new(what, remedy));
        }
        // A checkpoint alone, as `yuan convert --run` writes it.
        Err(TrainError::NoRun(_)) => {}
        Err(TrainError::Unprepared(_)) if is_going_on => {}
        Err(error) => {
            let remedy = "it cannot be resumed, but its checkpoints can start another run (--init)";
            problems.push(Problem::new(error.to_string(), remedy));
        }
    }
    problems.extend(problems_of_text(run_dir));
    problems.extend(history(run_dir)?);
    problems.extend(way_back(run_dir, verify)?);
    problems.extend(checkpoints(run_dir, verify)?);
    for entry in fs::read_dir(run_dir).map_err(TrainError::io("read", run_dir))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(UNFINISHED) && !is_going_on {
            let what = format!("{name} was left by a process that was killed");
            problems.push(Problem::new(what, "remove it"));
        }
    }
    Ok(problems)
}

/// What is wrong with the tokens that a run learns; with `verify`, all of them are read.
fn problems_of_data(run_dir: &Path, run: &Run, verify: bool) -> Vec<Problem> {
    let remedy = match run.data().learns_from_rewards() {
        true => "bring the file back, or begin another run from this one",
        false => "prepare the data again from its text; the run's checkpoints can be used",
    };
    let mut problems = Vec::new();
    let sets = run.data().sets.iter();
    for set in sets.clone().filter(|set| set.kind == DataKind::Text) {
        match set.open(run_dir) {
            Ok(dataset) if verify => {
                let found = dataset.problems(u64::MAX).into_iter();
                problems.extend(found.map(|(path, reason)| {
                    Problem::new(format!("{}: {reason}", path.display()), remedy)
                }));
            }
            Ok(_) => {}
            Err(error) => problems.push(Problem::new(error.to_string(), remedy)),
        }
    }
    for set in sets.filter(|set| set.kind != DataKind::Text) {
        let found = set.files.problems(&set.directory(run_dir), verify).into_iter();
        problems.extend(
            found.map(|(path, reason)| {
                Problem::new(format!("{}: {reason}", path.display()), remedy)
            }),
        );
    }
    problems
}

/// The state before a prune that a guard watches.
fn way_back(run_dir: &Path, verify: bool) -> Result<Option<Problem>, TrainError> {
    let Some(latest) = Checkpoint::latest(run_dir)? else { return Ok(None) };
    let Ok(state) = latest.state() else { return Ok(None) };
    let is_watched = state.callbacks.get("prune_experts").is_some_and(|s| !s["watched"].is_null());
    let snapshot = Checkpoint::snapshot(run_dir);
    let damage = match Checkpoint::has_snapshot(run_dir) {
        _ if !is_watched => return Ok(None),
        false => Some("before-prune, which the guard may go back to, is gone".into()),
        true if verify => snapshot.verify().err().map(|error| error.to_string()),
        true => snapshot.verify_sizes().err().map(|error| error.to_string()),
    };
    let remedy = "go on from a checkpoint before the prune, if there is one";
    Ok(damage.map(|what| Problem::new(what, remedy)))
}

fn history(run_dir: &Path) -> Result<Option<Problem>, TrainError> {
    let path = run_dir.join(MetricsFile::NAME);
    let state = Checkpoint::latest(run_dir)?.and_then(|latest| latest.state().ok());
    let expected = state.and_then(|state| state.callbacks.get("metrics_file")?.as_u64());
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(TrainError::io("read", &path)(error)),
    };
    let lines = usize::try_from(expected.unwrap_or(0)).unwrap_or(0);
    let Readable { lost, .. } = Readable::of(&bytes, lines);
    if lost > 0 {
        let what = format!("{lost} lines of {} are lost", MetricsFile::NAME);
        let remedy = "resuming the run keeps the file aside and goes on with what there is";
        return Ok(Some(Problem::new(what, remedy)));
    }
    let lines = bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let damaged = lines.filter(|line| serde_json::from_slice::<Event>(line).is_err()).count();
    let what = format!("{} has {damaged} lines that are no events", MetricsFile::NAME);
    let remedy = "resuming the run keeps the file aside and goes on with the others";
    Ok((damaged > 0).then(|| Problem::new(what, remedy)))
}

fn checkpoints(run_dir: &Path, verify: bool) -> Result<Vec<Problem>, TrainError> {
    let check = |checkpoint: &Checkpoint| match checkpoint.state() {
        Ok(_) if verify => checkpoint.verify(),
        Ok(_) => checkpoint.verify_sizes(),
        Err(error) => Err(error),
    };
    let name = |checkpoint: &Checkpoint| {
        checkpoint.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    };
    let checked: Vec<_> =
        Checkpoint::list(run_dir)?.into_iter().map(|found| (check(&found), found)).collect();
    let good = checked.iter().rfind(|(checked, _)| checked.is_ok()).map(|(_, good)| good);
    let mut problems = Vec::new();
    for (checked, damaged) in &checked {
        let Err(error) = checked else { continue };
        let remedy = match good {
            Some(good) if good.step < damaged.step => {
                format!("remove {} to go on from {}", name(damaged), name(good))
            }
            _ => format!("remove {}", name(damaged)),
        };
        problems.push(Problem::new(error.to_string(), remedy));
    }
    Ok(problems)
}

/// What is wrong with the text side of a model directory.
pub(crate) fn problems_of_text(directory: &Path) -> Vec<Problem> {
    // Weights alone are no mistake.
    if !directory.join(TOKENIZER).exists() {
        return Vec::new();
    }
    match yuan_model::text::Tokenizer::load(directory) {
        Ok(_) => Vec::new(),
        Err(error) => {
            let remedy = "copy the file anew from where the model came from";
            vec![Problem::new(error.to_string(), remedy)]
        }
    }
}
