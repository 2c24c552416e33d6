//! Metrics as JSON lines: one [`Event`] a line.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;

use yuan_files::{FileError, write_whole};

use super::background::Background;
use crate::{Callback, Context, Event, TrainError};

/// What a metrics file holds of the lines that a checkpoint counted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Readable {
    /// Those that are events.
    pub kept: Vec<u8>,
    /// How many are not, or not there.
    pub lost: usize,
    /// Only the last one is not there: the process was killed between completing the checkpoint,
    /// which counts that line, and telling of it.
    pub is_untold: bool,
}

impl Readable {
    /// The first `lines` lines; one that is cut off is as good as none.
    pub fn of(bytes: &[u8], lines: usize) -> Self {
        let (mut kept, mut counted, mut damaged) = (Vec::new(), 0, 0);
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            let event = serde_json::from_slice::<Event>(line).ok();
            let stands_for = event.as_ref().map_or(1, lines_of);
            if stands_for > lines - counted || !line.ends_with(b"\n") {
                break;
            }
            counted += stands_for;
            match event {
                Some(_) => kept.extend_from_slice(line),
                None => damaged += 1,
            }
        }
        let missing = lines - counted;
        let is_untold = damaged == 0 && missing == 1;
        Self { kept, lost: if is_untold { 0 } else { damaged + missing }, is_untold }
    }
}

/// Lines that an event counts for: one that tells of lost lines stands in their place.
fn lines_of(event: &Event) -> usize {
    match event {
        Event::HistoryLost { lines, .. } => *lines,
        _ => 1,
    }
}

/// Whether the last line tells of the checkpoint of this step.
fn ends_with_checkpoint(lines: &[u8], step: u64) -> bool {
    match serde_json::from_slice(&lines[start_of_last_line(lines)..]) {
        Ok(Event::Checkpoint { step: told }) => told == step,
        // A resumed run that found the line lost says so in its place.
        Ok(Event::HistoryLost { .. }) => true,
        _ => false,
    }
}

fn start_of_last_line(lines: &[u8]) -> usize {
    let before = lines.strip_suffix(b"\n").unwrap_or(lines);
    before.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1)
}

/// An event as a line of the file.
fn line_of(event: &Event, path: &Path) -> Result<Vec<u8>, TrainError> {
    let mut line =
        serde_json::to_vec(event).map_err(|error| FileError::of("write", path)(error.into()))?;
    line.push(b'\n');
    Ok(line)
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

/// Appends every event to `metrics.jsonl` in the run directory, from a thread. Before a checkpoint,
/// and at the end of the run, all of them are there.
#[derive(Debug, Default)]
pub struct MetricsFile {
    open: Option<Arc<(PathBuf, File)>>,
    writing: Background,
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
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            // What cannot be read is not written over.
            Err(error) => return Err(TrainError::io("read", &path)(error)),
        };
        let Readable { mut kept, lost, mut is_untold } = Readable::of(&bytes, self.lines);
        // A checkpoint that was written beside the training is told of some steps later.
        if lost == 0 && !is_untold && self.lines > 0 && !ends_with_checkpoint(&kept, context.step())
        {
            kept.truncate(start_of_last_line(&kept));
            is_untold = true;
        }
        if is_untold {
            kept.extend(line_of(&Event::Checkpoint { step: context.step() }, &path)?);
        }
        if lost > 0 {
            let kept_in = keep_aside(&path)?;
            context.emit(Event::HistoryLost { step: context.step(), lines: lost, kept_in });
            self.lines -= lost;
        }
        write_whole(&path, &kept)?;
        let file =
            OpenOptions::new().append(true).open(&path).map_err(TrainError::io("write", &path))?;
        self.open = Some(Arc::new((path, file)));
        Ok(())
    }

    fn on_event(&mut self, event: &Event) -> Result<(), TrainError> {
        let Some(open) = self.open.clone() else { return Ok(()) };
        let line = line_of(event, &open.0)?;
        self.writing.start(move || {
            let (path, mut file) = (&open.0, &open.1);
            file.write_all(&line).map_err(TrainError::io("write", path))
        })?;
        self.lines = self.lines.saturating_add(lines_of(event));
        Ok(())
    }

    fn on_end(&mut self) -> Result<(), TrainError> {
        self.writing.finish()
    }

    fn state(&self) -> Option<Value> {
        // A checkpoint counts lines that are there.
        self.writing.wait();
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
        let readable = |bytes: &[u8], lines| Readable::of(bytes, lines);
        let found = |kept: &[u8], lost, is_untold| Readable { kept: kept.into(), lost, is_untold };
        let whole = [line(1), line(2), line(3), line(4)].concat().into_bytes();
        let three = &whole[..3 * line(1).len()];
        assert_eq!(readable(&whole, 3), found(three, 0, false));
        assert_eq!(readable(b"", 3), found(b"", 3, false));
        // The line of the checkpoint itself, which is not there or cut off.
        assert_eq!(readable(three, 4), found(three, 0, true));
        assert_eq!(readable(&whole[..whole.len() - 1], 4), found(three, 0, true));
        let mut damaged = whole.clone();
        damaged[line(1).len() + 3] = 0xff;
        let kept = [line(1), line(3)].concat().into_bytes();
        assert_eq!(readable(&damaged, 3), found(&kept, 1, false));
        // What is told of the loss stands for the lines that are gone.
        let lost = Event::HistoryLost { step: 3, lines: 1, kept_in: None };
        let told = [kept, serde_json::to_vec(&lost).unwrap(), b"\n".to_vec()].concat();
        let more = [&told[..], line(4).as_bytes()].concat();
        assert_eq!(readable(&more, 3), found(&told, 0, false));
    }
}
