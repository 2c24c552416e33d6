//! Text from files: which are read, as what, and what is left out and why.

use std::{
    collections::HashSet,
    fmt, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::Document;
use crate::TrainError;

/// What was read from a file or a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Corpus {
    /// Texts, ordered by path.
    pub documents: Vec<Document>,
    /// Files that are no text.
    pub skipped: Vec<Skipped>,
    /// Files of which a part is no text.
    pub read_in_part: Vec<Skipped>,
}

/// A file that was left out, whole or in part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its path below the directory that was read.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl Corpus {
    /// Reads a file, or every file below a directory, links followed: a document each, and of a
    /// `.jsonl` file one for each line, which is a text or an object with one as its `text`.
    ///
    /// Texts are in UTF-8, or in UTF-16 with a byte order mark. Everything is in memory afterwards.
    ///
    /// # Errors
    ///
    /// A path that cannot be read, or one without any text.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let mut corpus = Self::default();
        if path.is_file() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            corpus.add_file(name, path)?;
        } else if path.exists() && !path.is_dir() {
            let reason = format!("{} is neither a file nor a directory", path.display());
            return Err(TrainError::Corpus(reason));
        } else {
            let found = Files::below(path)?;
            for file in &found.files {
                corpus.add_file(below(file, path), file)?;
            }
            for (file, reason) in &found.unreadable {
                corpus.skip(below(file, path), reason);
            }
        }
        if corpus.documents.is_empty() {
            let why =
                corpus.skipped_summary().map_or_else(String::new, |skipped| format!(": {skipped}"));
            return Err(TrainError::Corpus(format!("{} holds no text{why}", path.display())));
        }
        Ok(corpus)
    }

    /// What was left out, in one line; none if nothing was.
    pub fn skipped_summary(&self) -> Option<String> {
        let whole = listed(&self.skipped).map(|list| format!("skipped {list}"));
        let parts = listed(&self.read_in_part).map(|list| format!("read in part {list}"));
        let summary = [whole, parts].into_iter().flatten().collect::<Vec<_>>().join("; ");
        (!summary.is_empty()).then_some(summary)
    }

    fn skip(&mut self, name: String, reason: impl Into<String>) {
        self.skipped.push(Skipped { name, reason: reason.into() });
    }

    fn add_file(&mut self, name: String, file: &Path) -> Result<(), TrainError> {
        let bytes = fs::read(file).map_err(TrainError::io("read", file))?;
        let text = match decode(bytes) {
            Ok(text) => text,
            Err(reason) => {
                self.skip(name, reason);
                return Ok(());
            }
        };
        if file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl")) {
            self.add_lines(&name, &text);
        } else {
            self.documents.push(Document { name, text });
        }
        Ok(())
    }

    /// The documents of JSON lines.
    fn add_lines(&mut self, name: &str, text: &str) {
        let mut without = 0;
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value: Option<Value> = serde_json::from_str(line).ok();
            let text = value.as_ref().and_then(|value| value.as_str().or(value["text"].as_str()));
            match text.filter(|text| !text.trim().is_empty()) {
                Some(text) => {
                    let name = format!("{name}:{}", number + 1);
                    self.documents.push(Document { name, text: text.to_owned() });
                }
                None => without += 1,
            }
        }
        if without > 0 {
            let (name, reason) = (name.to_owned(), format!("{without} lines without a `text`"));
            self.read_in_part.push(Skipped { name, reason });
        }
    }
}

/// How many files they are, and the first of them; none if there is none.
fn listed(skipped: &[Skipped]) -> Option<String> {
    const NAMED: usize = 5;
    let first = skipped.first()?;
    let named: Vec<_> = skipped.iter().take(NAMED).map(Skipped::to_string).collect();
    let (count, more) = (skipped.len(), skipped.len().saturating_sub(NAMED));
    Some(match (count, more) {
        (1, _) => first.to_string(),
        (_, 0) => format!("{count} files: {}", named.join(", ")),
        _ => format!("{count} files: {} and {more} more", named.join(", ")),
    })
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A name may hold what a terminal would obey.
        let name = match self.name.chars().any(char::is_control) {
            true => self.name.escape_debug().to_string(),
            false => self.name.clone(),
        };
        write!(f, "{name} ({})", self.reason)
    }
}

/// The file as a document, unless it is empty, larger than `most` bytes or no text.
///
/// # Errors
///
/// If the file cannot be read.
pub fn read_document(name: String, file: &Path, most: u64) -> Result<Option<Document>, TrainError> {
    if fs::metadata(file).map_err(TrainError::io("read", file))?.len() > most {
        return Ok(None);
    }
    let bytes = fs::read(file).map_err(TrainError::io("read", file))?;
    Ok(decode(bytes).ok().map(|text| Document { name, text }))
}

/// The text that bytes are, or why they are none.
fn decode(bytes: Vec<u8>) -> Result<String, &'static str> {
    let text = match &bytes[..] {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes)?,
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes)?,
        _ => String::from_utf8(bytes).map_err(|_| "neither UTF-8 nor UTF-16")?,
    };
    let text = match text.strip_prefix('\u{feff}') {
        Some(text) => text.to_owned(),
        None => text,
    };
    match () {
        () if text.contains('\0') => Err("not a text"),
        () if text.trim().is_empty() => Err("empty"),
        () => Ok(text),
    }
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String, &'static str> {
    let (units, rest) = bytes.as_chunks::<2>();
    let units: Vec<u16> = units.iter().map(|&bytes| unit(bytes)).collect();
    let text = String::from_utf16(&units).map_err(|_| "damaged UTF-16")?;
    if rest.is_empty() { Ok(text) } else { Err("damaged UTF-16") }
}

