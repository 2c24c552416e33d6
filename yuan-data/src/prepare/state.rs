//! Where a preparation works, and the note of how far it is.

use std::{
    fs::{self, File, OpenOptions},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;
use xxhash_rust::xxh3::xxh3_64;
use yuan_files::write_whole;

use super::{PrepareOptions, TokenizerFrom, copy_tokenizer, write_tokenizer};
use crate::{DataError, Dataset, Place, Position, Sources, source::SkippedFiles, tokenizer};

/// What a preparation was asked for: one that goes on must be asked for the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Given {
    field: String,
    tokenizer: String,
    end_of_document: String,
    pub validation: f64,
    drop_duplicates: bool,
    pub sources: Vec<crate::SourceInfo>,
    /// Names, sizes and times of all files.
    files: u64,
}

impl Given {
    pub fn of(options: &PrepareOptions, sources: &Sources) -> Result<Self, DataError> {
        let files = serde_json::to_vec(sources.files()).expect("names and numbers are plain data");
        let mut given = Vec::new();
        for path in &options.sources {
            let below = sources.files().iter().filter(|file| file.path.starts_with(path));
            let (files, bytes) =
                below.fold((0, 0), |(files, bytes), file| (files + 1, bytes + file.bytes));
            given.push(crate::SourceInfo { path: path.display().to_string(), files, bytes });
        }
        let tokenizer = match &options.tokenizer {
            TokenizerFrom::Training { vocab_size, sample } => {
                format!("{vocab_size} entries, trained on {sample} bytes")
            }
            TokenizerFrom::File(path) => {
                let path = tokenizer::file(path);
                let bytes = fs::read(&path).map_err(DataError::io("read", &path))?;
                crate::dataset::digest(&bytes)
            }
        };
        Ok(Self {
            field: options.field.clone(),
            tokenizer,
            end_of_document: options.end_of_document.clone(),
            validation: options.validation,
            drop_duplicates: options.drop_duplicates,
            sources: given,
            files: xxh3_64(&files),
        })
    }

    /// Of documents in memory, which are not there when a process goes on.
    pub fn of_memory() -> Self {
        Self {
            field: String::new(),
            tokenizer: String::new(),
            end_of_document: String::new(),
            validation: 0.0,
            drop_duplicates: false,
            sources: Vec::new(),
            files: 0,
        }
    }

    /// What differs from another one.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("the field", self.field == other.field),
            ("the tokenizer", self.tokenizer == other.tokenizer),
            ("the end of documents", self.end_of_document == other.end_of_document),
            ("the share that validates", self.validation == other.validation),
            ("the treatment of duplicates", self.drop_duplicates == other.drop_duplicates),
            ("a file of the sources", self.files == other.files),
        ]
        .into_iter()
        .find_map(|(what, is_same)| (!is_same).then_some(what))
    }
}

/// How far a preparation is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// What is read.
    pub place: Place,
    /// What is written to train on, and to validate with.
    pub written: [Position; 2],
    /// Which of both the document belongs to that is not complete.
    pub open: Option<usize>,
    /// Documents whose hashes are remembered.
    pub hashes: u64,
    pub duplicates: u64,
    pub skipped: SkippedFiles,
}

/// The directory `unfinished` of a data set, held by one process.
#[derive(Debug)]
pub(super) struct Workplace {
    out: PathBuf,
    directory: PathBuf,
    _lock: File,
    was_there: bool,
}

impl Workplace {
    const DIRECTORY: &str = "unfinished";
    /// Where the directory is while it is being removed.
    const LEFTOVER: &str = "leftover";
    const GIVEN: &str = "given.json";
    const STATE: &str = "progress.json";

