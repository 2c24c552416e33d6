//! The one place where memory is mapped.

use std::{
    fs::File,
    io,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use memmap2::{Mmap, MmapOptions};

use super::tensor::StoredTensor;

/// Bytes of one tensor in its file, which the system may drop from memory again.
#[derive(Debug)]
pub struct MappedTensor(Option<Mmap>);

impl MappedTensor {
    /// Maps what lies within the file, which the caller has checked.
    pub(super) fn new(file: &File, tensor: &StoredTensor) -> io::Result<Self> {
        Ok(Self(map(file, tensor.offset, tensor.bytes, true)?))
    }
}

/// Asks the disk for what follows the tensor in use, so that it goes on while the tensor is
/// computed with.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    /// What was asked for ends here.
    asked: AtomicU64,
}

impl ReadAhead {
    /// Bytes behind a tensor that the disk is asked for.
    const AHEAD: u64 = 64 << 20;
    /// Linux takes no larger wishes than a device's own read-ahead, and forgets the rest of them.
    const STEP: u64 = 4 << 20;

    /// Goes on from where it was, or starts anew if the tensor lies elsewhere.
    pub(super) fn after(&self, file: &File, tensor: &StoredTensor, length: u64) -> io::Result<()> {
        let end = tensor.offset + tensor.bytes as u64;
        let (until, asked) = ((end + Self::AHEAD).min(length), self.asked.load(Relaxed));
        let mut from = if (end..=until).contains(&asked) { asked } else { end };
        while from + Self::STEP <= until || from < until && until == length {
            let size = Self::STEP.min(until - from);
            #[cfg(unix)]
            if let Some(next) = map(file, from, size as usize, false)? {
                next.advise(memmap2::Advice::WillNeed)?;
            }
            from += size;
        }
        self.asked.store(from, Relaxed);
        Ok(())
    }
}

/// Maps a part of a file, all of which is read at once if `populate`.
#[expect(unsafe_code, reason = "memory maps have no safe form; see below")]
fn map(file: &File, offset: u64, length: usize, populate: bool) -> io::Result<Option<Mmap>> {
    if length == 0 {
        return Ok(None); // nothing cannot be mapped
    }
    let mut options = MmapOptions::new();
    options.offset(offset).len(length);
    if populate {
        options.populate();
    }
    // SAFETY: the map is read-only, and of a file that nobody is supposed to change while it is
    // read: this library replaces files by renaming and never writes into one that exists. A
    // program that truncates it meanwhile ends us with a bus error, as it ends every other reader
    // of safetensors files.
    unsafe { options.map(file).map(Some) }
}

impl AsRef<[u8]> for MappedTensor {
    fn as_ref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}
