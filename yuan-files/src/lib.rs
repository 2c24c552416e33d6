//! Nothing written is ever half-written: files and directories appear whole or not at all.
//!
//! What is not complete has a name of its own, `NAME.PROCESS-COUNT.unfinished`, which no other
//! process uses, and is renamed when it is complete. A process that is killed leaves such a file or
//! directory behind. Others can tell that it is left, because the process that makes one holds it
//! locked for as long as it lives: the next [`write_directory`] of the same name removes it, and
//! [`remove_leftovers_in`] whatever was left in a directory.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

mod checksum;

pub use checksum::{Checksum, Summing};

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
    let open = |name: &Path| OpenOptions::new().write(true).create_new(true).open(name);
    let (unfinished, mut file) =
        make_unfinished(path, open).map_err(FileError::of("write", path))?;
    // Where files cannot be locked, nobody removes what looks left over either.
    drop(file.try_lock());
    let mut write = || {
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&unfinished)))
        .map_err(FileError::of("write", path))?;
    sync(parent(path))
}

/// Makes the directory `path` from what `fill` writes into it, or leaves nothing behind. The
/// directory that is to hold it must be there.
///
/// A directory that is already there is replaced once the new one is complete: one of both is at
/// `path` at any time where the system can exchange two directories (Linux), and elsewhere the old
/// one is renamed, the new one takes its place, and only then is the old one removed. Where `path`
/// is a link to a directory, that directory is replaced.
///
/// # Errors
///
/// What `fill` returns, that a file is in the way, or that the directory cannot be written.
pub fn write_directory<E: From<FileError>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    refuse_file(path)?;
    let path = &if path.is_symlink() && path.exists() {
        path.canonicalize().map_err(FileError::of("use", path))?
    } else {
        path.to_path_buf()
    };
    restore(path);
    remove_leftovers(path);
    // The lock tells other processes that it is not left over, until this function ends. Where
    // directories cannot be locked, nobody removes what looks left over either.
    let (unfinished, _lock) = loop {
        let (unfinished, ()) = make_unfinished(path, |name| fs::create_dir(name))
            .map_err(FileError::of("write", path))?;
        let lock = File::open(&unfinished).ok().filter(|file| file.try_lock().is_ok());
        // Another process may have taken it for left over before it was locked.
        if unfinished.exists() {
            break (unfinished, lock);
        }
    };
    let write = || -> Result<(), E> {
        fill(&unfinished)?;
        for entry in fs::read_dir(&unfinished).map_err(FileError::of("read", &unfinished))? {
            sync(&entry.map_err(FileError::of("read", &unfinished))?.path())?;
        }
        sync(&unfinished)?;
        Ok(())
    };
    write().inspect_err(|_| drop(fs::remove_dir_all(&unfinished)))?;
    let old = put_in_place(&unfinished, path)
        .inspect_err(|_| drop(fs::remove_dir_all(&unfinished)))
        .map_err(FileError::of("write", path))?;
    sync(parent(path))?;
    match old.as_deref().map(|old| (old, fs::remove_dir_all(old))) {
        // Another process may have removed it already.
        Some((old, Err(error))) if error.kind() != ErrorKind::NotFound => {
            Err(FileError::of("remove", old)(error).into())
        }
        _ => Ok(()),
    }
}

/// Makes the directory that is to hold `path`, and those above it, unless they are there.
///
/// # Errors
///
/// If it cannot be made.
pub fn create_parent(path: &Path) -> Result<(), FileError> {
    let parent = parent(path);
    fs::create_dir_all(parent).map_err(FileError::of("create", parent))
}

/// Copies a file into a directory, under its own name.
///
/// # Errors
///
/// If it cannot be read or written.
pub fn copy_into(file: &Path, directory: &Path) -> Result<(), FileError> {
    let to = directory.join(file.file_name().unwrap_or_default());
    fs::copy(file, &to).map_err(FileError::of("copy", file))?;
    sync(&to)
}

/// Removes a directory if it is there; renamed first, so that a kill in the middle leaves nothing
/// that looks complete.
///
/// # Errors
///
/// If it is a file or cannot be removed.
pub fn remove_directory(path: &Path) -> Result<(), FileError> {
    refuse_file(path)?;
    if !path.exists() {
        return Ok(());
    }
    let remove = || {
        if path.is_symlink() {
            return fs::remove_file(path);
        }
        let going = move_aside(path, UNFINISHED)?;
        fs::remove_dir_all(going)
    };
    remove().map_err(FileError::of("remove", path))
}

