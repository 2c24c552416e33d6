//! Metrics as JSON lines: one [`Event`] a line.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::PathBuf,
};

use serde_json::Value;

use yuan_model::files::{FileError, write_whole};

use crate::{Callback, Context, Event, TrainError};

/// Appends every event to `metrics.jsonl` in the run directory.
#[derive(Debug, Default)]
pub struct MetricsFile {
    open: Option<(PathBuf, File)>,
    /// Lines that the run has written; a checkpoint keeps the count, so that a resumed run can drop
    /// what an interrupted one wrote beyond it.
    lines: usize,
}

impl MetricsFile {
    /// Name of the file in the run directory.
    pub const NAME: &'static str = "metrics.jsonl";
}

impl<M> Callback<M> for MetricsFile {
    fn name(&self) -> &'static str {
        "metrics_file"
    }

    fn on_start(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        let path = context.run_dir().join(Self::NAME);
        let old = match fs::read_to_string(&path) {
            _ if self.lines == 0 => String::new(),
            Ok(old) => old,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            // What cannot be read is not written over.
            Err(error) => return Err(TrainError::io("read", &path)(error)),
        };
        let kept: String =
            old.split_inclusive('\n').take(self.lines).filter(|l| l.ends_with('\n')).collect();
        self.lines = kept.lines().count();
        write_whole(&path, kept.as_bytes())?;
        let file =
            OpenOptions::new().append(true).open(&path).map_err(TrainError::io("write", &path))?;
        self.open = Some((path, file));
        Ok(())
    }

    fn on_event(&mut self, event: &Event) -> Result<(), TrainError> {
        let Some((path, file)) = &mut self.open else { return Ok(()) };
        let mut line = serde_json::to_string(event).map_err(|error| FileError {
            action: "write",
            path: path.clone(),
            cause: error.into(),
        })?;
        line.push('\n');
        file.write_all(line.as_bytes()).map_err(TrainError::io("write", path))?;
        self.lines += 1;
        Ok(())
    }

    fn state(&self) -> Option<Value> {
        // The checkpoint that carries this is complete before a line tells of it: that one counts.
        Some((self.lines + 1).into())
    }

    fn restore(&mut self, state: Value) -> Result<(), TrainError> {
        let lines = state.as_u64().ok_or_else(|| TrainError::Callback {
            name: "metrics_file",
            cause: "its state is no number of lines".into(),
        })?;
        self.lines = lines as usize;
        Ok(())
    }

    /// What was written stays: the file tells of the prune and of its undoing.
    fn roll_back(&mut self, _state: Option<Value>) -> Result<(), TrainError> {
        Ok(())
    }
}
