//! The files below a directory.

use std::{
    collections::HashSet,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use crate::DataError;

/// The part of a path below a directory, the same on every system.
pub(super) fn below(file: &Path, directory: &Path) -> String {
    file.strip_prefix(directory).unwrap_or(file).to_string_lossy().replace('\\', "/")
}

/// All files below a directory, ordered by path; links are followed, and a file that has several
/// names is listed by the first.
///
/// # Errors
///
/// If a directory cannot be read.
pub fn files_below(directory: &Path) -> Result<Vec<PathBuf>, DataError> {
    Ok(Files::below(directory)?.files)
}

#[derive(Default)]
pub(super) struct Files {
    pub files: Vec<PathBuf>,
    /// What cannot be read, and why.
    pub unreadable: Vec<(PathBuf, String)>,
}

impl Files {
    pub fn below(directory: &Path) -> Result<Self, DataError> {
        let mut found = Self::default();
        // A link may lead to a directory above it, which would be without end.
        let mut seen = HashSet::new();
        found.enter(directory, &mut seen)?;
        found.files.sort();
        Ok(found)
    }

    /// Everything in a directory, in the order of the names, which is the same everywhere.
    fn enter(&mut self, directory: &Path, seen: &mut HashSet<PathBuf>) -> Result<(), DataError> {
        let read = |error| DataError::io("read", directory)(error);
        if !seen.insert(directory.canonicalize().map_err(read)?) {
            return Ok(());
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(directory).map_err(read)? {
            paths.push(entry.map_err(read)?.path());
        }
        paths.sort();
        for path in paths {
            // Of what a link leads to.
            match fs::metadata(&path) {
                Ok(target) if target.is_dir() => self.enter(&path, seen)?,
                Ok(target) if target.is_file() => {
                    if seen.insert(path.canonicalize().map_err(DataError::io("read", &path))?) {
                        self.files.push(path);
                    }
                }
                Ok(_) => self.unreadable.push((path, "neither a file nor a directory".into())),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    self.unreadable.push((path, "its link leads nowhere".into()));
                }
                Err(error) => self.unreadable.push((path, error.to_string())),
            }
        }
        Ok(())
    }
}
