//! A directory that is about to become a run.

use std::{
    ffi::OsStr,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use yuan_files::is_unfinished;

use super::lock::RunLock;
use crate::{
    TrainError,
    data::DataSets,
    names::{CONFIG, MODEL, OPTIONS, TOKENIZER_FILES},
};

/// A directory that this process has taken to make a run in; no other process can.
///
/// Dropped before [`Run::create_in`](crate::Run::create_in) has made the run, it removes what was
/// prepared, and the directory if it was not there before and nothing else is in it.
#[derive(Debug)]
pub struct Claim {
    directory: PathBuf,
    /// Given up last, after the directory was tidied.
    lock: Option<RunLock>,
    made: bool,
    is_run: bool,
}

impl Claim {
    /// Takes a directory that is not there, is empty, or holds nothing but what a preparation left
    /// that was killed.
    ///
    /// # Errors
    ///
    /// If something else is in it, another process has it, or it cannot be made.
    pub fn take(directory: &Path) -> Result<Self, TrainError> {
        if let Some(parent) = directory.parent() {
            fs::create_dir_all(parent).map_err(TrainError::io("create", parent))?;
        }
        let made = match fs::create_dir(directory) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                check_free(directory)?;
                false
            }
            Err(error) => return Err(TrainError::io("create", directory)(error)),
        };
        let lock = RunLock::take(directory).inspect_err(|_| {
            if made {
                // Only if it is empty, and nobody else was faster.
                drop(fs::remove_dir(directory));
            }
        })?;
        let claim = Self { directory: directory.into(), lock: Some(lock), made, is_run: false };
        // Another process may have been faster and done.
        if let Err(error) = check_free(directory) {
            claim.done();
            return Err(error);
        }
        claim.tidy()?;
        Ok(claim)
    }

    /// Takes the first of `runs/name`, `runs/name-2`, `runs/name-3`, … that can be taken.
    ///
    /// # Errors
    ///
    /// If none of many can.
    pub fn first_free(directory: &Path) -> Result<Self, TrainError> {
        const MOST: usize = 100_000;
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        for number in 1..MOST {
            let path = match number {
                1 => directory.to_path_buf(),
                _ => directory.with_file_name(format!("{name}-{number}")),
            };
            match Self::take(&path) {
                Err(
                    TrainError::RunExists(_) | TrainError::NotEmpty(_) | TrainError::RunBusy { .. },
                ) => {}
                Err(_) if path.symlink_metadata().is_ok() && !path.is_dir() => {}
                claimed => return claimed,
            }
        }
        Err(TrainError::NotEmpty(directory.to_path_buf()))
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The run is complete and stays.
    pub(super) fn done(mut self) -> Option<RunLock> {
        self.is_run = true;
        self.lock.take()
    }

    /// Removes what a preparation makes, but for the lock, without which others could come in.
    fn tidy(&self) -> Result<(), TrainError> {
        for (name, path) in entries(&self.directory)? {
            if name != RunLock::FILE && is_prepared(&name) {
                let removed = match path.is_dir() && !path.is_symlink() {
                    true => fs::remove_dir_all(&path),
                    false => fs::remove_file(&path),
                };
                removed.map_err(TrainError::io("remove", &path))?;
            }
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(lock) = self.lock.take() else { return };
        if self.is_run || lock.check().is_err() {
            return;
        }
        // What went wrong first is what the user should hear of.
        drop(self.tidy());
        drop(lock);
        if self.made {
            // Only if it is empty.
            drop(fs::remove_dir(&self.directory));
        }
    }
}

/// Checks that a run may be made in a directory.
pub(super) fn check_free(directory: &Path) -> Result<(), TrainError> {
    let found = match entries(directory) {
        Ok(found) => found,
        Err(TrainError::File(error)) if error.cause.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let holds = |name: &str| found.iter().any(|(found, _)| found == name);
    if holds(CONFIG) {
        return Err(TrainError::RunExists(directory.to_path_buf()));
    }
    // A preparation that was killed, or one that is under way, which the lock tells.
    let is_preparation = holds(RunLock::FILE) && found.iter().all(|(name, _)| is_prepared(name));
    if found.is_empty() || is_preparation {
        return Ok(());
    }
    Err(TrainError::NotEmpty(directory.to_path_buf()))
}

/// Whether a preparation writes a file of this name, which holds the lock of the directory.
fn is_prepared(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let names =
        TOKENIZER_FILES.iter().chain(&[MODEL, OPTIONS, DataSets::FILE, DataSets::DIRECTORY]);
    let mut names = names.chain(&[RunLock::FILE, FIRST_CHECKPOINT]);
    // The settings themselves make it a run.
    if is_unfinished(&name, CONFIG) {
        return true;
    }
    names.any(|&known| name == known || is_unfinished(&name, known))
}

/// Where the weights of another model go.
const FIRST_CHECKPOINT: &str = "checkpoint-00000000";

fn entries(directory: &Path) -> Result<Vec<(std::ffi::OsString, PathBuf)>, TrainError> {
    let read = |error| TrainError::io("use", directory)(error);
    let mut found = Vec::new();
    for entry in directory.read_dir().map_err(read)? {
        let entry = entry.map_err(read)?;
        found.push((entry.file_name(), entry.path()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_prepared_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        let run = temp.path().join("run");
        let claim = Claim::take(&run).unwrap();
        fs::write(run.join("data.json"), b"{}").unwrap();
        drop(claim);
        assert!(!run.exists(), "it was not there before");

        fs::create_dir(&run).unwrap();
        let claim = Claim::take(&run).unwrap();
        fs::write(run.join("tokenizer.json"), b"{}").unwrap();
        drop(claim);
        assert!(run.read_dir().unwrap().next().is_none(), "it was there before, and empty");

        let claim = Claim::take(&run).unwrap();
        fs::write(run.join("notes"), b"of somebody else").unwrap();
        drop(claim);
        assert!(run.join("notes").exists());
        let error = Claim::take(&run).unwrap_err().to_string();
        assert!(error.ends_with("is not empty: name a new or an empty directory"), "{error}");
    }

    #[test]
    fn what_a_killed_preparation_left_can_be_taken() {
        let temp = tempfile::tempdir().unwrap();
        for name in
            [RunLock::FILE, "data.json", "config.json.77-0.unfinished", "run.json.77-9.unfinished"]
        {
            fs::write(temp.path().join(name), b"left").unwrap();
        }
        fs::create_dir(temp.path().join("checkpoint-00000000.77-1.unfinished")).unwrap();
        let claim = Claim::take(temp.path()).unwrap();
        let names: Vec<_> = entries(claim.directory()).unwrap();
        assert!(names.iter().all(|(name, _)| name == RunLock::FILE), "{names:?}");
    }

    #[test]
    fn the_first_free_directory_is_beside_those_that_are_taken() {
        let temp = tempfile::tempdir().unwrap();
        let run = temp.path().join("run");
        fs::write(&run, b"a file").unwrap();
        fs::create_dir(temp.path().join("run-2")).unwrap();
        fs::write(temp.path().join("run-2").join("run.json"), b"{}").unwrap();
        let claim = Claim::first_free(&run).unwrap();
        assert_eq!(claim.directory(), temp.path().join("run-3"));
    }
}
