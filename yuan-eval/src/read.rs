//! Files of records: one JSON array, or an object a line, read one record at a time.

use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{
    Deserializer as _,
    de::{DeserializeOwned, SeqAccess, Visitor},
};
use serde_json::Value;
use yuan_files::FileError;

use crate::{EvalError, Gold, Item};

/// Those of some files that a directory has.
pub(crate) fn present(directory: &Path, names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(|name| directory.join(name)).filter(|path| path.is_file()).collect()
}

/// A file to read from; pipes and devices, which may never end, are none.
pub(crate) fn open(path: &Path) -> Result<BufReader<File>, EvalError> {
    let failed = || FileError::of("read", path);
    if !path.metadata().map_err(failed())?.is_file() {
        return Err(EvalError::format(path, "it is no file"));
    }
    Ok(BufReader::with_capacity(1 << 20, File::open(path).map_err(failed())?))
}

/// What a record makes of an item: the prompt, the images and what is right.
pub(crate) type Made = (String, Vec<PathBuf>, Gold);

/// Shows the items of those files of a benchmark that are there. `files` are the sets and the names of
/// their files; `make` is given a set's place among them and a record.
pub(crate) fn for_each_item<T: DeserializeOwned>(
    benchmark: &'static str,
    data: &Path,
    files: &[(&str, String)],
    show: &mut dyn FnMut(Item) -> Result<(), EvalError>,
    mut make: impl FnMut(usize, T) -> Result<Made, String>,
) -> Result<(), EvalError> {
    let mut any = false;
    for (at, (set, file)) in files.iter().enumerate() {
        let path = data.join(file);
        if !path.is_file() {
            continue;
        }
        any = true;
        let mut number = 0;
        for_each_value(&path, |record| {
            let (prompt, images, gold) = make(at, record)
                .map_err(|reason| EvalError::format(&path, format!("record {number}: {reason}")))?;
            let id = format!("{set}:{number}");
            number += 1;
            show(Item { id, set: (*set).into(), prompt, images, gold })
        })?;
    }
    if any {
        return Ok(());
    }
    let names: Vec<_> = files.iter().map(|(_, file)| file.as_str()).collect();
    Err(EvalError::NoData { path: data.to_path_buf(), benchmark, expected: names.join(", ") })
}

/// A text as it is; any other value as JSON writes it.
pub(crate) fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Shows every record of a file.
pub(crate) fn for_each_value<T: DeserializeOwned>(
    path: &Path,
    mut show: impl FnMut(T) -> Result<(), EvalError>,
) -> Result<(), EvalError> {
    let mut reader = open(path)?;
    let damaged = |error: serde_json::Error| EvalError::format(path, error.to_string());
    let start = loop {
        let buffered = reader.fill_buf().map_err(FileError::of("read", path))?;
        let blank = buffered.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        match buffered.get(blank) {
            Some(&byte) => break byte,
            None if buffered.is_empty() => return Err(EvalError::format(path, "it is empty")),
            None => reader.consume(blank),
        }
    };
    if start != b'[' {
        let values = serde_json::Deserializer::from_reader(reader).into_iter::<T>();
        return { values }.try_for_each(|value| show(value.map_err(damaged)?));
    }
    let mut failure = None;
    let elements = Elements { show: &mut show, failure: &mut failure, of: PhantomData };
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let read = deserializer.deserialize_seq(elements);
    match failure {
        Some(failure) => Err(failure),
        None => read.and_then(|()| deserializer.end()).map_err(damaged),
    }
}

/// Shows the elements of an array as they come.
struct Elements<'a, T, F> {
    show: &'a mut F,
    failure: &'a mut Option<EvalError>,
    of: PhantomData<T>,
}

impl<'de, T: DeserializeOwned, F: FnMut(T) -> Result<(), EvalError>> Visitor<'de>
    for Elements<'_, T, F>
{
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while let Some(value) = sequence.next_element::<T>()? {
            if let Err(failure) = (self.show)(value) {
                *self.failure = Some(failure);
                return Err(serde::de::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}
