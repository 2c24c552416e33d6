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

/// The lines of a file that are not blank.
struct NonBlank {
    reader: BufReader<Bytes>,
    /// Lines that were read, blank ones included.
    lines: u64,
    /// Bytes that they took.
    offset: u64,
}

impl NonBlank {
    /// Behind so many lines, which took so many bytes.
    fn new(mut reader: Bytes, lines: u64, offset: u64) -> Result<Self, String> {
        skip(&mut reader, offset)?;
        Ok(Self { reader: BufReader::with_capacity(1 << 18, reader), lines, offset })
    }

    /// The next line, or none at the end.
    fn next(&mut self) -> Result<Option<Vec<u8>>, String> {
        loop {
            let mut line = Vec::new();
            let read = self.reader.by_ref().take(LONGEST).read_until(b'\n', &mut line);
            match read.map_err(|error| error.to_string())? as u64 {
                0 => return Ok(None),
                LONGEST if !line.ends_with(b"\n") => {
                    return Err(format!("a line is longer than {LONGEST} bytes"));
                }
                read => self.offset += read,
            }
            self.lines += 1;
            if self.lines == 1 && line.starts_with(b"\xef\xbb\xbf") {
                line.drain(..3);
            }
            if !line.trim_ascii().is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

/// The values of a `.jsonl` file, which may be compressed, with the numbers of their lines; blank
/// lines are left out.
pub struct JsonLines {
    path: PathBuf,
    lines: NonBlank,
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
        let lines = NonBlank::new(reader, 0, 0).map_err(|error| DataError::damaged(path, error))?;
        Ok(Self { path: path.to_path_buf(), lines })
    }
}

impl Iterator for JsonLines {
    type Item = Result<(u64, Value), DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = self.lines.next().transpose()?;
        let number = self.lines.lines;
        let value = line.and_then(|line| {
            serde_json::from_slice(&line)
                .map_err(|error| format!("line {number} is no JSON: {error}"))
        });
        let damaged = |reason| DataError::damaged(&self.path, reason);
        Some(value.map(|value| (number, value)).map_err(damaged))
    }
}

impl std::fmt::Debug for JsonLines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JsonLines").field("path", &self.path).finish_non_exhaustive()
    }
}

/// A file of JSON lines, of which the texts are read.
pub(super) struct Lines {
    lines: NonBlank,
    field: String,
    /// Of a long document: what was not returned yet.
    rest: Option<Rest>,
}

impl Lines {
    /// Behind so many lines, which took so many bytes.
    pub fn new(reader: Bytes, field: String, lines: u64, offset: u64) -> Result<Self, String> {
        Ok(Self { lines: NonBlank::new(reader, lines, offset)?, field, rest: None })
    }

    pub fn bytes_read(&self) -> u64 {
        self.lines.reader.get_ref().bytes_read()
    }

    pub fn lines(&self) -> u64 {
        self.lines.lines
    }

    pub fn offset(&self) -> u64 {
        self.lines.offset
    }

    pub fn next(&mut self) -> Next {
        if let Some(rest) = self.rest.take() {
            return rest.next(&mut self.rest);
        }
        let line = match self.lines.next() {
            Ok(Some(line)) => line,
            Ok(None) => return Next::End,
            Err(reason) => return Next::Broken(reason),
        };
        let value: Option<Value> = serde_json::from_slice(&line).ok();
        drop(line);
        match value.and_then(|value| self.text_of(value)) {
            Some(text) => Rest::of(text).next(&mut self.rest),
            None => Next::None(format!("lines without a `{}`", self.field)),
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