    /// Takes the directory.
    pub fn open(out: &Path, given: &Given) -> Result<Self, DataError> {
        let directory = out.join(Self::DIRECTORY);
        // What a process was killed at that had nothing else to do.
        let leftover = out.join(Self::LEFTOVER);
        if leftover.is_dir() {
            fs::remove_dir_all(&leftover).map_err(DataError::io("remove", &leftover))?;
        }
        let is_complete = directory.join(Dataset::FILE).is_file();
        if Dataset::is_in(out) && !is_complete {
            return Err(DataError::Setting(format!(
                "{} holds a complete data set already: use it, or choose another directory",
                out.display()
            )));
        }
        let is_foreign = |entry: &fs::DirEntry| {
            let name = entry.file_name();
            let is_moved = is_complete && is_part(&name.to_string_lossy());
            name != Self::DIRECTORY && !is_moved
        };
        match fs::read_dir(out) {
            Ok(entries) => {
                if let Some(entry) = entries.flatten().find(is_foreign) {
                    return Err(DataError::Setting(format!(
                        "{} is not empty (it holds {}): choose a directory for the data set alone",
                        out.display(),
                        entry.file_name().to_string_lossy()
                    )));
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(DataError::io("use", out)(error)),
        }
        fs::create_dir_all(&directory).map_err(DataError::io("create", &directory))?;
        let path = directory.join("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(DataError::io("write", &path))?;
        if matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)) {
            return Err(DataError::Busy(out.to_path_buf()));
        }
        let path = directory.join(Self::GIVEN);
        let was_there = match fs::read(&path) {
            Ok(text) => {
                let earlier: Given = serde_json::from_slice(&text)
                    .map_err(|error| DataError::damaged(&path, error.to_string()))?;
                if let Some(what) = given.difference(&earlier) {
                    return Err(DataError::OtherPreparation { path: directory, what: what.into() });
                }
                true
            }
            Err(_) => {
                let text = serde_json::to_vec_pretty(given).expect("plain data");
                write_whole(&path, &text)?;
                false
            }
        };
        Ok(Self { out: out.to_path_buf(), directory, _lock: lock, was_there })
    }

    /// Where it is to be in the end.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Where the work is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether an earlier process was killed when only names were missing.
    pub fn is_complete(&self) -> bool {
        self.directory.join(Dataset::FILE).is_file()
    }

    /// Whether text is on its way to a data set in a directory.
    pub fn is_in(out: &Path) -> bool {
        out.join(Self::DIRECTORY).join(Self::GIVEN).is_file()
    }

    /// Removes it, at once for everybody who looks.
    pub fn remove(&self) -> Result<(), DataError> {
        let leftover = self.out.join(Self::LEFTOVER);
        let removed =
            fs::rename(&self.directory, &leftover).and_then(|()| fs::remove_dir_all(&leftover));
        removed.map_err(DataError::io("remove", &self.directory))
    }

    /// The tokenizer that an earlier process left.
    pub fn tokenizer(&self) -> Option<Result<Tokenizer, DataError>> {
        let path = self.directory.join(Dataset::TOKENIZER);
        (self.was_there && path.is_file()).then(|| tokenizer::read(&path))
    }

    pub fn keep_tokenizer(
        &self,
        tokenizer: &Tokenizer,
        from: &TokenizerFrom,
    ) -> Result<(), DataError> {
        match from {
            TokenizerFrom::File(path) => copy_tokenizer(&self.directory, path),
            TokenizerFrom::Training { .. } => write_tokenizer(&self.directory, tokenizer),
        }
    }

    /// How far an earlier process came.
    pub fn state(&self) -> Result<State, DataError> {
        let path = self.directory.join(Self::STATE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| DataError::damaged(&path, error.to_string())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(State::default()),
            Err(error) => Err(DataError::io("read", &path)(error)),
        }
    }

    pub fn save(&self, state: &State) -> Result<(), DataError> {
        let text = serde_json::to_vec(state).expect("plain data");
        Ok(write_whole(&self.directory.join(Self::STATE), &text)?)
    }
}

/// Whether a file of this name belongs to a data set.
pub(super) fn is_part(name: &str) -> bool {
    super::finish::FILES.contains(&name)
        || name == Dataset::FILE
        || yuan_files::is_unfinished(name, Dataset::FILE)
}
