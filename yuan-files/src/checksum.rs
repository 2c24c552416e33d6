//! What a file was when it was written, in a few bytes.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use crc32fast::Hasher;
use serde::{Deserialize, Serialize};

use crate::FileError;

/// Size and CRC-32 of a file, which tell a file that was damaged or exchanged from the one that was
/// written; they are no protection from somebody who means to deceive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksum {
    /// Bytes of the file.
    pub bytes: u64,
    /// CRC-32 (the one of zip and PNG) of all of them.
    pub crc32: u32,
}

impl Checksum {
    /// That of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, crc32: crc32fast::hash(bytes) }
    }

    /// That of a file, read in pieces.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is not a regular file.
    pub fn of_file(path: &Path) -> Result<Self, FileError> {
        let mut sum = Summing::new(io::sink());
        let mut copy = || {
            // A pipe would be waited for, and a device may have no end.
            if !fs::metadata(path)?.is_file() {
                return Err(io::Error::other("this is no file"));
            }
            let mut file = File::open(path)?;
            let mut piece = vec![0; 1 << 20];
            loop {
                match file.read(&mut piece)? {
                    0 => return Ok(()),
                    read => sum.write_all(&piece[..read])?,
                }
            }
        };
        copy().map_err(FileError::of("read", path))?;
        Ok(sum.checksum())
    }
}

/// Sums up what is written through it.
#[derive(Debug)]
pub struct Summing<W> {
    to: W,
    hasher: Hasher,
    bytes: u64,
}

impl<W: Write> Summing<W> {
    /// Writes on to `to`.
    pub fn new(to: W) -> Self {
        Self { to, hasher: Hasher::new(), bytes: 0 }
    }

    /// The checksum of everything that was written so far.
    pub fn checksum(self) -> Checksum {
        self.finish().0
    }

    /// The same, and what was written to.
    pub fn finish(self) -> (Checksum, W) {
        (Checksum { bytes: self.bytes, crc32: self.hasher.finalize() }, self.to)
    }
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_checksum_of_its_bytes() {
        let temp = tempfile::tempdir().unwrap();
        let (path, bytes) = (temp.path().join("file"), vec![7; 3 << 20]);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(Checksum::of_file(&path).unwrap(), Checksum::of(&bytes));
        // The check value that the standard gives for this polynomial.
        assert_eq!(Checksum::of(b"123456789"), Checksum { bytes: 9, crc32: 0xcbf4_3926 });
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let temp = tempfile::tempdir().unwrap();
        let refused = Checksum::of_file(temp.path()).unwrap_err().to_string();
        assert!(refused.contains("this is no file"), "{refused}");
        #[cfg(unix)]
        {
            let pipe = temp.path().join("pipe");
            assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
            for path in [&pipe, Path::new("/dev/zero")] {
                let refused = Checksum::of_file(path).unwrap_err().to_string();
                assert!(refused.contains("this is no file"), "{refused}");
            }
        }
    }
}
