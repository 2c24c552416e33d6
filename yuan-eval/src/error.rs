//! What can be wrong with data and answers.

use std::path::{Path, PathBuf};

use yuan_files::FileError;

/// Why an evaluation cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what a benchmark publishes.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is nothing to score.
    #[error("{}: none of the files of {benchmark} is there; expected {expected}", path.display())]
    NoData {
        /// The directory.
        path: PathBuf,
        /// The benchmark.
        benchmark: &'static str,
        /// Names of its files.
        expected: String,
    },
    /// Two evaluations do not belong together.
    #[error("{0}")]
    Incomparable(String),
}

impl EvalError {
    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), reason: reason.into() }
    }
}
