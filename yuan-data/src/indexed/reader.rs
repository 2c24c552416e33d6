//! Reading token files by mapping them.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use super::{HEADER, MAGIC, TokenType, VERSION, map::MappedFile, with_ending};
use crate::DataError;

/// A file of tokens in Megatron's indexed layout, mapped into memory: opening one takes the same
/// time whatever its size, and only what is read is loaded.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    tokens: MappedFile,
    index: MappedFile,
    token_type: TokenType,
    sequences: usize,
    documents: usize,
    /// Tokens that are refused from here on; devices look them up without asking.
    vocabulary: Option<u32>,
}

impl TokenFile {
    /// Opens `NAME.bin` and `NAME.idx`.
    ///
    /// # Errors
    ///
    /// Says which of the files is missing, is none of this kind, or does not fit the other.
    pub fn open(name: &Path) -> Result<Self, DataError> {
        let [path, index_path] = [".bin", ".idx"].map(|ending| with_ending(name, ending));
        let index = MappedFile::open(&index_path)?;
        let damaged = |reason: &str| DataError::damaged(&index_path, reason);
        let bytes = index.bytes();
        if bytes.len() < HEADER || !bytes.starts_with(MAGIC) {
            return Err(damaged("it is no index of tokens (Megatron's MMIDIDX)"));
        }
        let number = |at: usize| u64::from_le_bytes(eight(&bytes[at..]));
        if number(9) != VERSION {
            return Err(damaged(&format!("version {} is not known, only {VERSION}", number(9))));
        }
        let token_type = TokenType::of_code(bytes[17])
            .ok_or_else(|| damaged(&format!("its tokens are of type {}, no integer", bytes[17])))?;
        let (sequences, entries) = (number(18), number(26));
        let lists =
            sequences.checked_mul(12).and_then(|size| size.checked_add(entries.checked_mul(8)?));
        let expected = lists.and_then(|size| size.checked_add(HEADER as u64));
        let length = bytes.len() as u64;
        // An index of several kinds of sequences has one more byte for each.
        let with_modes = expected.and_then(|size| size.checked_add(sequences));
        if entries == 0 || (expected != Some(length) && with_modes != Some(length)) {
            return Err(damaged(&format!(
                "it has {length} bytes, which {sequences} sequences of {} documents do not take: it \
                 was cut, or is still being written",
                entries.saturating_sub(1)
            )));
        }
        let file = Self {
            tokens: MappedFile::open_for_pieces(&path)?,
            path,
            index,
            token_type,
            sequences: sequences as usize,
            documents: entries as usize - 1,
            vocabulary: None,
        };
        file.check_ends(&index_path)?;
        Ok(file)
    }

    /// Looks at what the first and the last entries of the index say.
    fn check_ends(&self, index_path: &Path) -> Result<(), DataError> {
        let bytes = self.tokens.bytes().len() as u64;
        let end = match self.sequences {
            0 => 0,
            count => {
                let last = self.pointer(count - 1).checked_add(self.length_of(count - 1));
                if self.pointer(0) != 0 {
                    return Err(DataError::damaged(index_path, "the first sequence is elsewhere"));
                }
                last.unwrap_or(u64::MAX)
            }
        };
        if end != bytes {
            let reason = format!("it has {bytes} bytes, but the index ends at {end}: one was cut");
            return Err(DataError::damaged(&self.path, reason));
        }
        let last = self.entry(self.documents);
        if last != self.sequences as u64 {
            let reason = format!("its documents end at sequence {last} of {}", self.sequences);
            return Err(DataError::damaged(index_path, reason));
        }
        Ok(())
    }

    /// Refuses tokens that a model of so many does not have, when they are read.
    #[must_use]
    pub fn with_vocabulary(self, entries: usize) -> Self {
        Self { vocabulary: Some(u32::try_from(entries).unwrap_or(u32::MAX)), ..self }
    }

    /// The file of tokens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How a token is stored.
    pub fn token_type(&self) -> TokenType {
        self.token_type
    }

    /// Tokens of all documents.
    pub fn num_tokens(&self) -> u64 {
        (self.tokens.bytes().len() / self.token_type.bytes()) as u64
    }

    /// Sequences; a document has one or more.
    pub fn num_sequences(&self) -> usize {
        self.sequences
    }

    /// Documents.
    pub fn num_documents(&self) -> usize {
        self.documents
    }

