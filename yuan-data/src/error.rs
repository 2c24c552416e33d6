//! What can be wrong with text and token files, each in one sentence.

use std::{
    io,
    path::{Path, PathBuf},
};

use yuan_files::FileError;

/// Why text could not be read, prepared or cut into rows.
///
/// A sentence holds its cause, which is therefore no `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or directory could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what its name says.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no text, or too little.
    #[error("{0}")]
    NoText(String),
    /// A tokenizer could not be trained, read or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A setting that cannot be followed.
    #[error("{0}")]
    Setting(String),
    /// A preparation that was begun with other sources or settings.
    #[error(
        "{} was begun with other sources or settings ({what} differs): give the same, or remove it",
        path.display()
    )]
    OtherPreparation {
        /// The directory.
        path: PathBuf,
        /// The first thing that differs.
        what: String,
    },
    /// Another process prepares the same directory.
    #[error("another process is preparing {}: wait for it, or choose another directory", .0.display())]
    Busy(PathBuf),
    /// The caller stopped the preparation; the same call goes on.
    #[error("stopped")]
    Stopped,
}

impl DataError {
    /// For `map_err` on a file operation.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let of = FileError::of(action, path);
        move |error| Self::File(of(error))
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), reason: reason.into() }
    }
}
