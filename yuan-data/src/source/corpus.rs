//! Text that fits into memory.

use std::{fs, path::Path};

use super::{Item, Part, Place, Skipped, Sources};
use crate::{DataError, Document};

/// What was read from a file or a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Corpus {
    /// Texts, ordered by path.
    pub documents: Vec<Document>,
    /// What was left out.
    pub skipped: SkippedFiles,
}

/// What was left out of some sources, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SkippedFiles {
    /// Number of files that are no text.
    pub files: u64,
    /// The first of them.
    pub named: Vec<Skipped>,
    /// Number of lines and rows without text.
    pub records: u64,
    /// The first files of which a part is no text, one entry for each reason.
    pub read_in_part: Vec<Skipped>,
}

impl SkippedFiles {
    /// How many files, and how many reasons, are remembered.
    const NAMED: usize = 5;

    /// Takes note of a file, or of lines or rows of one.
    pub fn add(&mut self, file: Skipped, records: u64) {
        if records == 0 {
            self.files += 1;
            if self.named.len() < Self::NAMED {
                self.named.push(file);
            }
            return;
        }
        self.records += records;
        let is_known = |other: &Skipped| other.name == file.name && other.reason == file.reason;
        if !self.read_in_part.iter().any(is_known) && self.read_in_part.len() < Self::NAMED {
            self.read_in_part.push(file);
        }
    }

    /// What was left out, in one line; none if nothing was.
    pub fn summary(&self) -> Option<String> {
        let listed =
            |files: &[Skipped]| files.iter().map(Skipped::to_string).collect::<Vec<_>>().join(", ");
        let mut parts = Vec::new();
        match self.files {
            0 => {}
            1 => parts.push(format!("skipped {}", listed(&self.named))),
            count => {
                let more = match count - self.named.len() as u64 {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                parts.push(format!("skipped {count} files: {}{more}", listed(&self.named)));
            }
        }
        if self.records > 0 {
            let (records, files) = (self.records, listed(&self.read_in_part));
            let s = if records == 1 { "" } else { "s" };
            parts.push(format!("left out {records} record{s}: {files}"));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

impl Corpus {
    /// Reads a file, or every file below a directory, links followed, into memory: see
    /// [`Sources`], which reads more than that.
    ///
    /// # Errors
    ///
    /// A path that cannot be read, or one without any text.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let mut corpus = Self::default();
        let sources = Sources::find(&[path.to_path_buf()], Sources::FIELD)?;
        for file in sources.unreadable() {
            corpus.skipped.add(file.clone(), 0);
        }
        for item in sources.read_from(Place::default()) {
            match item {
                Item::Skipped { file, records } => corpus.skipped.add(file, records),
                Item::Part(Part { name, text, is_first, .. }) => {
                    match corpus.documents.last_mut() {
                        Some(document) if !is_first => document.text.push_str(&text),
                        _ => corpus.documents.push(Document { name, text }),
                    }
                }
            }
        }
        if corpus.documents.is_empty() {
            return Err(no_text(&path.display().to_string(), &corpus.skipped));
        }
        Ok(corpus)
    }
}

/// The error of sources in which nothing is text.
pub(crate) fn no_text(sources: &str, skipped: &SkippedFiles) -> DataError {
    let why = skipped.summary().map_or_else(String::new, |skipped| format!(": {skipped}"));
    DataError::NoText(format!("{sources} holds no text{why}"))
}

/// The file as a document, unless it is empty, larger than `most` bytes or no text.
///
/// # Errors
///
/// If the file cannot be read.
pub fn read_document(name: String, file: &Path, most: u64) -> Result<Option<Document>, DataError> {
    if fs::metadata(file).map_err(DataError::io("read", file))?.len() > most {
        return Ok(None);
    }
    let bytes = fs::read(file).map_err(DataError::io("read", file))?;
    let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    let text = text.filter(|text| !text.trim().is_empty());
    Ok(text.map(|text| Document { name, text }))
}
