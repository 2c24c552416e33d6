//! A run directory belongs to one process: whoever writes into it holds its lock.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Read, Seek, Write},
    path::{Path, PathBuf},
    process,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use crate::TrainError;

/// The right of this process to write into a run directory, held until the last clone is dropped.
///
/// It is an advisory lock of the system on the file `run.lock`, so it ends with the process,
/// however the process ends. Within one process the lock is shared. Where a file system has no
/// locks, nothing keeps another process away.
#[derive(Debug, Clone)]
pub struct RunLock(Arc<Held>);

#[derive(Debug)]
struct Held {
    directory: PathBuf,
    /// The directory without links and the like, by which this process finds the lock again.
    canonical: PathBuf,
    /// Which directory it is, whatever it is called.
    identity: Identity,
    file: File,
    /// Not where the file system has no locks; the file may then be that of another process, too.
    is_locked: bool,
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
            let found = held.get(&canonical).map(Weak::upgrade);
            let taken = match &found {
                Some(Some(lock)) if lock.is_in_place() => Ok(Some(lock.clone())),
                // Another thread is about to give it back.
                Some(None) => Ok(None),
                // Of a directory that is gone; it is no longer the one of this name.
                Some(Some(_)) | None => Held::lock(directory, &canonical),
            };
            if let Ok(Some(lock)) = &taken {
                held.insert(canonical.clone(), Arc::downgrade(lock));
            }
            // In this order: what is dropped may want to give itself back.
            drop(held);
            drop(found);
            match taken? {
                Some(lock) => return Ok(Self(lock)),
                None => thread::yield_now(),
            }
        }
    }

    /// Whether another process holds the lock of a directory.
    pub fn is_held_elsewhere(directory: &Path) -> bool {
        // Shared, so that those who ask do not meet.
        let is_held = |file: File| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
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
        let held = &self.0;
        match identity(&held.directory) {
            Ok(found) if found == held.identity => Ok(()),
            // It may come back: a network that is slow is no reason to end a run.
            Err(error) if error.kind() != ErrorKind::NotFound => Ok(()),
            _ => Err(TrainError::RunGone(held.directory.clone())),
        }
    }
}

impl Held {
    /// Locks a directory; none if the process before removed the file between opening and locking.
    fn lock(directory: &Path, canonical: &Path) -> Result<Option<Arc<Self>>, TrainError> {
        let failed = |error| TrainError::io("lock", directory)(error);
        let identity = identity(directory).map_err(failed)?;
        let path = directory.join(RunLock::FILE);
        // What it leads to is not to be written over.
        if path.is_symlink() {
            return Err(failed(io::Error::other("its run.lock is a link")));
        }
        let mut open = OpenOptions::new();
        open.read(true).write(true).create(true).truncate(false);
        let mut file = open.open(&path).map_err(failed)?;
        let is_locked = match lock_patiently(&file) {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                drop(file.read_to_string(&mut holder));
                let holder = if holder.is_empty() { "another process".into() } else { holder };
                return Err(TrainError::RunBusy { directory: directory.to_path_buf(), holder });
            }
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => false,
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        };
        if !is_file_at(&file, &path) {
            return Ok(None);
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(this_process().as_bytes())?;
            file.sync_data()
        };
        write(&mut file).map_err(failed)?;
        let (directory, canonical) = (directory.to_path_buf(), canonical.to_path_buf());
        Ok(Some(Arc::new(Self { directory, canonical, identity, file, is_locked })))
    }

    /// Whether the locked file is the one that is in the directory.
    fn is_in_place(&self) -> bool {
        is_file_at(&self.file, &self.directory.join(RunLock::FILE))
    }
}

impl Drop for Held {
    /// Removes the file while it is locked, so that nobody mistakes it for that of a killed
    /// process.
    fn drop(&mut self) {
        let mut held = held();
        if self.is_locked && self.is_in_place() {
            drop(fs::remove_file(self.directory.join(RunLock::FILE)));
        }
        let is_own = |lock: &Weak<Held>| std::ptr::eq(lock.as_ptr(), self);
        if held.get(&self.canonical).is_some_and(is_own) {
            held.remove(&self.canonical);
        }
    }
}

/// Locks a file that somebody may only be asking about.
fn lock_patiently(file: &File) -> Result<(), TryLockError> {
    for _ in 0..10 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
    file.try_lock()
}

/// What another process is told of this one.
fn this_process() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match host.trim() {
        "" => format!("process {}", process::id()),
        host => format!("process {} on {host}", process::id()),
    }
}

/// Device and number of a file or directory.
#[cfg(unix)]
type Identity = (u64, u64);

#[cfg(unix)]
fn identity_of(metadata: &fs::Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

/// Elsewhere only whether it is there is known.
#[cfg(not(unix))]
type Identity = ();

#[cfg(not(unix))]
fn identity_of(_: &fs::Metadata) -> Identity {}

fn identity(path: &Path) -> io::Result<Identity> {
    Ok(identity_of(&fs::metadata(path)?))
}

/// Whether an open file is the one that has this name.
fn is_file_at(file: &File, path: &Path) -> bool {
    let open = file.metadata().map(|metadata| identity_of(&metadata));
    matches!((open, identity(path)), (Ok(open), Ok(named)) if open == named)
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
