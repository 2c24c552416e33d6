//! JSON as Python's `json.dumps` writes it, which templates were made for.

use std::io;

use minijinja::{Error, ErrorKind, Value, value::Kwargs};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, PrettyFormatter};

/// Spaces that a level may be indented by.
const MOST_INDENT: i64 = 64;

/// The filter `tojson` of the `transformers` library: spaces after `,` and `:`, and all letters as
/// they are unless `ensure_ascii`.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<i64> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let refuse = |reason: &'static str| Err(Error::new(ErrorKind::InvalidOperation, reason));
    if indent.is_some_and(|indent| !(0..=MOST_INDENT).contains(&indent)) {
        return refuse("tojson: indent must be from 0 to 64");
    }
    let default = [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned);
    let [item, key] = match separators.map(<[String; 2]>::try_from) {
        None => default,
        Some(Ok(given)) => given,
        Some(Err(_)) => return refuse("tojson: separators are two texts"),
    };
    let mut data = serde_json::to_value(value).map_err(failed)?;
    if sort_keys == Some(true) {
        data.sort_all_objects();
    }
    let spaces = vec![b' '; usize::try_from(indent.unwrap_or(0)).unwrap_or(0)];
    let pretty = indent.map(|_| PrettyFormatter::with_indent(&spaces));
    let formatter = Python { pretty, item, key, ensure_ascii: ensure_ascii == Some(true) };
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    // The value itself, and not `data`, has its keys in the order in which they were written.
    match sort_keys {
        Some(true) => data.serialize(&mut serializer).map_err(failed)?,
        _ => value.serialize(&mut serializer).map_err(failed)?,
    }
    String::from_utf8(text)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

fn failed(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::BadSerialization, error.to_string())
}

struct Python<'a> {
    pretty: Option<PrettyFormatter<'a>>,
    item: String,
    key: String,
    ensure_ascii: bool,
}

/// Calls the pretty formatter if there is one, else does what is said.
macro_rules! pretty_or {
    ($self:ident.$method:ident($($argument:expr),*), $otherwise:expr) => {
        match &mut $self.pretty {
            Some(pretty) => pretty.$method($($argument),*),
            None => $otherwise,
        }
    };
}

impl Python<'_> {
    /// What stands before an item of a list or a key of an object.
    fn begin_item<W: ?Sized + io::Write>(&mut self, to: &mut W, first: bool) -> io::Result<()> {
        if !first {
            to.write_all(self.item.as_bytes())?;
        }
        // As the first one: the separator is written.
        pretty_or!(self.begin_array_value(to, true), Ok(()))
    }
}

impl Formatter for Python<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        pretty_or!(self.begin_array(to), to.write_all(b"["))
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        pretty_or!(self.end_array(to), to.write_all(b"]"))
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.begin_item(to, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        pretty_or!(self.end_array_value(to), Ok(()))
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        pretty_or!(self.begin_object(to), to.write_all(b"{"))
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        pretty_or!(self.end_object(to), to.write_all(b"}"))
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.begin_item(to, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        pretty_or!(self.end_object_value(to), Ok(()))
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ensure_ascii {
            return to.write_all(fragment.as_bytes());
        }
        let mut units = [0; 2];
        for letter in fragment.chars() {
            match letter {
                ' '..='~' => to.write_all(&[letter as u8])?,
                letter => {
                    for unit in letter.encode_utf16(&mut units) {
                        write!(to, "\\u{unit:04x}")?;
                    }
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        let escaped = match escape {
            CharEscape::Quote => "\\\"",
            CharEscape::ReverseSolidus => "\\\\",
            CharEscape::Solidus => "/",
            CharEscape::Backspace => "\\b",
            CharEscape::FormFeed => "\\f",
            CharEscape::LineFeed => "\\n",
            CharEscape::CarriageReturn => "\\r",
            CharEscape::Tab => "\\t",
            CharEscape::AsciiControl(byte) => return write!(to, "\\u{byte:04x}"),
        };
        to.write_all(escaped.as_bytes())
    }
}
