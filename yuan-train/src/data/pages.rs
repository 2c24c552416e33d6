//! Questions about images: from files to what training rows are made of.
//!
//! A document is upstream's (§9.2 of its data code): a begin marker, a block for each image, the
//! question, a separator, the answer, an end marker. Here the texts become tokens and of the images
//! only the headers are read; [`PageRows`] packs documents into rows and reads the images themselves.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use yuan_data::{JsonLines, SkippedFiles};
use yuan_model::vision::{ImageLayout, ImagePositions};

use super::DataSets;
use crate::TrainError;

mod files;
mod image;
mod rows;
mod sample;
mod tar;
mod write;

pub use image::{ImagePlace, ImageSource};
pub use rows::PageRows;
pub(crate) use write::write_pages;

/// Files of questions about images, and how they become rows.
///
/// - A `.jsonl` file, which may be compressed (`.gz`, `.zst`): a line is an object with `prompt` and
///   `response`, or with `messages` of a user and an assistant, and with `image` or `images`, paths
///   that begin where the file is.
/// - A `.tar` file in `WebDataset`'s layout: members with one name and different endings are a sample,
///   its images beside a `.json` with such an object.
#[derive(Debug, Clone, PartialEq)]
pub struct PageFiles {
    /// The files.
    pub files: Vec<PathBuf>,
    /// Share of the documents that validates; those whose first image is the same stay together.
    pub validation: f64,
    /// Where images stand in the rows: together, as upstream trains its models, or increasing.
    pub positions: ImagePositions,
}

impl PageFiles {
    /// Files of which so large a share validates, with upstream's positions.
    pub fn new(files: Vec<PathBuf>, validation: f64) -> Self {
        Self { files, validation, positions: ImagePositions::Together }
    }

    /// Questions and answers that are trained on, for a tokenizer; images are told apart, and not
    /// decoded.
    ///
    /// # Errors
    ///
    /// If a file cannot be read.
    pub fn texts(&self) -> Result<Vec<String>, TrainError> {
        write::texts(self)
    }

    /// Whether the file's first line, or its kind, says that its texts have images.
    pub fn is_one(path: &Path) -> bool {
        if tar::is_tar(path) {
            return true;
        }
        let first = JsonLines::open(path).ok().and_then(|mut lines| lines.next());
        matches!(first, Some(Ok((_, value))) if value.get("image").or(value.get("images")).is_some())
    }
}

/// What came of files of questions about images.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Documents to train on, and to validate with, that fit into a row.
    pub documents: [u64; 2],
    /// Their images.
    pub images: [u64; 2],
    /// Their tokens, those of images included.
    pub tokens: [u64; 2],
    /// Documents that are longer than a row, which are left out.
    pub longer_than_a_row: u64,
    /// Lines and samples that are no document.
    pub skipped: SkippedFiles,
}

/// How the documents of a run become rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageSettings {
    /// How images and text share a row.
    #[serde(flatten)]
    pub layout: ImageLayout,
    /// Where images stand in it.
    pub positions: ImagePositions,
}

impl PageSettings {
    /// Reads those of a run.
    ///
    /// # Errors
    ///
    /// If the run has no such data, or the file is damaged.
    pub fn load(run_dir: &Path) -> Result<Self, TrainError> {
        read_json(&run_dir.join(DataSets::DIRECTORY).join(SETTINGS))
    }
}

/// Name of the file with them in a run's data.
const SETTINGS: &str = "pages.json";
/// Name of the file with what was counted.
const COUNTS: &str = "counts.json";

/// Widths and heights of images.
fn sizes_of(images: &[ImageSource]) -> Vec<[usize; 2]> {
    images.iter().map(|image| image.size).collect()
}

impl PageCounts {
    /// Reads what was counted when a run was made.
    ///
    /// # Errors
    ///
    /// If the run has no such data, or the file is damaged.
    pub fn load(run_dir: &Path) -> Result<Self, TrainError> {
        read_json(&run_dir.join(DataSets::DIRECTORY).join(COUNTS))
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, TrainError> {
    let text = fs::read(path).map_err(TrainError::io("read", path))?;
    let damaged = |error: serde_json::Error| TrainError::Damaged {
        path: path.to_path_buf(),
        reason: error.to_string(),
    };
    serde_json::from_slice(&text).map_err(damaged)
}
