//! The one place of this crate where memory is mapped; `yuan-model` has its own for tensors.

use std::{fs::File, path::Path};

use memmap2::{Mmap, MmapOptions};

use crate::DataError;

/// A whole file, of which the system reads what is looked at.
#[derive(Debug)]
pub(super) struct MappedFile(Option<Mmap>);

impl MappedFile {
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(DataError::io("read", path))?;
        let length = file.metadata().map_err(DataError::io("read", path))?.len();
        if length == 0 {
            return Ok(Self(None)); // nothing cannot be mapped
        }
        Ok(Self(Some(map(&file).map_err(DataError::io("read", path))?)))
    }

    /// The same for a file of which small pieces are read anywhere: the system need not read far
    /// around each.
    pub fn open_for_pieces(path: &Path) -> Result<Self, DataError> {
        let file = Self::open(path)?;
        #[cfg(unix)]
        if let Some(map) = &file.0 {
            map.advise(memmap2::Advice::Random).map_err(DataError::io("read", path))?;
        }
        Ok(file)
    }

    pub fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}

#[expect(unsafe_code, reason = "memory maps have no safe form; see below")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only, and of a file that nobody is supposed to change while it is
    // read: this library gives a token file its name when it is complete and never writes into it
    // again. A program that truncates it meanwhile ends us with a bus error, as it ends Megatron.
    unsafe { MmapOptions::new().map(file) }
}
