//! Files that are one text each, read in chunks.

use std::io::Read;

use super::{
    Next, Part,
    open::{Bytes, skip},
};

/// How the characters of a file are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Utf8,
    Utf16 { is_big_endian: bool },
}

impl Encoding {
    /// By the byte order mark, and how long that is.
    fn of(begin: &[u8]) -> (Self, usize) {
        match begin {
            [0xff, 0xfe, ..] => (Self::Utf16 { is_big_endian: false }, 2),
            [0xfe, 0xff, ..] => (Self::Utf16 { is_big_endian: true }, 2),
            [0xef, 0xbb, 0xbf, ..] => (Self::Utf8, 3),
            _ => (Self::Utf8, 0),
        }
    }

    /// The text that bytes begin with, and how many bytes it takes; a character that is cut at the
    /// end is left, unless it `is_end`.
    fn decode(self, bytes: &[u8], is_end: bool) -> Result<(String, usize), String> {
        let (text, used) = match self {
            Self::Utf8 => match std::str::from_utf8(bytes) {
                Ok(text) => (text.to_owned(), bytes.len()),
                Err(error) if error.error_len().is_none() && !is_end => {
                    let valid = &bytes[..error.valid_up_to()];
                    (String::from_utf8_lossy(valid).into_owned(), valid.len())
                }
                Err(_) => return Err("neither UTF-8 nor UTF-16".into()),
            },
            Self::Utf16 { is_big_endian } => {
                let unit = |&bytes: &[u8; 2]| match is_big_endian {
                    true => u16::from_be_bytes(bytes),
                    false => u16::from_le_bytes(bytes),
                };
                let (pairs, rest) = bytes.as_chunks::<2>();
                let mut units: Vec<u16> = pairs.iter().map(unit).collect();
                if is_end && !rest.is_empty() {
                    return Err("damaged UTF-16".into());
                }
                let is_high = |unit: &u16| (0xd800..0xdc00).contains(unit);
                if !is_end && units.last().is_some_and(is_high) {
                    units.pop();
                }
                let text = String::from_utf16(&units).map_err(|_| "damaged UTF-16")?;
                (text, 2 * units.len())
            }
        };
        match text.contains('\0') {
            true => Err("not a text".into()),
            false => Ok((text, used)),
        }
    }
}

/// A text, piece by piece.
pub(super) struct Chunks {
    reader: Bytes,
    encoding: Encoding,
    /// Read and not yet returned.
    buffer: Vec<u8>,
    offset: u64,
    is_begun: bool,
    is_done: bool,
}

impl Chunks {
    /// From so many bytes on.
    pub fn new(mut reader: Bytes, offset: u64) -> Result<Self, String> {
        let mut begin = Vec::new();
        reader.by_ref().take(3).read_to_end(&mut begin).map_err(|error| error.to_string())?;
        let (encoding, mark) = Encoding::of(&begin);
        let (buffer, offset) = match offset as usize {
            0 => (begin[mark..].to_vec(), mark as u64),
            1..=3 => (begin[offset as usize..].to_vec(), offset),
            _ => {
                skip(&mut reader, offset - 3)?;
                (Vec::new(), offset)
            }
        };
        let is_begun = offset > mark as u64;
        Ok(Self { reader, encoding, buffer, offset, is_begun, is_done: false })
    }

    pub fn bytes_read(&self) -> u64 {
        self.reader.bytes_read()
    }

    /// Bytes of the file whose text was returned.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// More text, or none at the end; whether it ends with it.
    fn chunk(&mut self) -> Result<Option<(String, bool)>, String> {
        if self.is_done {
            return Ok(None);
        }
        let wanted = (Part::LONGEST + 4).saturating_sub(self.buffer.len()) as u64;
        let read = self.reader.by_ref().take(wanted).read_to_end(&mut self.buffer);
        let is_end = (read.map_err(|error| error.to_string())? as u64) < wanted;
        let (mut text, mut used) = self.encoding.decode(&self.buffer, is_end)?;
        let is_last = is_end && text.len() <= Part::LONGEST;
        if !is_last {
            text.truncate(cut_at(&text, Part::LONGEST));
            used = match self.encoding {
                Encoding::Utf8 => text.len(),
                Encoding::Utf16 { .. } => 2 * text.encode_utf16().count(),
            };
        }
        self.buffer.drain(..used);
        self.offset += used as u64;
        self.is_done = is_last;
        Ok(Some((text, is_last)))
    }

    pub fn next(&mut self) -> Next {
        match self.chunk() {
            Ok(None) => Next::End,
            Ok(Some((text, is_last))) => {
                let is_first = !self.is_begun;
                self.is_begun = true;
                Next::Text { text, is_first, is_last }
            }
            Err(reason) => Next::Broken(reason),
        }
    }
}

/// Whether all of a file is text.
pub(super) struct WholeText;

impl WholeText {
    pub fn check(reader: Bytes) -> Result<(), String> {
        let mut chunks = Chunks::new(reader, 0)?;
        let mut is_blank = true;
        while let Some((text, is_last)) = chunks.chunk()? {
            is_blank &= text.trim().is_empty();
            if is_last {
                break;
            }
        }
        if is_blank { Err("empty".into()) } else { Ok(()) }
    }
}

/// Where to cut a text of more than `most` bytes: before the line break between two words that is
/// next to the end, so that every tokenizer makes the same tokens of the parts as of the whole; or
/// before a space between two words, or between any two characters.
pub(super) fn cut_at(text: &str, most: usize) -> usize {
    let end = text.floor_char_boundary(most.min(text.len()));
    let (bytes, least) = (text.as_bytes(), end / 2);
    let is_between = |at: usize, sign: u8| {
        let is_word = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        bytes[at] == sign && is_word(bytes.get(at.wrapping_sub(1))) && is_word(bytes.get(at + 1))
    };
    let last = |sign: u8| {
        (least.max(1)..end.min(bytes.len().saturating_sub(1)))
            .rev()
            .find(|&at| is_between(at, sign))
    };
    last(b'\n').or_else(|| last(b' ')).unwrap_or(end.max(1).min(text.len()))
}
