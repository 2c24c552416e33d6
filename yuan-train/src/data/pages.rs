//! Questions about images: from files to what training rows are made of.
//!
//! A document is upstream's (§9.2 of its data code): a begin marker, a block for each image, the
//! question, a separator, the answer, an end marker. Here the texts become tokens and of the images
//! only the headers are read; [`PageRows`] packs documents into rows and reads the images themselves.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::Tokenizer;
use yuan_data::{
    DataError, JsonLines, Skipped, SkippedFiles, Split, TokenType, TokenWriter, tokenizer::Encoder,
};
use yuan_files::write_whole;
use yuan_model::{generate::ImagePositions, vision::ImageLayout};

use super::{DataKind, DataSet, DataSets};
use crate::TrainError;

mod image;
mod rows;
mod tar;

pub use image::ImageSource;
pub use rows::PageRows;

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

    /// Questions and answers that are trained on, for a tokenizer; no image is looked at.
    ///
    /// # Errors
    ///
    /// If a file cannot be read.
    pub fn texts(&self) -> Result<Vec<String>, TrainError> {
        let mut texts = Vec::new();
        for file in &self.files {
            for_each_sample(file, Look::AtTexts, |Found { name, read }| {
                let is_trained = Split::of(&name, self.validation) == Split::Train;
                if let (true, Ok(Sample { question, answer, .. })) = (is_trained, read) {
                    texts.push(format!("{question}\n{answer}"));
                }
                Ok(())
            })?;
        }
        Ok(texts)
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
    /// Documents to train on, and to validate with.
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

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// Texts alone; samples come without images.
    AtTexts,
    /// The headers of images as well.
    AtImages,
}

/// A line or a member of an archive, and what could be made of it.
struct Found {
    /// Its file and its first image, or what else tells it: it decides whether it validates.
    name: String,
    read: Result<Sample, String>,
}

/// A question about images, and its answer.
struct Sample {
    images: Vec<ImageSource>,
    question: String,
    answer: String,
}

/// Widths and heights of images.
fn sizes_of(images: &[ImageSource]) -> Vec<[usize; 2]> {
    images.iter().map(|image| image.size).collect()
}

/// Shows every sample of a file.
fn for_each_sample(
    path: &Path,
    look: Look,
    mut show: impl FnMut(Found) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    if tar::is_tar(path) {
        return tar::for_each_sample(path, look, show);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let above = path.parent().unwrap_or(Path::new(""));
    for line in JsonLines::open(path)? {
        let (number, value) = line?;
        let paths = image_paths(&value);
        let first = paths.as_ref().map_or_else(|_| number.to_string(), |paths| paths[0].to_owned());
        let read = question_of(&value).map_err(str::to_owned).and_then(|(question, answer)| {
            let images = paths?.into_iter().filter(|_| look == Look::AtImages);
            let images = images.map(|path| ImageSource::of_file(above.join(path)));
            Ok(Sample { images: images.collect::<Result<_, _>>()?, question, answer })
        });
        show(Found { name: format!("{name}:{first}"), read })?;
    }
    Ok(())
}

/// The paths under `image` or `images`.
fn image_paths(value: &Value) -> Result<Vec<&str>, String> {
    let paths: Option<Vec<&str>> = match (&value["image"], &value["images"]) {
        (Value::String(path), Value::Null) => Some(vec![path.as_str()]),
        (Value::Null, Value::Array(paths)) => paths.iter().map(Value::as_str).collect(),
        _ => None,
    };
    let none = || "lines without `image`, a path, or `images`, a list of paths".to_owned();
    paths.filter(|paths| !paths.is_empty()).ok_or_else(none)
}

/// Question and answer of an object, or why it has none.
fn question_of(value: &Value) -> Result<(String, String), &'static str> {
    let pair = (value["prompt"].as_str(), value["response"].as_str());
    let (question, answer) = match (pair, value["messages"].as_array().map(Vec::as_slice)) {
        ((Some(question), Some(answer)), _) => (question, answer),
        (_, Some([question, answer])) => {
            let is_pair = question["role"] == "user" && answer["role"] == "assistant";
            let texts = (question["content"].as_str(), answer["content"].as_str());
            match texts {
                (Some(question), Some(answer)) if is_pair => (question, answer),
                _ => return Err("messages that are no question of a user and its answer"),
            }
        }
        (_, Some(_)) => return Err("messages that are more than one question and its answer"),
        _ => return Err("lines without `prompt` and `response`, or `messages`"),
    };
    match answer.is_empty() {
        true => Err("no answer to learn"),
        false => Ok((question.to_owned(), answer.to_owned())),
    }
}

