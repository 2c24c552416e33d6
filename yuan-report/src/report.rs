//! All that a run has to show, made at once and written into its directory.

use std::path::{Path, PathBuf};

use yuan_files::{remove_leftovers_in, write_whole};

use crate::{
    Answer, History, ReportError, html_report,
    pictures::{self, SeedRuns},
    summary_table,
};

/// Table, pictures and page of a run.
#[derive(Debug, Clone)]
pub struct Report {
    directory: PathBuf,
    history: History,
    table: String,
    /// Name and text of every file.
    files: Vec<(&'static str, String)>,
}

impl Report {
    /// Name of the page in the run's directory.
    pub const PAGE: &'static str = "report.html";

    /// Reads the metrics of a run directory and draws everything.
    ///
    /// # Errors
    ///
    /// If the metrics cannot be read, or a picture cannot be drawn.
    pub fn of(directory: &Path) -> Result<Self, ReportError> {
        let history = History::read(directory)?;
        // What a user put there must not keep the run from being shown.
        let answers = Answer::read_all(directory).map_err(|error| error.to_string());
        let known = answers.as_deref().map_err(String::as_str);
        let name = directory.file_name().unwrap_or(directory.as_os_str()).to_string_lossy();
        let mut files = vec![
            ("loss.svg", pictures::loss(&history)?),
            ("expert_load.svg", pictures::expert_load(&history)?),
            ("load_history.svg", pictures::load_history(&history)?),
            (Self::PAGE, html_report(&name, &history, directory, known)?),
        ];
        if let Some((_, plan)) = history.prunes().next() {
            files.push(("load_profile.svg", pictures::load_profile(plan)?));
            files.push(("device_groups.svg", pictures::device_groups(plan)?));
        }
        if let Some((images, text)) = history.image_loads() {
            files.push(("image_load.svg", pictures::image_load(images, text)?));
        }
        if let Some(picture) = pictures::rollouts(&[SeedRuns::of(&history)])? {
            files.push(("rollouts.svg", picture));
        }
        let table = summary_table(&history);
        Ok(Self { directory: directory.to_path_buf(), history, table, files })
    }

    /// Writes pictures and page into the run's directory; each file appears whole or not at all.
    ///
    /// # Errors
    ///
    /// If a file cannot be written.
    pub fn save(&self) -> Result<(), ReportError> {
        remove_leftovers_in(&self.directory);
        for (name, text) in &self.files {
            write_whole(&self.directory.join(name), text.as_bytes())?;
        }
        Ok(())
    }

    /// Where [`save`](Self::save) writes the page.
    pub fn page(&self) -> PathBuf {
        self.directory.join(Self::PAGE)
    }

    /// The run before and after its prunes, a column each.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// The events that all of it was made from.
    pub fn history(&self) -> &History {
        &self.history
    }
}
