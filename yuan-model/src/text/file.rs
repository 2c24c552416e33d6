//! The JSON files beside a tokenizer, and what can be wrong with them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use yuan_files::FileError;

/// Why text could not become tokens, or tokens text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what its name says.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file has not been fetched from where it is stored.
    #[error("{0}")]
    Pointer(String),
    /// The tokenizer failed on a text or on tokens.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template refused the messages or has a mistake (feature `chat`).
    #[error("chat template: {0}")]
    Template(String),
}

/// A JSON file, if it is there.
pub(super) fn json(path: &Path) -> Result<Option<Value>, TextError> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(FileError::of("read", path))?;
    let format = |error: serde_json::Error| TextError::Format {
        path: path.into(),
        reason: error.to_string(),
    };
    serde_json::from_str(&text).map(Some).map_err(format)
}
