//! Documents: one text file each, split by name into training and validation.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::TrainError;

/// Files above this are tables or generated code more often than text.
const LARGEST_FILE: u64 = 1 << 20;

/// One text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Name that orders the documents and decides the split; the same on every machine.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// Which part of the data a document belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Trained on.
    Train,
    /// Only looked at to measure.
    Validation,
}

impl Document {
    /// About one document in twenty validates; its name alone decides.
    pub fn split(&self) -> Split {
        if (yuan_model::fnv1a(&self.name) >> 32).is_multiple_of(20) {
            Split::Validation
        } else {
            Split::Train
        }
    }
}

/// Documents of about `bytes` altogether, spread evenly over the list; all of them if they are
/// fewer.
pub fn thin_out(documents: Vec<Document>, bytes: usize) -> Vec<Document> {
    let total: usize = documents.iter().map(|document| document.text.len()).sum();
    let (mut seen, mut kept) = (0, 0);
    let is_due = |document: &Document| {
        seen += document.text.len();
        let due = kept as f64 + document.text.len() as f64 / 2.0
            <= bytes as f64 * seen as f64 / total as f64;
        kept += if due { document.text.len() } else { 0 };
        due
    };
    if total <= bytes { documents } else { documents.into_iter().filter(is_due).collect() }
}

/// Reads every UTF-8 file below `directory`, ordered by path; binary and huge files are passed
/// over.
///
/// # Errors
///
/// A directory that cannot be read, or one without any text.
pub fn read_directory(directory: &Path) -> Result<Vec<Document>, TrainError> {
    let mut documents = Vec::new();
    for file in files_below(directory)? {
        let name =
            file.strip_prefix(directory).unwrap_or(&file).to_string_lossy().replace('\\', "/");
        documents.extend(read_document(name, &file)?);
    }
    if documents.is_empty() {
        return Err(TrainError::Corpus(format!(
            "{} holds no text files in UTF-8 of up to 1 MiB",
            directory.display()
        )));
    }
    Ok(documents)
}

/// The file as a document, unless it is empty, too large or no UTF-8 text.
///
/// # Errors
///
/// If the file cannot be read.
pub fn read_document(name: String, file: &Path) -> Result<Option<Document>, TrainError> {
    let size = fs::metadata(file).map_err(TrainError::io("read", file))?.len();
    if size == 0 || size > LARGEST_FILE {
        return Ok(None);
    }
    let bytes = fs::read(file).map_err(TrainError::io("read", file))?;
    let text = String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0') && !text.trim().is_empty());
    Ok(text.map(|text| Document { name, text }))
}

/// All files below a directory, ordered by path; links are not followed.
///
/// # Errors
///
/// If a directory cannot be read.
pub fn files_below(directory: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::new();
    let mut left = vec![directory.to_path_buf()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).map_err(TrainError::io("read", &directory))? {
            let entry = entry.map_err(TrainError::io("read", &directory))?;
            let kind = entry.file_type().map_err(TrainError::io("read", &entry.path()))?;
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_out_keeps_the_size_and_the_spread() {
        let documents: Vec<Document> = (0..100)
            .map(|i| Document { name: i.to_string(), text: "x".repeat(1 + i * 37 % 50) })
            .collect();
        let size = |documents: &[Document]| documents.iter().map(|d| d.text.len()).sum::<usize>();
        let thinned = thin_out(documents.clone(), size(&documents) / 5);
        let share = size(&thinned) as f64 / size(&documents) as f64;
        assert!((share - 0.2).abs() < 0.02, "{share}");
        let late = thinned.iter().filter(|d| d.name.parse::<usize>().unwrap() >= 50).count() as f64;
        assert!((late / thinned.len() as f64 - 0.5).abs() < 0.15);
        assert_eq!(thin_out(documents.clone(), 1 << 20), documents);
    }
}
