//! The one place where memory is mapped.

use std::{fs::File, io};

use memmap2::{Mmap, MmapOptions};

use super::StoredTensor;

/// Bytes of one tensor in its file; the system reads them when they are looked at and may drop them again.
#[derive(Debug)]
pub struct MappedTensor(Option<Mmap>);

impl MappedTensor {
    /// Maps what lies within the file, which the caller has checked.
    #[expect(unsafe_code, reason = "memory maps have no safe form; see below")]
    pub(super) fn new(file: &File, tensor: &StoredTensor) -> io::Result<Self> {
        if tensor.bytes == 0 {
            return Ok(Self(None)); // nothing cannot be mapped
        }
        // SAFETY: the map is read-only, and of a file that nobody is supposed to change while it is read: this
        // library replaces files by renaming and never writes into one that exists. A program that truncates it
        // meanwhile ends us with a bus error, as it ends every other reader of safetensors files.
        let map = unsafe { MmapOptions::new().offset(tensor.offset).len(tensor.bytes).map(file)? };
        #[cfg(unix)]
        map.advise(memmap2::Advice::Sequential)?;
        Ok(Self(Some(map)))
    }
}

impl AsRef<[u8]> for MappedTensor {
    fn as_ref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}
