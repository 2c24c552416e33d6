//! JSON lines: a document a line.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    Next, Part,
    open::{Bytes, Kind, reader, skip},
    text::cut_at,
};
use crate::DataError;

/// Longest line; a document that is longer belongs into a file of its own.
const LONGEST: u64 = 64 << 20;

/// The values of a `.jsonl` file, which may be compressed, with the numbers of their lines; blank
/// lines are left out.
pub struct JsonLines {
    path: PathBuf,
    reader: BufReader<Bytes>,
    line: u64,
}

impl JsonLines {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let Ok(Kind::Text(compression) | Kind::Lines(compression)) = Kind::of(path) else {
            let reason = "conversations are read from JSON lines (.jsonl)";
            return Err(DataError::damaged(path, reason));
        };
        let reader = reader(path, compression).map_err(DataError::io("read", path))?;
        Ok(Self { path: path.to_path_buf(), reader: BufReader::new(reader), line: 0 })
    }
}

impl Iterator for JsonLines {
    type Item = Result<(u64, Value), DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut line = Vec::new();
            let read = self.reader.by_ref().take(LONGEST).read_until(b'\n', &mut line);
            let fails = |reason: String| Some(Err(DataError::damaged(&self.path, reason)));
            match read {
                Ok(0) => return None,
                Ok(read) if read as u64 == LONGEST && !line.ends_with(b"\n") => {
                    return fails(format!("a line is longer than {LONGEST} bytes"));
                }
                Ok(_) => self.line += 1,
                Err(error) => return fails(error.to_string()),
            }
            let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line);
            if line.trim_ascii().is_empty() {
                continue;
            }
            return match serde_json::from_slice(line) {
                Ok(value) => Some(Ok((self.line, value))),
                Err(error) => fails(format!("line {} is no JSON: {error}", self.line)),
            };
        }
    }
}

impl std::fmt::Debug for JsonLines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JsonLines").field("path", &self.path).finish_non_exhaustive()
    }
}

/// A file of JSON lines, of which the texts are read.
pub(super) struct Lines {
    reader: BufReader<Bytes>,
    field: String,
    lines: u64,
    offset: u64,
    /// Of a long document: what was not returned yet.
    rest: Option<Rest>,
}

impl Lines {
    /// Behind so many lines, which took so many bytes.
    pub fn new(mut reader: Bytes, field: String, lines: u64, offset: u64) -> Result<Self, String> {
        skip(&mut reader, offset)?;
        let reader = BufReader::with_capacity(1 << 18, reader);
        Ok(Self { reader, field, lines, offset, rest: None })
    }

    pub fn bytes_read(&self) -> u64 {
        self.reader.get_ref().bytes_read()
    }

    pub fn lines(&self) -> u64 {
        self.lines
    }

    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn next(&mut self) -> Next {
        if let Some(rest) = self.rest.take() {
            return rest.next(&mut self.rest);
        }
        loop {
            let mut line = Vec::new();
            match self.reader.by_ref().take(LONGEST).read_until(b'\n', &mut line) {
                Ok(0) => return Next::End,
                Ok(read) if read as u64 == LONGEST && !line.ends_with(b"\n") => {
                    return Next::Broken(format!("a line is longer than {LONGEST} bytes"));
                }
                Ok(read) => self.offset += read as u64,
                Err(error) => return Next::Broken(error.to_string()),
            }
            self.lines += 1;
            if self.lines == 1 && line.starts_with(b"\xef\xbb\xbf") {
                line.drain(..3);
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let value: Option<Value> = serde_json::from_slice(&line).ok();
            drop(line);
            return match value.and_then(|value| self.text_of(value)) {
                Some(text) => Rest::of(text).next(&mut self.rest),
                None => Next::None(format!("lines without a `{}`", self.field)),
            };
        }
    }

    fn text_of(&self, value: Value) -> Option<String> {
        let text = match value {
            Value::String(text) => text,
            Value::Object(mut fields) => match fields.swap_remove(&self.field)? {
                Value::String(text) => text,
                _ => return None,
            },
            _ => return None,
        };
        (!text.trim().is_empty()).then_some(text)
    }
}

/// A text of which a part was returned.
pub(super) struct Rest {
    text: String,
    /// What was returned ends here.
    begin: usize,
}

impl Rest {
    /// All of a text.
    pub fn of(text: String) -> Self {
        Self { text, begin: 0 }
    }

    /// Its next part; what is left then goes into `rest`.
    pub fn next(mut self, rest: &mut Option<Self>) -> Next {
        let is_first = self.begin == 0;
        let left = &self.text[self.begin..];
        if left.len() <= Part::LONGEST {
            let text = if is_first { self.text } else { left.to_owned() };
            return Next::Text { text, is_first, is_last: true };
        }
        let text = left[..cut_at(left, Part::LONGEST)].to_owned();
        self.begin += text.len();
        *rest = Some(self);
        Next::Text { text, is_first, is_last: false }
    }
}
