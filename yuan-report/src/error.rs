//! What can go wrong with a report, each in one sentence.

use yuan_files::FileError;

/// Why a run could not be shown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// A file could not be read, understood or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A picture could not be drawn.
    #[error("cannot draw the {name}: {reason}")]
    Picture {
        /// What it shows.
        name: &'static str,
        /// What the drawing library said.
        reason: String,
    },
}
