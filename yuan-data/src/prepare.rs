//! From text to a [`Dataset`], in bounded memory, gone on with where it was stopped.
//!
//! One thread reads documents, the others turn them into tokens, and they are written in the order
//! in which they were read: the result is the same, byte for byte, with any number of threads and
//! after any interruption. Until it is complete, everything lies in `unfinished` in the directory,
//! with a note of how far it is; `dataset.json` is written last.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tokenizers::Tokenizer;
use yuan_files::write_whole;

use crate::{
    DataError, Dataset, Document, Item, Part, Place, Sources, Split,
    source::{SkippedFiles, no_text},
    tokenizer::{self, END_OF_DOCUMENT, Encoder},
};

mod finish;
mod import;
mod pipeline;
mod state;
mod within;

use pipeline::Pipeline;
use state::{State, Workplace};

/// How a data set is made.
#[derive(Debug, Clone, PartialEq)]
pub struct PrepareOptions {
    /// Files, and directories of files.
    pub sources: Vec<PathBuf>,
    /// Field of a line and column of a table that hold the text.
    pub field: String,
    /// Where the tokenizer comes from.
    pub tokenizer: TokenizerFrom,
    /// Token that ends documents.
    pub end_of_document: String,
    /// Share of the documents that validates, chosen by their names.
    pub validation: f64,
    /// Leave out documents that were there before, to the last character; those of more than
    /// [`Part::LONGEST`] bytes are not compared.
    pub drop_duplicates: bool,
    /// Threads that make tokens; 0: one for each core.
    pub threads: usize,
}

/// Where a tokenizer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerFrom {
    /// A byte-level BPE is trained on the text.
    Training {
        /// Entries of its vocabulary.
        vocab_size: usize,
        /// Bytes of text to train it on, spread over all files.
        sample: u64,
    },
    /// A `tokenizer.json`, or a directory with one.
    File(PathBuf),
}

impl PrepareOptions {
    /// With a tokenizer of so many entries that is trained on the text.
    pub fn train_tokenizer(sources: Vec<PathBuf>, vocab_size: usize) -> Self {
        Self::new(sources, TokenizerFrom::Training { vocab_size, sample: 64 << 20 })
    }

    /// With a tokenizer that is there.
    pub fn with_tokenizer(sources: Vec<PathBuf>, tokenizer: PathBuf) -> Self {
        Self::new(sources, TokenizerFrom::File(tokenizer))
    }

    fn new(sources: Vec<PathBuf>, tokenizer: TokenizerFrom) -> Self {
        Self {
            sources,
            field: Sources::FIELD.to_owned(),
            tokenizer,
            end_of_document: END_OF_DOCUMENT.to_owned(),
            validation: 0.05,
            drop_duplicates: true,
            threads: 0,
        }
    }

    /// Trains the tokenizer on so many bytes of text; nothing changes where it is not trained.
    #[must_use]
    pub fn with_sample(mut self, bytes: u64) -> Self {
        if let TokenizerFrom::Training { sample, .. } = &mut self.tokenizer {
            *sample = bytes;
        }
        self
    }

    fn check(&self) -> Result<(), DataError> {
        match (0.0..1.0).contains(&self.validation) {
            true => Ok(()),
            false => Err(DataError::Setting(format!(
                "the share {} of documents that validate must be at least 0 and below 1",
                self.validation
            ))),
        }
    }
}

/// What a preparation is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// A tokenizer is trained.
    Tokenizer,
    /// Text becomes tokens.
    Tokens,
}

/// Is told how far a preparation is, and may stop it.
pub trait Progress: Sync {
    /// Bytes of the sources that are read, of `total`; whether to go on. What is written then is
    /// kept, and the next call with the same options goes on from there.
    fn goes_on(&self, stage: Stage, bytes: u64, total: u64) -> bool;
}

/// Nobody is told.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn goes_on(&self, _: Stage, _: u64, _: u64) -> bool {
        true
    }
}

