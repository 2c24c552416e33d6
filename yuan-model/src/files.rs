//! Nothing written is ever half-written: files and directories appear whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// A file or directory that could not be read or written.
///
/// The sentence holds its cause, which is therefore no `source`: a report of the chain would say it
/// twice.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {cause}", path.display())]
pub struct FileError {
    /// What was tried: read, write, …
    pub action: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// What the system said.
    pub cause: io::Error,
}

impl FileError {
    /// For `map_err` on a file operation.
    pub fn of(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |cause| Self { action, path, cause }
    }
}

/// Replaces the file at `path`, or leaves the old one untouched.
///
/// # Errors
///
/// If it cannot be written.
pub fn write_whole(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    let unfinished = unfinished(path);
    let write = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&unfinished)))
        .map_err(FileError::of("write", path))?;
    sync_parent(path)
}

/// Makes the directory `path` from what `fill` writes into it, or leaves nothing behind.
///
/// A directory that is already there is replaced once the new one is complete.
///
/// # Errors
///
/// What `fill` returns, that a file is in the way, or that the directory cannot be written.
pub fn write_directory<E: From<FileError>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    refuse_file(path)?;
    let unfinished = unfinished(path);
    let write = || -> Result<(), E> {
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(FileError::of("remove", &unfinished))?;
        }
        fs::create_dir_all(&unfinished).map_err(FileError::of("create", &unfinished))?;
        fill(&unfinished)?;
        for entry in fs::read_dir(&unfinished).map_err(FileError::of("read", &unfinished))? {
            let file = entry.map_err(FileError::of("read", &unfinished))?.path();
            File::open(&file)
                .and_then(|file| file.sync_all())
                .map_err(FileError::of("write", &file))?;
        }
        remove_directory(path)?;
        Ok(fs::rename(&unfinished, path).map_err(FileError::of("write", path))?)
    };
    write().inspect_err(|_| drop(fs::remove_dir_all(&unfinished)))?;
    Ok(sync_parent(path)?)
}

/// Copies a file into a directory, under its own name.
///
/// # Errors
///
/// If it cannot be read or written.
pub fn copy_into(file: &Path, directory: &Path) -> Result<(), FileError> {
    let to = directory.join(file.file_name().unwrap_or_default());
    fs::copy(file, to).map(drop).map_err(FileError::of("copy", file))
}

/// Removes a directory if it is there; renamed first, so that a kill in the middle leaves nothing
/// that looks complete.
///
/// # Errors
///
/// If it is a file or cannot be removed.
pub fn remove_directory(path: &Path) -> Result<(), FileError> {
    refuse_file(path)?;
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".removed.");
    name.push(UNFINISHED);
    let going = path.with_file_name(name);
    let remove = || {
        if going.exists() {
            fs::remove_dir_all(&going)?;
        }
        if path.exists() {
            fs::rename(path, &going)?;
            fs::remove_dir_all(&going)?;
        }
        Ok(())
    };
    remove().map_err(FileError::of("remove", path))
}

/// What is no directory is not moved out of a directory's way.
fn refuse_file(path: &Path) -> Result<(), FileError> {
    if !path.exists() || path.is_dir() {
        return Ok(());
    }
    Err(FileError::of("replace", path)(io::ErrorKind::NotADirectory.into()))
}

/// Extension of what is not complete.
pub const UNFINISHED: &str = "unfinished";

/// Name under which something is written before it is complete.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".");
    name.push(UNFINISHED);
    path.with_file_name(name)
}

/// Makes a rename survive a power cut.
fn sync_parent(path: &Path) -> Result<(), FileError> {
    let parent =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(FileError::of("write", parent))
}
