//! Writing token files piece by piece, so that a killed process goes on where it was.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crc32fast::Hasher;
use serde::{Deserialize, Serialize};
use yuan_files::{Checksum, FileError, Summing};

use super::{MAGIC, TokenType, VERSION, with_ending};
use crate::DataError;

/// Writes a token file; [`finish`](Self::finish) adds its index.
///
/// The lengths of the sequences go into `NAME.lengths` meanwhile, so that nothing grows in memory.
#[derive(Debug)]
pub struct TokenWriter {
    name: PathBuf,
    token_type: TokenType,
    tokens: BufWriter<File>,
    lengths: BufWriter<File>,
    hasher: Hasher,
    position: Position,
}

/// How far a token file is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Tokens.
    pub tokens: u64,
    /// Whole sequences.
    pub sequences: u64,
    /// Whole documents.
    pub documents: u64,
    /// Tokens of the sequence that is not complete.
    pub open: u32,
    /// CRC-32 of the tokens so far.
    pub crc32: u32,
}

/// Marks the last sequence of a document in the file of lengths.
const LAST: u32 = 1 << 31;

impl TokenWriter {
    /// Longest sequence: its length is an `i32` in the index, and a bit of it marks the last one.
    const LONGEST: u32 = 1 << 30;

    /// Begins `NAME.bin`.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn create(name: &Path, token_type: TokenType) -> Result<Self, DataError> {
        Self::resume(name, token_type, Position::default())
    }

    /// Goes on at an earlier [`position`](Self::flush); what was written after it is dropped.
    ///
    /// # Errors
    ///
    /// If less was written, or it cannot be written.
    pub fn resume(
        name: &Path,
        token_type: TokenType,
        position: Position,
    ) -> Result<Self, DataError> {
        let open = |ending: &str, bytes: u64| {
            let path = with_ending(name, ending);
            let open = || {
                let mut file =
                    OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
                if file.metadata()?.len() < bytes {
                    return Err(io::Error::other("it is shorter than it was"));
                }
                file.set_len(bytes)?;
                file.seek(SeekFrom::End(0))?;
                Ok(BufWriter::with_capacity(1 << 20, file))
            };
            open().map_err(DataError::io("write", &path))
        };
        let bytes = position.tokens * token_type.bytes() as u64;
        Ok(Self {
            tokens: open(".bin", bytes)?,
            lengths: open(".lengths", position.sequences * 4)?,
            name: name.to_path_buf(),
            token_type,
            hasher: Hasher::new_with_initial_len(position.crc32, bytes),
            position,
        })
    }

    /// Adds tokens to the open sequence.
    ///
    /// # Errors
    ///
    /// If they cannot be written, or one is too large for the type.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        let mut rest = tokens;
        while !rest.is_empty() {
            let room = (Self::LONGEST - self.position.open) as usize;
            let (now, later) = rest.split_at(rest.len().min(room));
            let bytes = self.bytes_of(now)?;
            let path = with_ending(&self.name, ".bin");
            self.tokens.write_all(&bytes).map_err(DataError::io("write", &path))?;
            self.hasher.update(&bytes);
            self.position.tokens += now.len() as u64;
            self.position.open += now.len() as u32;
            if self.position.open == Self::LONGEST && !later.is_empty() {
                self.end_sequence()?;
            }
            rest = later;
        }
        Ok(())
    }

    fn bytes_of(&self, tokens: &[u32]) -> Result<Vec<u8>, DataError> {
        let most = match self.token_type {
            TokenType::U8 => u8::MAX.into(),
            TokenType::U16 => u16::MAX.into(),
            TokenType::I32 => i32::MAX as u32,
            TokenType::I64 => u32::MAX,
        };
        if let Some(token) = tokens.iter().find(|&&token| token > most) {
            let what = format!("the token {token} is too large for {:?}", self.token_type);
            return Err(DataError::Setting(what));
        }
        Ok(match self.token_type {
            TokenType::U8 => tokens.iter().map(|&token| token as u8).collect(),
            TokenType::U16 => {
                tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()).collect()
            }
            TokenType::I32 => tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
            TokenType::I64 => {
                tokens.iter().flat_map(|&token| u64::from(token).to_le_bytes()).collect()
            }
        })
    }

    /// Ends a sequence within a document.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn end_sequence(&mut self) -> Result<(), DataError> {
        self.end(0)
    }

    /// Ends a document, and its last sequence with it.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn end_document(&mut self) -> Result<(), DataError> {
        self.end(LAST)?;
        self.position.documents += 1;
        Ok(())
    }

    fn end(&mut self, mark: u32) -> Result<(), DataError> {
        let entry = (self.position.open | mark).to_le_bytes();
        let path = with_ending(&self.name, ".lengths");
        self.lengths.write_all(&entry).map_err(DataError::io("write", &path))?;
        self.position.sequences += 1;
        self.position.open = 0;
        Ok(())
    }

    /// How far it is, without what is still in memory.
    pub fn position(&self) -> Position {
        Position { crc32: self.hasher.clone().finalize(), ..self.position }
    }

    /// Writes everything to the disk and returns how far it is.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn flush(&mut self) -> Result<Position, DataError> {
        for (file, ending) in [(&mut self.tokens, ".bin"), (&mut self.lengths, ".lengths")] {
            let path = with_ending(&self.name, ending);
            let flushed = file.flush().and_then(|()| file.get_ref().sync_data());
            flushed.map_err(DataError::io("write", &path))?;
        }
        Ok(self.position())
    }

    /// Writes `NAME.idx` and removes the lengths; the checksums of both files.
    ///
    /// # Errors
    ///
    /// If it cannot be written, or a document was not ended.
    pub fn finish(mut self) -> Result<[Checksum; 2], DataError> {
        let checksums = self.index()?;
        let lengths = with_ending(&self.name, ".lengths");
        fs::remove_file(&lengths).map_err(FileError::of("remove", &lengths))?;
        Ok(checksums)
    }

    /// The same with the lengths left, so that it can be done again after a kill.
    pub(crate) fn index(&mut self) -> Result<[Checksum; 2], DataError> {
        if self.position.open > 0 {
            return Err(DataError::Setting("the last document was not ended".into()));
        }
        let position = self.flush()?;
        let bytes = position.tokens * self.token_type.bytes() as u64;
        let tokens = Checksum { bytes, crc32: position.crc32 };
        let path = with_ending(&self.name, ".idx");
        let index = self.write_index(&path).map_err(FileError::of("write", &path))?;
        Ok([tokens, index])
    }

    fn write_index(&self, path: &Path) -> io::Result<Checksum> {
        let file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let mut index = Summing::new(file);
        index.write_all(MAGIC)?;
        index.write_all(&VERSION.to_le_bytes())?;
        index.write_all(&[self.token_type.code()])?;
        index.write_all(&self.position.sequences.to_le_bytes())?;
        index.write_all(&(self.position.documents + 1).to_le_bytes())?;
        self.each_sequence(|_, length, _| index.write_all(&length.to_le_bytes()))?;
        let mut begin = 0_u64;
        self.each_sequence(|_, length, _| {
            index.write_all(&begin.to_le_bytes())?;
            begin += u64::from(length) * self.token_type.bytes() as u64;
            Ok(())
        })?;
        index.write_all(&0_u64.to_le_bytes())?;
        self.each_sequence(|sequence, _, is_last| match is_last {
            true => index.write_all(&(sequence + 1).to_le_bytes()),
            false => Ok(()),
        })?;
        index.flush()?;
        let (checksum, file) = index.finish();
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        Ok(checksum)
    }

    /// Calls `each` with the number of every sequence, its length, and whether it ends a document.
    fn each_sequence(
        &self,
        mut each: impl FnMut(u64, u32, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let file = File::open(with_ending(&self.name, ".lengths"))?;
        let mut lengths = BufReader::with_capacity(1 << 20, file);
        let mut entry = [0; 4];
        for sequence in 0..self.position.sequences {
            lengths.read_exact(&mut entry)?;
            let entry = u32::from_le_bytes(entry);
            each(sequence, entry & !LAST, entry & LAST != 0)?;
        }
        Ok(())
    }
}