/// Makes a data set in `out`, which must be empty or not there yet, or hold what an earlier call
/// with the same options left when it was stopped.
///
/// Sources that end in `.idx` are token files in Megatron's layout, made with the tokenizer that is
/// given; their documents are copied.
///
/// # Errors
///
/// If there is no text, the tokenizer cannot be used, `out` holds something else, or a file cannot
/// be read or written.
pub fn prepare(
    out: &Path,
    options: &PrepareOptions,
    progress: &dyn Progress,
) -> Result<Dataset, DataError> {
    options.check()?;
    let indexes = import::indexes(options)?;
    let sources = indexes.as_ref().unwrap_or(&options.sources);
    let sources = Sources::find(sources, &options.field)?;
    let given = state::Given::of(options, &sources)?;
    let workplace = Workplace::open(out, &given)?;
    if workplace.is_complete() {
        return finish::put_in_place(&workplace);
    }
    let tokenizer = match workplace.tokenizer() {
        Some(tokenizer) => tokenizer?,
        None => {
            let tokenizer = match &options.tokenizer {
                TokenizerFrom::File(path) => tokenizer::read(path)?,
                TokenizerFrom::Training { vocab_size, sample } => {
                    train_on(&sources, *vocab_size, *sample, options.validation, progress)?
                }
            };
            // Before hours of work.
            Encoder::new(&tokenizer, &options.end_of_document)?;
            workplace.keep_tokenizer(&tokenizer, &options.tokenizer)?;
            tokenizer
        }
    };
    let encoder = Encoder::new(&tokenizer, &options.end_of_document)?;
    let mut state = workplace.state()?;
    if state.place == Place::default() {
        state.skipped = SkippedFiles::default();
        sources.unreadable().iter().for_each(|file| state.skipped.add(file.clone(), 0));
    }
    let mut pipeline = Pipeline::open(&workplace, &encoder, state, options)?;
    match indexes {
        Some(_) => pipeline.import(&sources, progress)?,
        None => pipeline.run(&sources, progress)?,
    }
    let shown: Vec<String> =
        options.sources.iter().map(|path| path.display().to_string()).collect();
    pipeline.finish(&given, &shown.join(", "))
}

/// Makes a data set of documents that are in memory, with a tokenizer that is.
///
/// # Errors
///
/// As [`prepare`].
pub fn prepare_documents(
    out: &Path,
    documents: Vec<Document>,
    tokenizer: &Tokenizer,
    end_of_document: &str,
    validation: f64,
) -> Result<Dataset, DataError> {
    let options = PrepareOptions {
        validation,
        end_of_document: end_of_document.to_owned(),
        drop_duplicates: false,
        ..PrepareOptions::train_tokenizer(Vec::new(), 0)
    };
    options.check()?;
    let given = state::Given::of_memory();
    let workplace = Workplace::open(out, &given)?;
    workplace.keep_tokenizer(tokenizer, &options.tokenizer)?;
    let encoder = Encoder::new(tokenizer, &options.end_of_document)?;
    let mut pipeline = Pipeline::open(&workplace, &encoder, State::default(), &options)?;
    pipeline.add_documents(documents)?;
    pipeline.finish(&given, "the documents")
}

/// Trains a tokenizer on a sample of what is trained on.
fn train_on(
    sources: &Sources,
    vocab_size: usize,
    sample: u64,
    validation: f64,
    progress: &dyn Progress,
) -> Result<Tokenizer, DataError> {
    // Compressed text is some four times as long as its file.
    let total: u64 = sources.bytes();
    let share = sample as f64 / total.max(1) as f64;
    let mut stopped = false;
    let mut reading = sources.read_from(Place::default());
    let mut taken = 0;
    let (mut any, mut skipped) = (Vec::new(), SkippedFiles::default());
    let texts = std::iter::from_fn(|| {
        // The rest of the text would only be read.
        while taken < sample {
            let item = reading.next()?;
            if !progress.goes_on(Stage::Tokenizer, reading.bytes_read(), total) {
                stopped = true;
                return None;
            }
            let Part { name, text, .. } = match item {
                Item::Part(part) => part,
                Item::Skipped { file, records } => {
                    skipped.add(file, records);
                    continue;
                }
            };
            if Split::of(&name, validation) == Split::Validation {
                if any.is_empty() {
                    any.push(text);
                }
                continue;
            }
            let seen = reading.bytes_read();
            // As much of the sample as of the text that was read.
            if share >= 1.0 || taken as f64 <= share * seen as f64 {
                taken += text.len() as u64;
                return Some(text);
            }
        }
        None
    });
    let texts: Box<dyn Iterator<Item = String> + Send> = Box::new(texts);
    let tokenizer = tokenizer::train(texts, vocab_size, false);
    if stopped {
        return Err(DataError::Stopped);
    }
    match any.pop() {
        // Of a single document that validates by its name, which is split within.
        Some(text) if taken == 0 => tokenizer::train([text].into_iter(), vocab_size, false),
        None if taken == 0 => Err(no_text("the source", &skipped)),
        _ => tokenizer,
    }
}

/// Whether text is on its way to a data set in a directory, which is none yet.
pub fn is_unfinished(directory: &Path) -> bool {
    !Dataset::is_in(directory) && Workplace::is_in(directory)
}

/// Writes a tokenizer that was trained here.
fn write_tokenizer(directory: &Path, tokenizer: &Tokenizer) -> Result<(), DataError> {
    let text = tokenizer.to_string(true);
    let text = text.map_err(|error| DataError::Tokenizer(error.to_string()))?;
    Ok(write_whole(&directory.join(Dataset::TOKENIZER), text.as_bytes())?)
}

/// Copies a tokenizer as it is.
fn copy_tokenizer(directory: &Path, path: &Path) -> Result<(), DataError> {
    let path = tokenizer::file(path);
    let bytes = fs::read(&path).map_err(DataError::io("read", &path))?;
    Ok(write_whole(&directory.join(Dataset::TOKENIZER), &bytes)?)
}