/// Writes the documents of files into a directory of a run.
///
/// # Errors
///
/// If a file cannot be read or written, or there is nothing to train on or to validate with.
pub(crate) fn write_pages(
    run_dir: &Path,
    files: &PageFiles,
    layout: ImageLayout,
    tokenizer: &Tokenizer,
    end_of_document: &str,
    row_len: usize,
) -> Result<DataSets, TrainError> {
    let directory = run_dir.join(DataSets::DIRECTORY);
    fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
    let encoder = Encoder::new(tokenizer, end_of_document)?;
    let kind = TokenType::for_vocabulary(encoder.vocab_size());
    let writer = |split| SplitWriter::create(&directory, split, kind);
    let mut writers = [writer("train")?, writer("validation")?];
    let mut counts = PageCounts::default();
    for file in &files.files {
        for_each_sample(file, Look::AtImages, |Found { name, read }| {
            let Sample { images, question, answer } = match read {
                Ok(sample) => sample,
                Err(reason) => {
                    let name = name.split(':').next().unwrap_or_default().to_owned();
                    counts.skipped.add(Skipped { name, reason }, 1);
                    return Ok(());
                }
            };
            let encode = |text: &str| {
                let mut tokens = encoder.encode(text)?;
                tokens.retain(|&token| !layout.is_marker(token));
                Ok::<_, TrainError>(tokens)
            };
            let mut tokens = encode(&question)?;
            tokens.push(layout.markers.sep);
            tokens.extend(encode(&answer)?);
            tokens.push(layout.markers.eod);
            let opening = layout.opening(&layout.rows_of(&sizes_of(&images))).len();
            let length = opening + tokens.len();
            let split = usize::from(Split::of(&name, files.validation) == Split::Validation);
            counts.longer_than_a_row += u64::from(length > row_len);
            counts.documents[split] += 1;
            counts.images[split] += images.len() as u64;
            counts.tokens[split] += length as u64;
            writers[split].add(&tokens, &images)
        })?;
    }
    if counts.documents.contains(&0) {
        let [train, validation] = counts.documents;
        let skipped = counts.skipped.summary().map_or_else(String::new, |text| format!("; {text}"));
        let reason = format!(
            "{train} questions about images to train on and {validation} to validate with are too \
             few: bring more, or keep a larger share to validate with (--validation){skipped}"
        );
        return Err(DataError::NoText(reason).into());
    }
    let mut checksums = Vec::new();
    for writer in writers {
        checksums.push(writer.finish()?);
    }
    for (name, text) in [
        (
            SETTINGS,
            serde_json::to_string_pretty(&PageSettings { layout, positions: files.positions }),
        ),
        (COUNTS, serde_json::to_string_pretty(&counts)),
    ] {
        let text = text.expect("numbers and names are plain data");
        write_whole(&directory.join(name), text.as_bytes())?;
    }
    let set = DataSet {
        name: "pages".into(),
        weight: 1.0,
        path: DataSets::DIRECTORY.into(),
        kind: DataKind::Pages,
        tokens: counts.tokens,
        checksum: checksums[0],
    };
    Ok(DataSets { sets: vec![set] })
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

/// Texts and images of one split on their way to disk.
struct SplitWriter {
    tokens: TokenWriter,
    path: PathBuf,
    images: std::io::BufWriter<fs::File>,
}

impl SplitWriter {
    fn create(directory: &Path, split: &str, kind: TokenType) -> Result<Self, TrainError> {
        let path = rows::images_of(directory, split);
        let file = fs::File::create(&path).map_err(TrainError::io("write", &path))?;
        let tokens = TokenWriter::create(&directory.join(split), kind)?;
        Ok(Self { tokens, path, images: std::io::BufWriter::new(file) })
    }

    fn add(&mut self, tokens: &[u32], images: &[ImageSource]) -> Result<(), TrainError> {
        self.tokens.push(tokens)?;
        self.tokens.end_document()?;
        let line = serde_json::to_string(images).expect("paths and numbers are plain data");
        writeln!(self.images, "{line}").map_err(TrainError::io("write", &self.path))
    }

    fn finish(self) -> Result<yuan_files::Checksum, TrainError> {
        let failed = TrainError::io("write", &self.path);
        let file = self.images.into_inner().map_err(std::io::IntoInnerError::into_error);
        file.and_then(|file| file.sync_all()).map_err(failed)?;
        Ok(self.tokens.finish()?[0])
    }
}
