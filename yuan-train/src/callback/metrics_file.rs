//! Metrics as JSON lines: one [`Event`] a line.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;

use yuan_model::files::{FileError, write_whole};

use crate::{Callback, Context, Event, TrainError};

/// The first `lines` lines as far as they are events, and how many of them are not.
pub(crate) fn readable(bytes: &[u8], lines: usize) -> (Vec<u8>, usize) {
    let (mut kept, mut counted, mut lost) = (Vec::new(), 0, 0);
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let event = serde_json::from_slice::<Event>(line).ok().filter(|_| line.ends_with(b"\n"));
        let stands_for = event.as_ref().map_or(1, lines_of);
        if stands_for > lines - counted {
            break;
        }
        counted += stands_for;
        match event {
            Some(_) => kept.extend_from_slice(line),
            None => lost += 1,
        }
    }
    (kept, lost + lines - counted)
}

/// Lines that an event counts for: one that tells of lost lines stands in their place.
fn lines_of(event: &Event) -> usize {
    match event {
        Event::HistoryLost { lines, .. } => *lines,
        _ => 1,
    }
}

/// Copies a damaged file to a name beside it, which is returned; none if there is no file.
fn keep_aside(path: &Path) -> Result<Option<String>, TrainError> {
    if !path.exists() {
        return Ok(None);
    }
    let mut number = 1_u64;
    loop {
        let name = format!("metrics.damaged-{number}.jsonl");
        let aside = path.with_file_name(&name);
        if !aside.exists() {
            fs::copy(path, &aside).map_err(TrainError::io("write", &aside))?;
            return Ok(Some(name));
        }
        number += 1;
    }
}

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
        let (kept, lost) = match fs::read(&path) {
            Ok(bytes) => readable(&bytes, self.lines),
            Err(error) if error.kind() == ErrorKind::NotFound => (Vec::new(), self.lines),
            // What cannot be read is not written over.
            Err(error) => return Err(TrainError::io("read", &path)(error)),
        };
        if lost > 0 {
            let kept_in = keep_aside(&path)?;
            context.emit(Event::HistoryLost { step: context.step(), lines: lost, kept_in });
            self.lines -= lost;
        }
        write_whole(&path, &kept)?;
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
        self.lines = self.lines.saturating_add(lines_of(event));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> String {
        format!("{}\n", serde_json::to_string(&Event::Checkpoint { step }).unwrap())
    }

    #[test]
    fn a_damaged_history_is_read_around_the_damage() {
        let whole = [line(1), line(2), line(3), line(4)].concat();
        assert_eq!(readable(whole.as_bytes(), 3), (whole[..3 * line(1).len()].into(), 0));
        assert_eq!(readable(b"", 3), (Vec::new(), 3));
        let mut damaged = whole.clone().into_bytes();
        damaged[line(1).len() + 3] = 0xff;
        let kept = [line(1), line(3)].concat().into_bytes();
        assert_eq!(readable(&damaged, 3), (kept.clone(), 1));
        // What is told of the loss stands for the lines that are gone.
        let lost = Event::HistoryLost { step: 3, lines: 1, kept_in: None };
        let told = [kept, serde_json::to_vec(&lost).unwrap(), b"\n".to_vec()].concat();
        assert_eq!(readable(&[&told[..], line(4).as_bytes()].concat(), 3), (told, 0));
    }
}
