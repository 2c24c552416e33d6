//! A run directory belongs to one process: whoever writes into it holds its lock.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{ErrorKind, Read, Seek, Write},
    path::{Path, PathBuf},
    process,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak},
    thread,
};

use crate::TrainError;

/// The right of this process to write into a run directory, held until the last clone is dropped.
///
/// It is an advisory lock of the system on the file `run.lock`, so it ends with the process, however
/// the process ends. Within one process the lock is shared. Where a file system has no locks,
/// nothing keeps another process away.
#[derive(Debug, Clone)]
pub struct RunLock(Arc<Held>);

#[derive(Debug)]
struct Held {
    directory: PathBuf,
    /// The directory without links and the like, by which this process finds the lock again.
    canonical: PathBuf,
    file: File,
}

/// The locks of this process.
static HELD: LazyLock<Mutex<HashMap<PathBuf, Weak<Held>>>> = LazyLock::new(Mutex::default);

fn held() -> MutexGuard<'static, HashMap<PathBuf, Weak<Held>>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RunLock {
    /// Name of the file in a run directory; it is there while a process holds the lock, and after
    /// one that was killed.
    pub const FILE: &'static str = "run.lock";

    /// Takes the lock of a directory that exists.
    ///
    /// # Errors
    ///
    /// [`TrainError::RunBusy`] if another process holds it, or that the directory cannot be used.
    pub fn take(directory: &Path) -> Result<Self, TrainError> {
        let canonical = directory.canonicalize().map_err(TrainError::io("use", directory))?;
        loop {
            let mut held = held();
            match held.get(&canonical).map(Weak::upgrade) {
                Some(Some(lock)) if lock.is_in_place() => return Ok(Self(lock)),
                // Of a directory that is gone; it is no longer the one of this name.
                Some(Some(_)) | None => {}
                Some(None) => {
                    // Another thread is about to give it back.
                    drop(held);
                    thread::yield_now();
                    continue;
                }
            }
            let Some(file) = lock_file(directory)? else { continue };
            let directory = directory.to_path_buf();
            let lock = Arc::new(Held { directory, canonical: canonical.clone(), file });
            if lock.is_in_place() {
                held.insert(canonical, Arc::downgrade(&lock));
                return Ok(Self(lock));
            }
            // The process before removed the file between opening and locking it.
            drop(held);
        }
    }

    /// Whether another process holds the lock of a directory.
    pub fn is_held_elsewhere(directory: &Path) -> bool {
        let is_held = |file: File| matches!(file.try_lock(), Err(TryLockError::WouldBlock));
        let canonical = directory.canonicalize().unwrap_or_default();
        let is_own = held().contains_key(&canonical);
        !is_own && File::open(directory.join(Self::FILE)).is_ok_and(is_held)
    }

    /// Checks that the directory is still the one that was locked.
    ///
    /// # Errors
    ///
    /// [`TrainError::RunGone`] if it was removed, moved or replaced.
    pub fn check(&self) -> Result<(), TrainError> {
        match self.0.is_in_place() {
            true => Ok(()),
            false => Err(TrainError::RunGone(self.0.directory.clone())),
        }
    }
}

impl Held {
    /// Whether the locked file is the one that is in the directory.
    fn is_in_place(&self) -> bool {
        is_file_at(&self.file, &self.directory.join(RunLock::FILE))
    }
}

impl Drop for Held {
    /// Removes the file while it is locked, so that nobody mistakes it for that of a killed process.
    fn drop(&mut self) {
        let mut held = held();
        if self.is_in_place() {
            drop(fs::remove_file(self.directory.join(RunLock::FILE)));
        }
        let is_own = |lock: &Weak<Held>| std::ptr::eq(lock.as_ptr(), self);
        if held.get(&self.canonical).is_some_and(is_own) {
            held.remove(&self.canonical);
        }
    }
}

/// The locked file, or none if it was removed meanwhile.
fn lock_file(directory: &Path) -> Result<Option<File>, TrainError> {
    let path = directory.join(RunLock::FILE);
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = open.map_err(TrainError::io("lock", directory))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            drop(file.read_to_string(&mut holder));
            let holder = if holder.is_empty() { "another process".into() } else { holder };
            return Err(TrainError::RunBusy { directory: directory.to_path_buf(), holder });
        }
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
        Err(TryLockError::Error(error)) => return Err(TrainError::io("lock", directory)(error)),
    }
    if !is_file_at(&file, &path) {
        return Ok(None);
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(this_process().as_bytes())?;
        file.sync_data()
    };
    write(&mut file).map_err(TrainError::io("lock", directory))?;
    Ok(Some(file))
}

/// What another process is told of this one.
fn this_process() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match host.trim() {
        "" => format!("process {}", process::id()),
        host => format!("process {} on {host}", process::id()),
    }
}

/// Whether an open file is the one that has this name.
#[cfg(unix)]
fn is_file_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let [open, named] = [file.metadata(), fs::metadata(path)].map(|found| found.ok().map(id));
    open.is_some() && open == named
}

/// Elsewhere a file that is open is not removed.
#[cfg(not(unix))]
fn is_file_at(_: &File, path: &Path) -> bool {
    path.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_shares_its_lock_and_notices_when_the_directory_is_gone() {
        let temp = tempfile::tempdir().unwrap();
        let run = temp.path().join("run");
        fs::create_dir(&run).unwrap();
        let lock = RunLock::take(&run).unwrap();
        let again = RunLock::take(&run.join(".")).unwrap();
        assert!(Arc::ptr_eq(&lock.0, &again.0));
        drop(lock);
        assert!(run.join(RunLock::FILE).exists(), "one clone is left");
        drop(again);
        assert!(!run.join(RunLock::FILE).exists());

        let lock = RunLock::take(&run).unwrap();
        fs::remove_dir_all(&run).unwrap();
        assert!(matches!(lock.check(), Err(TrainError::RunGone(_))));
        fs::create_dir(&run).unwrap();
        let other = RunLock::take(&run).unwrap();
        drop(lock);
        other.check().unwrap();
    }

    #[test]
    fn a_lock_that_another_holds_says_who() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join(RunLock::FILE);
        fs::write(&path, "process 7 on elsewhere").unwrap();
        // A lock belongs to the open file: this is as good as another process.
        let file = File::open(&path).unwrap();
        file.lock().unwrap();
        let error = RunLock::take(temp.path()).unwrap_err().to_string();
        assert!(error.contains("is in use by process 7 on elsewhere"), "{error}");
        drop(file);
        RunLock::take(temp.path()).unwrap();
    }

    #[test]
    fn threads_take_and_give_back_without_being_turned_away() {
        let temp = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|_| drop(RunLock::take(temp.path()).unwrap())));
            }
        });
        assert!(!temp.path().join(RunLock::FILE).exists());
    }
}
