//! Nothing written is ever half-written: files and directories appear whole or not at all.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use crate::TrainError;

/// Replaces the file at `path`, or leaves the old one untouched.
pub(crate) fn write_whole(path: &Path, contents: &[u8]) -> Result<(), TrainError> {
    let unfinished = unfinished(path);
    let write = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&unfinished))).map_err(TrainError::io("write", path))?;
    sync_parent(path)
}

/// Makes the directory `path` from what `fill` writes into it, or leaves nothing behind.
pub(crate) fn write_directory(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let unfinished = unfinished(path);
    let write = || {
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(TrainError::io("remove", &unfinished))?;
        }
        fs::create_dir_all(&unfinished).map_err(TrainError::io("create", &unfinished))?;
        fill(&unfinished)?;
        for entry in fs::read_dir(&unfinished).map_err(TrainError::io("read", &unfinished))? {
            let file = entry.map_err(TrainError::io("read", &unfinished))?.path();
            File::open(&file).and_then(|file| file.sync_all()).map_err(TrainError::io("write", &file))?;
        }
        remove_directory(path)?;
        fs::rename(&unfinished, path).map_err(TrainError::io("write", path))
    };
    write().inspect_err(|_| drop(fs::remove_dir_all(&unfinished)))?;
    sync_parent(path)
}

/// Removes a directory if it is there; renamed first, so that a kill in the middle leaves nothing that looks
/// complete.
pub(crate) fn remove_directory(path: &Path) -> Result<(), TrainError> {
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
    remove().map_err(TrainError::io("remove", path))
}

/// Extension of what is not complete.
pub(crate) const UNFINISHED: &str = "unfinished";

/// Name under which something is written before it is complete.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".");
    name.push(UNFINISHED);
    path.with_file_name(name)
}

/// Makes a rename survive a power cut.
fn sync_parent(path: &Path) -> Result<(), TrainError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|directory| directory.sync_all()).map_err(TrainError::io("write", parent))
}
