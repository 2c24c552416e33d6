//! Metrics as JSON lines: one [`Event`] a line.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::PathBuf,
};

use crate::{
    TrainError,
    callback::{Callback, Context, Event},
    files::write_whole,
};

/// Appends every event to `metrics.jsonl` in the run directory.
#[derive(Debug, Default)]
pub struct MetricsFile {
    open: Option<(PathBuf, File)>,
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
        // An interrupted run may have written steps beyond its last checkpoint: they happen again.
        let old =
            if context.step() > 0 { fs::read_to_string(&path).unwrap_or_default() } else { String::new() };
        let lines = old.lines().filter(|line| {
            serde_json::from_str::<Event>(line).is_ok_and(|event| event.step() <= context.step())
        });
        let kept: String = lines.flat_map(|line| [line, "\n"]).collect();
        write_whole(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(TrainError::io("write", &path))?;
        self.open = Some((path, file));
        Ok(())
    }

    fn on_event(&mut self, event: &Event) -> Result<(), TrainError> {
        let Some((path, file)) = &mut self.open else { return Ok(()) };
        let mut line = serde_json::to_string(event).map_err(|error| TrainError::Io {
            action: "write",
            path: path.clone(),
            source: error.into(),
        })?;
        line.push('\n');
        file.write_all(line.as_bytes()).map_err(TrainError::io("write", path))
    }
}
