//! A directory of prepared tokens, and what is known of it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;
use xxhash_rust::xxh3::xxh3_128;
use yuan_files::Checksum;

use crate::{DataError, TokenFile, TokenType, source::SkippedFiles, tokenizer};

/// Tokens to train on and to validate with, and the tokenizer that made them: what
/// [`prepare`](crate::prepare()) writes.
///
/// | file | is |
/// |---|---|
/// | `dataset.json` | [`DatasetInfo`]; it is written last |
/// | `train.bin`, `train.idx` | documents in Megatron's indexed layout, each ended by `<eod>` |
/// | `validation.bin`, `validation.idx` | the same, of the documents that are only measured on |
/// | `tokenizer.json` | the tokenizer |
#[derive(Debug, Clone)]
pub struct Dataset {
    directory: PathBuf,
    info: DatasetInfo,
}

/// What a data set is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DatasetInfo {
    /// Layout of this file; 1.
    pub layout: u32,
    /// Digest of `tokenizer.json` (XXH3, 128 bits).
    pub tokenizer: String,
    /// Entries of the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Token that ends every document.
    pub end_of_document: String,
    /// Its id.
    pub eod: u32,
    /// How a token is stored.
    pub token_type: TokenType,
    /// What is trained on.
    pub train: SplitInfo,
    /// What is only measured on.
    pub validation: SplitInfo,
    /// Share of the documents that was to validate.
    pub validation_share: f64,
    /// Whether the end of every document validates, because too few documents would have.
    pub split_within_documents: bool,
    /// Documents that were there before, to the last character, and were left out.
    pub duplicates: u64,
    /// What the text was read from.
    pub sources: Vec<SourceInfo>,
    /// What of it is no text, and why.
    pub skipped: SkippedFiles,
}

/// One part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitInfo {
    /// Documents.
    pub documents: u64,
    /// Tokens, those that end documents included.
    pub tokens: u64,
    /// Size and checksum of the tokens.
    pub bin: Checksum,
    /// Size and checksum of the index.
    pub idx: Checksum,
}

/// A file or directory that text was read from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceInfo {
    /// As it was given.
    pub path: String,
    /// Files below it.
    pub files: u64,
    /// Their size on the disk.
    pub bytes: u64,
}

impl Dataset {
    /// Name of the file that describes a data set; a directory with it is complete.
    pub const FILE: &'static str = "dataset.json";
    /// Name of the tokenizer.
    pub const TOKENIZER: &'static str = "tokenizer.json";
    /// Up to this size the files are read and compared with their checksums when they are opened.
    const CHECKED_AT_ONCE: u64 = 64 << 20;

    /// Opens a data set and checks that its files are there, whole by their sizes and, if they are
    /// small, by their checksums.
    ///
    /// # Errors
    ///
    /// If the directory is no data set, or a file of it is missing or damaged.
    pub fn open(directory: &Path) -> Result<Self, DataError> {
        let path = directory.join(Self::FILE);
        let text = fs::read_to_string(&path).map_err(DataError::io("read", &path))?;
        let info: DatasetInfo = serde_json::from_str(&text)
            .map_err(|error| DataError::damaged(&path, format!("no data set: {error}")))?;
        if info.layout != 1 {
            let reason = format!("layout {} is not known to this version", info.layout);
            return Err(DataError::damaged(&path, reason));
        }
        let dataset = Self { directory: directory.to_path_buf(), info };
        match dataset.problems(Self::CHECKED_AT_ONCE).into_iter().next() {
            Some((path, reason)) => Err(DataError::Damaged { path, reason }),
            None => Ok(dataset),
        }
    }

    /// Whether a directory holds a complete data set.
    pub fn is_in(directory: &Path) -> bool {
        directory.join(Self::FILE).is_file()
    }

    /// Files that are not what was written, and why; those of at most `read` bytes are read for
    /// that, of the others only the sizes are looked at.
    pub fn problems(&self, read: u64) -> Vec<(PathBuf, String)> {
        let mut problems = Vec::new();
        let files = [
            ("train.bin", self.info.train.bin),
            ("train.idx", self.info.train.idx),
            ("validation.bin", self.info.validation.bin),
            ("validation.idx", self.info.validation.idx),
        ];
        for (name, written) in files {
            let path = self.directory.join(name);
            let found = match fs::metadata(&path) {
                Ok(found) if found.len() != written.bytes => {
                    let (found, written) = (found.len(), written.bytes);
                    problems
                        .push((path, format!("it has {found} bytes, but {written} were written")));
                    continue;
                }
                Ok(found) if found.len() <= read => Checksum::of_file(&path),
                Ok(_) => Ok(written),
                Err(error) => {
                    problems.push((path, format!("cannot read it: {error}")));
                    continue;
                }
            };
            match found {
                Ok(found) if found == written => {}
                Ok(_) => {
                    let reason = "it is damaged: its checksum is not the one it had";
                    problems.push((path, reason.into()));
                }
                Err(error) => problems.push((path, error.to_string())),
            }
        }
        let path = self.directory.join(Self::TOKENIZER);
        match fs::read(&path) {
            Ok(bytes) if digest(&bytes) == self.info.tokenizer => {}
            Ok(_) => problems.push((path, "it is not the tokenizer that made these tokens".into())),
            Err(error) => problems.push((path, format!("cannot read it: {error}"))),
        }
        problems
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What it is made of.
    pub fn info(&self) -> &DatasetInfo {
        &self.info
    }

    /// The tokens to train on.
    ///
    /// # Errors
    ///
    /// If the file is damaged.
    pub fn train(&self) -> Result<TokenFile, DataError> {
        self.file("train")
    }

    /// The tokens to validate with.
    ///
    /// # Errors
    ///
    /// If the file is damaged.
    pub fn validation(&self) -> Result<TokenFile, DataError> {
        self.file("validation")
    }

    fn file(&self, name: &str) -> Result<TokenFile, DataError> {
        Ok(TokenFile::open(&self.directory.join(name))?.with_vocabulary(self.info.vocab_size))
    }

    /// The tokenizer that made the tokens.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer, DataError> {
        tokenizer::read(&self.directory)
    }
}

/// What tells a tokenizer from another one.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("{:032x}", xxh3_128(bytes))
}