    /// The sequences of a document.
    ///
    /// # Errors
    ///
    /// If the index is damaged there.
    ///
    /// # Panics
    ///
    /// If there are not so many documents.
    pub fn document(&self, document: usize) -> Result<Range<usize>, DataError> {
        assert!(document < self.documents, "document {document} of {}", self.documents);
        let (first, end) = (self.entry(document), self.entry(document + 1));
        if first > end || end > self.sequences as u64 {
            let reason = format!("document {document} ends before it begins, or after all others");
            return Err(DataError::damaged(&self.path.with_extension("idx"), reason));
        }
        Ok(first as usize..end as usize)
    }

    /// The tokens of a sequence, as positions for [`read`](Self::read).
    ///
    /// # Errors
    ///
    /// If the index is damaged there.
    ///
    /// # Panics
    ///
    /// If there are not so many sequences.
    pub fn sequence(&self, sequence: usize) -> Result<Range<u64>, DataError> {
        assert!(sequence < self.sequences, "sequence {sequence} of {}", self.sequences);
        let (begin, length) = (self.pointer(sequence), self.length_of(sequence));
        let (size, end) = (self.token_type.bytes() as u64, begin.checked_add(length));
        match end {
            Some(end) if end <= self.tokens.bytes().len() as u64 && begin.is_multiple_of(size) => {
                Ok(begin / size..end / size)
            }
            _ => {
                let reason = format!("sequence {sequence} lies outside of the tokens");
                Err(DataError::damaged(&self.path.with_extension("idx"), reason))
            }
        }
    }

    /// `count` tokens from position `start` of all documents in a row.
    ///
    /// # Errors
    ///
    /// A token that is negative, or not in the [vocabulary](Self::with_vocabulary).
    ///
    /// # Panics
    ///
    /// If there are not so many tokens.
    pub fn read(&self, start: u64, count: usize) -> Result<Vec<u32>, DataError> {
        let size = self.token_type.bytes();
        let begin = start as usize * size;
        let bytes = &self.tokens.bytes()[begin..begin + count * size];
        let tokens: Vec<u32> = match self.token_type {
            TokenType::U8 => bytes.iter().map(|&byte| byte.into()).collect(),
            TokenType::U16 => {
                bytes.as_chunks().0.iter().map(|&token| u16::from_le_bytes(token).into()).collect()
            }
            // What is negative or too large is beyond every vocabulary.
            TokenType::I32 => {
                let token = |&bytes: &[u8; 4]| i32::from_le_bytes(bytes).try_into();
                bytes.as_chunks().0.iter().map(|bytes| token(bytes).unwrap_or(u32::MAX)).collect()
            }
            TokenType::I64 => {
                let token = |&bytes: &[u8; 8]| i64::from_le_bytes(bytes).try_into();
                bytes.as_chunks().0.iter().map(|bytes| token(bytes).unwrap_or(u32::MAX)).collect()
            }
        };
        let end = self.vocabulary.unwrap_or(u32::MAX);
        match tokens.iter().position(|&token| token >= end) {
            None => Ok(tokens),
            Some(at) => {
                let reason = match tokens[at] {
                    u32::MAX => format!("number {} is no token", start + at as u64),
                    token => format!(
                        "it holds the token {token}, but the model has only {end}: it was made with \
                         another tokenizer"
                    ),
                };
                Err(DataError::damaged(&self.path, reason))
            }
        }
    }

    /// Where a sequence begins, in bytes; what is negative is beyond every file.
    fn pointer(&self, sequence: usize) -> u64 {
        let at = HEADER + 4 * self.sequences + 8 * sequence;
        u64::from_le_bytes(eight(&self.index.bytes()[at..]))
    }

    /// Bytes of a sequence.
    fn length_of(&self, sequence: usize) -> u64 {
        let at = HEADER + 4 * sequence;
        let bytes = self.index.bytes()[at..at + 4].try_into().expect("four bytes");
        u64::from(u32::from_le_bytes(bytes)) * self.token_type.bytes() as u64
    }

    /// An entry of the list of documents.
    fn entry(&self, document: usize) -> u64 {
        let at = HEADER + 12 * self.sequences + 8 * document;
        u64::from_le_bytes(eight(&self.index.bytes()[at..]))
    }
}

fn eight(bytes: &[u8]) -> [u8; 8] {
    bytes[..8].try_into().expect("eight bytes")
}
