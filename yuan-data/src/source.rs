//! Text from files: which are read, as what, and what is left out and why.
//!
//! [`Sources`] reads any amount of it piece by piece, from any [`Place`] on; [`Corpus`] reads what
//! fits into memory.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::DataError;

mod corpus;
mod files;
mod lines;
mod open;
mod parquet;
mod text;

pub(crate) use corpus::no_text;
pub use corpus::{Corpus, SkippedFiles, read_document};
pub use files::files_below;
use files::{Files, below};
pub use lines::JsonLines;
use lines::Lines;
use parquet::Rows;
use text::{Chunks, WholeText};

/// Files of text, in the order in which they are read.
///
/// | ending | read as |
/// |---|---|
/// | `.jsonl` | a document a line: a text, or an object with one in the field |
/// | `.parquet` | a document a row of the column |
/// | any other | a document, in UTF-8 or, with a byte order mark, UTF-16 |
///
/// All but `.parquet` may be compressed: `.gz`, `.zst`.
#[derive(Debug, Clone)]
pub struct Sources {
    files: Vec<SourceFile>,
    unreadable: Vec<Skipped>,
    field: String,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Its path below the directory that was given, the same on every system.
    pub name: String,
    /// Where it is.
    #[serde(skip)]
    pub path: PathBuf,
    /// Its size on the disk.
    pub bytes: u64,
    /// When it was written, in nanoseconds since 1970, where that is known.
    pub modified: u64,
}

/// A file that was left out, whole or in part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its path below the directory that was read.
    pub name: String,
    /// Why.
    pub reason: String,
    /// Where in it the first record is that was left out for this reason, such as `line 3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<String>,
}

impl Skipped {
    /// A file that was left out as a whole.
    pub fn whole(name: String, reason: String) -> Self {
        Self { name, reason, first: None }
    }

    /// A record of a file, at a place such as `line 3`.
    pub fn record(name: String, reason: String, place: String) -> Self {
        Self { name, reason, first: Some(place) }
    }
}

/// Where to go on reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Number of the file.
    pub file: usize,
    /// Lines or rows of it that were read; 0 or 1 piece of other files.
    pub record: u64,
    /// Bytes of the file, decompressed, that were read.
    pub offset: u64,
}

/// A piece of a document: all of it, unless it is longer than [`Part::LONGEST`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Name of the document, the same on every machine.
    pub name: String,
    /// Text of this piece.
    pub text: String,
    /// Whether the document begins with it.
    pub is_first: bool,
    /// Whether the document ends with it.
    pub is_last: bool,
}

impl Part {
    /// Bytes of text that are read at once. Longer documents are cut between two words that every
    /// tokenizer would separate, if there are any.
    pub const LONGEST: usize = 256 << 10;
}

/// What reading sources comes upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A piece of text.
    Part(Part),
    /// A file or a part of one that is no text; of a line or row, `records` of them.
    Skipped {
        /// Which, and why.
        file: Skipped,
        /// 0: the file, or the rest of it; else so many lines or rows.
        records: u64,
    },
}

impl Sources {
    /// Name of the field of a line and of the column of a table, unless another one is wanted.
    pub const FIELD: &'static str = "text";

    /// Files, and every file below directories, links followed.
    ///
    /// # Errors
    ///
    /// A path that is not there or cannot be read, or no path at all.
    pub fn find(paths: &[PathBuf], field: &str) -> Result<Self, DataError> {
        let (mut files, mut unreadable) = (Vec::new(), Vec::new());
        for path in paths {
            // Files of several directories keep their names apart.
            let prefix = match (paths.len(), path.file_name()) {
                (1, _) | (_, None) => String::new(),
                (_, Some(name)) => format!("{}/", name.to_string_lossy()),
            };
            if path.is_file() {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                files.push(SourceFile::new(name, path)?);
            } else if path.exists() && !path.is_dir() {
                let reason = format!("{} is neither a file nor a directory", path.display());
                return Err(DataError::NoText(reason));
            } else {
                let found = Files::below(path)?;
                for file in &found.files {
                    files.push(SourceFile::new(prefix.clone() + &below(file, path), file)?);
                }
                for (file, reason) in found.unreadable {
                    unreadable.push(Skipped::whole(prefix.clone() + &below(&file, path), reason));
                }
            }
        }
        if files.is_empty() {
            let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            return Err(DataError::NoText(match paths.is_empty() {
                true => "there is no path to read text from".into(),
                false => format!("{} holds no text: there is no file", paths.join(", ")),
            }));
        }
        Ok(Self { files, unreadable, field: field.to_owned() })
    }

    /// The files.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// What cannot be read at all.
    pub fn unreadable(&self) -> &[Skipped] {
        &self.unreadable
    }

    /// Bytes of all files on the disk.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Everything from a place on; after the last item of a document the iterator's
    /// [`place`](Reading::place) is where to go on behind it.
    pub fn read_from(&self, place: Place) -> Reading<'_> {
        let before = self.files.iter().take(place.file).map(|file| file.bytes).sum();
        Reading { sources: self, place, file: None, bytes_before: before }
    }
}

impl SourceFile {
    fn new(name: String, path: &Path) -> Result<Self, DataError> {
        let metadata = fs::metadata(path).map_err(DataError::io("read", path))?;
        let since = metadata
            .modified()
            .ok()
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        Ok(Self {
            name,
            path: path.to_path_buf(),
            bytes: metadata.len(),
            modified: since.map_or(0, |since| since.as_nanos() as u64),
        })
    }
}

