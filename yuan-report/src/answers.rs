//! What a model answered about images, to be shown beside them.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};
use yuan_files::{FileError, write_whole};

use crate::ReportError;

/// A question about an image, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The image, a PNG or JPEG file; a relative path begins in the run.
    pub image: String,
    /// What was asked.
    pub question: String,
    /// What the model answered.
    pub answer: String,
    /// What is right, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
}

impl Answer {
    /// Name of the file in a run directory.
    pub const FILE: &'static str = "answers.json";
    /// Answers that a page shows.
    pub(crate) const MOST: usize = 12;
    /// Bytes of all answers at most.
    const MOST_OF_ALL: u64 = 64 << 20;
    /// Larger images are left out of a page.
    const MOST_BYTES: u64 = 4 << 20;

    /// Writes the answers of a run, which its report then shows: the first twelve of them.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn save_all(answers: &[Self], run_dir: &Path) -> Result<(), ReportError> {
        let path = run_dir.join(Self::FILE);
        let failed = |error| FileError {
            action: "write",
            path: path.clone(),
            cause: std::io::Error::other(error),
        };
        let text = serde_json::to_string_pretty(answers).map_err(failed)?;
        Ok(write_whole(&path, text.as_bytes())?)
    }

    /// The answers of a run; none if it has no such file.
    ///
    /// # Errors
    ///
    /// If the file is damaged, no file, or has over 64 MiB.
    pub fn read_all(run_dir: &Path) -> Result<Vec<Self>, ReportError> {
        let path = run_dir.join(Self::FILE);
        let failed = |reason| FileError {
            action: "read",
            path: path.clone(),
            cause: std::io::Error::other(reason),
        };
        match path.metadata() {
            Err(_) => return Ok(Vec::new()),
            // Others may never end.
            Ok(found) if !found.is_file() => return Err(failed("it is no file").into()),
            Ok(found) if found.len() > Self::MOST_OF_ALL => {
                return Err(failed("it has over 64 MiB").into());
            }
            Ok(_) => {}
        }
        let text = fs::read_to_string(&path).map_err(FileError::of("read", &path))?;
        let damaged = |error: serde_json::Error| FileError {
            action: "understand",
            path: path.clone(),
            cause: std::io::Error::other(error),
        };
        Ok(serde_json::from_str(&text).map_err(damaged)?)
    }

    /// The image as a page holds it; none if it is gone, too large, or of another kind.
    pub(crate) fn data_uri(&self, run_dir: &Path) -> Option<String> {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let path = run_dir.join(&self.image);
        let metadata = path.metadata().ok()?;
        if !metadata.is_file() || metadata.len() > Self::MOST_BYTES {
            return None;
        }
        let bytes = fs::read(&path).ok()?;
        let kind = match bytes.get(..4)? {
            b"\x89PNG" => "png",
            [0xff, 0xd8, 0xff, _] => "jpeg",
            _ => return None,
        };
        Some(format!("data:image/{kind};base64,{}", STANDARD.encode(bytes)))
    }
}
