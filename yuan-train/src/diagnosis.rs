//! What is wrong with a directory, and what to do about it.

use std::{fmt, fs, path::Path};

use serde::Serialize;
use yuan_model::files::UNFINISHED;

use crate::{
    Checkpoint, Event, MetricsFile, Run, RunLock, TrainError, data::TokenStreams,
    model_directory::TOKENIZER,
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
            let (eod, vocab_size) = (run.model().tokens.eod.unwrap_or(0), run.model().vocab_size);
            if verify && let Err(error) = TokenStreams::load(run_dir, eod, vocab_size) {
                let remedy = "make the run again from its text; its checkpoints can be used";
                problems.push(Problem::new(error.to_string(), remedy));
            }
        }
        // A checkpoint alone, as `yuan convert --run` writes it.
        Err(TrainError::NoRun(_)) => {}
        Err(TrainError::Unprepared(_)) if is_going_on => {}
        Err(error) => {
            let remedy = "it cannot be resumed, but its checkpoints can start another run (--init)";
            problems.push(Problem::new(error.to_string(), remedy));
        }
    }
    problems.extend(history(run_dir)?);
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

fn history(run_dir: &Path) -> Result<Option<Problem>, TrainError> {
    let path = run_dir.join(MetricsFile::NAME);
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fs::read(&path).map_err(TrainError::io("read", &path))?;
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