/// The part of a path below a directory, the same on every system.
fn below(file: &Path, directory: &Path) -> String {
    file.strip_prefix(directory).unwrap_or(file).to_string_lossy().replace('\\', "/")
}

/// All files below a directory, ordered by path; links are followed, and a file that has several
/// names is listed by the first.
///
/// # Errors
///
/// If a directory cannot be read.
pub fn files_below(directory: &Path) -> Result<Vec<PathBuf>, TrainError> {
    Ok(Files::below(directory)?.files)
}

#[derive(Default)]
struct Files {
    files: Vec<PathBuf>,
    /// What cannot be read, and why.
    unreadable: Vec<(PathBuf, String)>,
}

impl Files {
    fn below(directory: &Path) -> Result<Self, TrainError> {
        let mut found = Self::default();
        // A link may lead to a directory above it, which would be without end.
        let mut seen = HashSet::new();
        found.enter(directory, &mut seen)?;
        found.files.sort();
        Ok(found)
    }

    /// Everything in a directory, in the order of the names, which is the same everywhere.
    fn enter(&mut self, directory: &Path, seen: &mut HashSet<PathBuf>) -> Result<(), TrainError> {
        let read = |error| TrainError::io("read", directory)(error);
        if !seen.insert(directory.canonicalize().map_err(read)?) {
            return Ok(());
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(directory).map_err(read)? {
            paths.push(entry.map_err(read)?.path());
        }
        paths.sort();
        for path in paths {
            // Of what a link leads to.
            match fs::metadata(&path) {
                Ok(target) if target.is_dir() => self.enter(&path, seen)?,
                Ok(target) if target.is_file() => {
                    if seen.insert(path.canonicalize().map_err(TrainError::io("read", &path))?) {
                        self.files.push(path);
                    }
                }
                Ok(_) => self.unreadable.push((path, "neither a file nor a directory".into())),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    self.unreadable.push((path, "its link leads nowhere".into()));
                }
                Err(error) => self.unreadable.push((path, error.to_string())),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(corpus: &Corpus) -> Vec<&str> {
        corpus.documents.iter().map(|document| document.name.as_str()).collect()
    }

    #[test]
    fn texts_are_read_and_the_rest_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(temp.path().join(name), bytes).unwrap();
        write("a.txt", b"\xef\xbb\xbftext");
        write("large.txt", "To be. ".repeat(1 << 20).as_bytes());
        write("latin1.txt", b"na\xefve");
        write("utf16.txt", b"\xff\xfen\x00a\x00\xef\x00v\x00e\x00");
        write("image", b"\x89PNG\0");
        write("blank", b" \n");
        write("lines.jsonl", b"{\"text\": \"one\"}\n\n\"two\"\n{\"body\": \"three\"}\n{");
        let corpus = Corpus::read(temp.path()).unwrap();
        let expected = ["a.txt", "large.txt", "lines.jsonl:1", "lines.jsonl:3", "utf16.txt"];
        assert_eq!(names(&corpus), expected);
        assert_eq!(corpus.documents[0].text, "text");
        assert_eq!(corpus.documents[4].text, "naïve");
        assert_eq!(
            corpus.skipped_summary().unwrap(),
            "skipped 3 files: blank (empty), image (neither UTF-8 nor UTF-16), \
             latin1.txt (neither UTF-8 nor UTF-16); \
             read in part lines.jsonl (2 lines without a `text`)"
        );
        // One file is a corpus, too.
        let one = Corpus::read(&temp.path().join("lines.jsonl")).unwrap();
        assert_eq!(names(&one), ["lines.jsonl:1", "lines.jsonl:3"]);
        let error = Corpus::read(&temp.path().join("blank")).unwrap_err().to_string();
        assert!(error.ends_with("blank holds no text: skipped blank (empty)"), "{error}");
        let error = Corpus::read(&temp.path().join("nowhere")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read "), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_once() {
        use std::os::unix::fs::symlink;

        let temp = tempfile::tempdir().unwrap();
        let [texts, links] = ["texts", "links"].map(|name| temp.path().join(name));
        fs::create_dir(&texts).unwrap();
        fs::create_dir(&links).unwrap();
        fs::write(texts.join("a.txt"), "text").unwrap();
        fs::write(texts.join("c.txt"), "another").unwrap();
        symlink(texts.join("a.txt"), links.join("b.txt")).unwrap();
        symlink(&texts, links.join("texts")).unwrap();
        symlink(&links, links.join("itself")).unwrap();
        symlink("nowhere", links.join("dangling")).unwrap();
        let corpus = Corpus::read(&links).unwrap();
        assert_eq!(names(&corpus), ["b.txt", "texts/c.txt"]);
        let skipped = "skipped dangling (its link leads nowhere)";
        assert_eq!(corpus.skipped_summary().unwrap(), skipped);
    }
}
