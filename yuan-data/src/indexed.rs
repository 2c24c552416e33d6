//! Megatron's indexed layout: tokens of all documents in `NAME.bin`, and where each sequence and
//! document begins in `NAME.idx`.
//!
//! The index is, in little-endian numbers: `MMIDIDX\0\0`, version 1 (`u64`), the type of a token
//! (`u8`), the number of sequences (`u64`) and of entries of the last list (`u64`), the length of
//! every sequence in tokens (`i32`), where it begins in bytes (`i64`), and for every document its
//! first sequence, with the number of all sequences at the end (`i64`).

use std::path::{Path, PathBuf};

mod map;
mod reader;
mod writer;

pub use reader::TokenFile;
pub use writer::{Position, TokenWriter};

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const VERSION: u64 = 1;
/// Bytes before the lists of an index.
const HEADER: usize = 9 + 8 + 1 + 8 + 8;

/// How a token is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    /// 8 bits, for masks.
    U8,
    /// 16 bits, for vocabularies below 65,500, as Megatron chooses.
    U16,
    /// 32 bits with a sign.
    I32,
    /// 64 bits with a sign; read, but never chosen.
    I64,
}

impl TokenType {
    /// What Megatron chooses for a vocabulary of this size (`DType.optimal_dtype`).
    pub fn for_vocabulary(entries: usize) -> Self {
        if entries < 65_500 { Self::U16 } else { Self::I32 }
    }

    /// Bytes of a token.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    /// Megatron's number for it.
    fn code(self) -> u8 {
        match self {
            Self::U8 => 1,
            Self::U16 => 8,
            Self::I32 => 4,
            Self::I64 => 5,
        }
    }

    fn of_code(code: u8) -> Option<Self> {
        [Self::U8, Self::U16, Self::I32, Self::I64].into_iter().find(|kind| kind.code() == code)
    }
}

/// `NAME.bin` or `NAME.idx`; the name may have a dot of its own.
pub(crate) fn with_ending(name: &Path, ending: &str) -> PathBuf {
    let mut path = name.as_os_str().to_owned();
    path.push(ending);
    path.into()
}