/// Reads [`Sources`] piece by piece.
pub struct Reading<'a> {
    sources: &'a Sources,
    place: Place,
    file: Option<OpenFile>,
    /// On the disk, of the files before the open one.
    bytes_before: u64,
}

/// What a reader of one kind of file returns next.
enum Next {
    /// Text, and whether a document begins and ends with it.
    Text {
        text: String,
        is_first: bool,
        is_last: bool,
    },
    /// A line or a row without text.
    None(String),
    /// The rest is no text.
    Broken(String),
    End,
}

enum OpenFile {
    Text(Box<Chunks>),
    Lines(Box<Lines>),
    Rows(Box<Rows>),
}

impl Reading<'_> {
    /// Where to go on behind the last item, if no document was cut there.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Bytes on the disk that were read, of [`Sources::bytes`].
    pub fn bytes_read(&self) -> u64 {
        self.bytes_before
            + match &self.file {
                None => 0,
                Some(OpenFile::Text(chunks)) => chunks.bytes_read(),
                Some(OpenFile::Lines(lines)) => lines.bytes_read(),
                Some(OpenFile::Rows(rows)) => rows.bytes_read(),
            }
    }

    /// Whether the last item is a piece of a file that is one document.
    pub(crate) fn is_whole_file(&self) -> bool {
        matches!(self.file, Some(OpenFile::Text(_)))
    }

    fn open(&self, file: &SourceFile) -> Result<OpenFile, String> {
        let kind = open::Kind::of(&file.path)?;
        let place = self.place;
        Ok(match kind {
            open::Kind::Table => {
                OpenFile::Rows(Box::new(Rows::open(&file.path, &self.sources.field, place.record)?))
            }
            open::Kind::Lines(compression) => {
                let reader = open::reader(&file.path, compression).map_err(|e| e.to_string())?;
                let field = self.sources.field.clone();
                OpenFile::Lines(Box::new(Lines::new(reader, field, place.record, place.offset)?))
            }
            open::Kind::Text(compression) => {
                let open = || open::reader(&file.path, compression).map_err(|e| e.to_string());
                if place.offset == 0 {
                    // A document of which half was written is worse than none.
                    WholeText::check(open()?)?;
                }
                OpenFile::Text(Box::new(Chunks::new(open()?, place.offset)?))
            }
        })
    }

    fn next_of_file(&mut self) -> Next {
        match self.file.as_mut().expect("a file is open") {
            OpenFile::Text(chunks) => chunks.next(),
            OpenFile::Lines(lines) => lines.next(),
            OpenFile::Rows(rows) => rows.next(),
        }
    }

    fn leave_file(&mut self) {
        self.bytes_before += self.sources.files[self.place.file].bytes;
        self.file = None;
        self.place = Place { file: self.place.file + 1, record: 0, offset: 0 };
    }

    fn moved(&mut self) {
        let (record, offset) = match self.file.as_ref().expect("a file is open") {
            OpenFile::Text(chunks) => (1, chunks.offset()),
            OpenFile::Lines(lines) => (lines.lines(), lines.offset()),
            OpenFile::Rows(rows) => (rows.rows(), 0),
        };
        self.place = Place { record, offset, ..self.place };
    }
}

impl Iterator for Reading<'_> {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        loop {
            let file = self.sources.files.get(self.place.file)?;
            let name = file.name.clone();
            if self.file.is_none() {
                match self.open(file) {
                    Ok(open) => self.file = Some(open),
                    Err(reason) => {
                        self.leave_file();
                        return Some(Item::Skipped {
                            file: Skipped::whole(name, reason),
                            records: 0,
                        });
                    }
                }
            }
            let next = self.next_of_file();
            self.moved();
            match next {
                Next::Text { text, is_first, is_last } => {
                    let is_whole_file = self.is_whole_file();
                    let name = match is_whole_file {
                        true => name,
                        false => format!("{name}:{}", self.place.record),
                    };
                    if is_whole_file && is_last {
                        self.leave_file();
                    }
                    return Some(Item::Part(Part { name, text, is_first, is_last }));
                }
                Next::None(reason) => {
                    let kind =
                        if matches!(self.file, Some(OpenFile::Rows(_))) { "row" } else { "line" };
                    let place = format!("{kind} {}", self.place.record);
                    let file = Skipped::record(name, reason, place);
                    return Some(Item::Skipped { file, records: 1 });
                }
                Next::Broken(reason) => {
                    self.leave_file();
                    return Some(Item::Skipped { file: Skipped::whole(name, reason), records: 0 });
                }
                Next::End => self.leave_file(),
            }
        }
    }
}

impl fmt::Debug for Reading<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading").field("place", &self.place).finish_non_exhaustive()
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A name may hold what a terminal would obey.
        let name = match self.name.chars().any(char::is_control) {
            true => self.name.escape_debug().to_string(),
            false => self.name.clone(),
        };
        let reason = &self.reason;
        match &self.first {
            None => write!(f, "{name} ({reason})"),
            Some(first) => write!(f, "{name} ({reason}; the first is {first})"),
        }
    }
}

#[cfg(test)]
mod tests;