/// Whether two names are those of one file or directory; what is not there is nothing else.
pub fn is_same(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// Whether a directory is not there or has nothing in it.
pub fn is_free(path: &Path) -> bool {
    match path.read_dir() {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

/// What is no directory is not moved out of a directory's way.
fn refuse_file(path: &Path) -> Result<(), FileError> {
    if !path.exists() || path.is_dir() {
        return Ok(());
    }
    Err(FileError::of("replace", path)(ErrorKind::NotADirectory.into()))
}

/// Extension of what is not complete.
pub const UNFINISHED: &str = "unfinished";

/// Extension of a directory that was complete and made room for another one.
const REPLACED: &str = "replaced";

/// Makes something new under a name that says what it will be and that nothing else has.
fn make_unfinished<T>(
    path: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<(PathBuf, T)> {
    make_beside(path, UNFINISHED, make)
}

fn make_beside<T>(
    path: &Path,
    extension: &str,
    make: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<(PathBuf, T)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}-{count}.{extension}", process::id()));
        let name = path.with_file_name(name);
        match make(&name) {
            Ok(made) => return Ok((name, made)),
            // Of an earlier process of the same number, or of one on another machine.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Removes the unfinished files and directories that killed processes left in a directory. It is
/// nobody's task, so it does not fail.
pub fn remove_leftovers_in(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // NAME.PROCESS-COUNT.unfinished
        let made_for = name.rsplit_once('.').and_then(|(rest, _)| rest.rsplit_once('.'));
        if made_for.is_some_and(|(made_for, _)| is_unfinished(&name, made_for)) {
            remove_if_left(&entry.path());
        }
    }
}

/// Puts a directory back that a killed process had moved aside and not yet replaced.
fn restore(path: &Path) {
    if !path.exists()
        && let Some(replaced) = beside(path, REPLACED).pop()
    {
        drop(fs::rename(replaced, path));
    }
}

/// Removes the directories that killed processes left while they made `path`. It is not this one's
/// task, so it does not fail.
fn remove_leftovers(path: &Path) {
    let mut left = beside(path, UNFINISHED);
    if path.exists() {
        left.extend(beside(path, REPLACED));
    }
    left.iter().for_each(|directory| remove_if_left(directory));
}

/// Removes a file or directory unless the process that made it still holds it.
fn remove_if_left(path: &Path) {
    if File::open(path).is_ok_and(|file| file.try_lock().is_ok()) {
        drop(if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) });
    }
}

/// The directories that [`make_beside`] made for this one.
fn beside(path: &Path, extension: &str) -> Vec<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let entries = fs::read_dir(parent(path)).into_iter().flatten().flatten();
    let found = entries
        .filter(|entry| is_made_for(&entry.file_name().to_string_lossy(), &name, extension))
        .map(|entry| entry.path());
    found.filter(|path| path.is_dir()).collect()
}

/// Whether a file of this name was left by a process that was killed while it wrote `name`.
pub fn is_unfinished(found: &str, name: &str) -> bool {
    is_made_for(found, name, UNFINISHED)
}

fn is_made_for(found: &str, name: &str, extension: &str) -> bool {
    let middle = found
        .strip_prefix(name)
        .and_then(|rest| rest.strip_prefix('.'))
        .and_then(|rest| rest.strip_suffix(extension)?.strip_suffix('.'));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    middle
        .and_then(|middle| middle.split_once('-'))
        .is_some_and(|(process, count)| is_number(process) && is_number(count))
}

/// Renames a directory to a name of its own with this extension.
fn move_aside(path: &Path, extension: &str) -> io::Result<PathBuf> {
    // An empty directory may be replaced by a rename.
    let (aside, ()) = make_beside(path, extension, |name| fs::create_dir(name))?;
    fs::rename(path, &aside).inspect_err(|_| drop(fs::remove_dir(&aside)))?;
    Ok(aside)
}

/// Puts a directory at `path` and says where the one is that was there.
fn put_in_place(new: &Path, path: &Path) -> io::Result<Option<PathBuf>> {
    if !path.exists() {
        fs::rename(new, path)?;
        return Ok(None);
    }
    if exchange(new, path) {
        return Ok(Some(new.to_path_buf()));
    }
    let aside = move_aside(path, REPLACED)?;
    fs::rename(new, path).inspect_err(|_| drop(fs::rename(&aside, path)))?;
    Ok(Some(aside))
}

/// Exchanges two directories in one step; whether the file system can.
#[cfg(target_os = "linux")]
fn exchange(one: &Path, other: &Path) -> bool {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> bool {
    false
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes contents and renames survive a power cut, where a file that is open for reading can do so.
fn sync(path: &Path) -> Result<(), FileError> {
    if !cfg!(unix) {
        return Ok(());
    }
    File::open(path).and_then(|file| file.sync_all()).map_err(FileError::of("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory_with(path: &Path, text: &str) {
        write_directory::<FileError>(path, |unfinished| {
            write_whole(&unfinished.join("text"), text.as_bytes())
        })
        .unwrap();
    }

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn one_of_both_is_there_at_any_time() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("model");
        directory_with(&path, "old");
        write_directory::<FileError>(&path, |unfinished| {
            assert_eq!(fs::read_to_string(path.join("text")).unwrap(), "old");
            write_whole(&unfinished.join("text"), b"new")
        })
        .unwrap();
        assert_eq!(fs::read_to_string(path.join("text")).unwrap(), "new");
        assert_eq!(names(temp.path()), ["model"]);
        // Where directories cannot be exchanged.
        let other = temp.path().join("other");
        directory_with(&other, "newer");
        let aside = move_aside(&path, REPLACED).unwrap();
        assert_eq!(fs::read_to_string(aside.join("text")).unwrap(), "new");
        // Killed here, the old one is put back by the next one that writes.
        let failed =
            write_directory(&path, |_| Err(FileError::of("fail", &path)(ErrorKind::Other.into())));
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(path.join("text")).unwrap(), "new");
        let aside = move_aside(&path, REPLACED).unwrap();
        fs::rename(&other, &path).unwrap();
        remove_leftovers(&path);
        assert!(!aside.exists() && path.exists());
    }

    #[test]
    fn what_others_write_is_not_touched() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("model");
        let kept = ["model.unfinished", "model.removed.unfinished", "model.x-1.unfinished"];
        for name in kept {
            fs::create_dir(temp.path().join(name)).unwrap();
        }
        let [left, held] = ["model.4000000000-1.unfinished", "model.4000000000-2.unfinished"];
        fs::create_dir(temp.path().join(left)).unwrap();
        fs::create_dir(temp.path().join(held)).unwrap();
        let other = File::open(temp.path().join(held)).unwrap();
        other.try_lock().unwrap();
        directory_with(&path, "new");
        remove_directory(&path).unwrap();
        let mut expected = [&kept[..], &[held]].concat();
        expected.sort_unstable();
        assert_eq!(names(temp.path()), expected);
    }

    #[test]
    fn what_is_left_in_a_directory_is_found_by_its_name() {
        let temp = tempfile::tempdir().unwrap();
        let write = |name: &str| fs::write(temp.path().join(name), "text").unwrap();
        let kept = ["loads.json", "notes.unfinished", "x.1-.unfinished", "x.a-1.unfinished"];
        kept.iter().for_each(|name| write(name));
        write("loads.json.4000000000-16.unfinished");
        fs::create_dir(temp.path().join("checkpoint-00000003.4000000000-2.unfinished")).unwrap();
        let held = "plan.json.4000000000-1.unfinished";
        write(held);
        let file = File::open(temp.path().join(held)).unwrap();
        file.try_lock().unwrap();
        remove_leftovers_in(temp.path());
        let mut expected = [&kept[..], &[held]].concat();
        expected.sort_unstable();
        assert_eq!(names(temp.path()), expected);
    }

    #[test]
    fn a_failure_leaves_what_was_there() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("model");
        directory_with(&path, "old");
        let failed = write_directory(&path, |unfinished| {
            write_whole(&unfinished.join("nowhere").join("text"), b"new")
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(path.join("text")).unwrap(), "old");
        let file = temp.path().join("file");
        write_whole(&file, b"file").unwrap();
        let error = write_directory::<FileError>(&file, |_| unreachable!()).unwrap_err();
        assert!(error.to_string().starts_with("cannot replace "), "{error}");
        assert_eq!(names(temp.path()), ["file", "model"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_leads_to_what_is_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let [path, link] = ["model", "link"].map(|name| temp.path().join(name));
        directory_with(&path, "old");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        directory_with(&link, "new");
        assert_eq!(fs::read_to_string(path.join("text")).unwrap(), "new");
        assert!(link.is_symlink() && is_same(&path, &link));
    }
}
