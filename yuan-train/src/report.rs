//! What a run has to show, all of it read back from its metrics file.

mod history;
mod html;
pub mod pictures;
mod table;

use std::path::Path;

pub use history::{History, Phase, Window};
pub use html::html_report;
pub use table::summary_table;

use yuan_model::files::write_whole;

use crate::TrainError;

/// Writes a picture or a report; the file appears whole or not at all.
///
/// # Errors
///
/// If the file cannot be written.
pub fn save(path: &Path, text: &str) -> Result<(), TrainError> {
    Ok(write_whole(path, text.as_bytes())?)
}
