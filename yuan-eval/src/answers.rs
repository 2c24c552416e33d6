//! Files of answers: a line of JSON for each item, whoever wrote it.

use std::{
    collections::{HashMap, HashSet},
    fs::{File, OpenOptions},
    io::{BufRead, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_files::FileError;

use crate::{EvalError, read};

/// An answer to an item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The item's id.
    pub id: String,
    /// What a model said.
    pub answer: String,
    /// Tokens that it took, if they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

/// The answers of a file by their items' ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answers {
    answers: HashMap<String, Answer>,
    /// Lines that are no answers.
    pub malformed: u64,
    /// The first of them, with what is wrong with it.
    pub first_malformed: Option<String>,
    /// Lines that answer an item which an earlier one answered; the last one counts.
    pub repeated: u64,
}

/// Bytes of a line at most.
const MOST: u64 = 64 << 20;

/// Shows the lines of a file with their numbers.
fn for_each_line(path: &Path, mut show: impl FnMut(u64, &[u8])) -> Result<(), EvalError> {
    let mut reader = read::open(path)?;
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        let failed = FileError::of("read", path);
        let read = (&mut reader).take(MOST).read_until(b'\n', &mut line).map_err(failed)?;
        if read == 0 {
            return Ok(());
        }
        number += 1;
        if read as u64 == MOST {
            return Err(EvalError::format(path, format!("line {number} has over 64 MiB")));
        }
        let line = line.trim_ascii();
        if !line.is_empty() {
            show(number, line);
        }
    }
}

impl Answers {
    /// Reads a file: lines with `id` and `answer`, and maybe `tokens`. Lines that are none are counted,
    /// and the first one is named.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is no file, or has a line of over 64 MiB.
    pub fn read(path: &Path) -> Result<Self, EvalError> {
        let mut found = Self::default();
        for_each_line(path, |number, line| match answer_of(line) {
            Ok(answer) => {
                let before = found.answers.insert(answer.id.clone(), answer);
                found.repeated += u64::from(before.is_some());
            }
            Err(reason) => {
                found.malformed += 1;
                found.first_malformed.get_or_insert_with(|| format!("line {number}: {reason}"));
            }
        })?;
        Ok(found)
    }

    /// The answer to an item.
    pub fn get(&self, id: &str) -> Option<&Answer> {
        self.answers.get(id)
    }

    /// How many items are answered.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether no item is.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Adds an answer.
    pub fn insert(&mut self, answer: Answer) {
        self.answers.insert(answer.id.clone(), answer);
    }
}

fn answer_of(line: &[u8]) -> Result<Answer, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| format!("no JSON: {error}"))?;
    let answer = value["answer"].as_str().ok_or("it has no text `answer`")?;
    Ok(Answer { id: id_of(&value)?, answer: answer.to_owned(), tokens: value["tokens"].as_u64() })
}

fn id_of(value: &Value) -> Result<String, String> {
    match &value["id"] {
        Value::String(id) => Ok(id.clone()),
        Value::Number(id) => Ok(id.to_string()),
        _ => Err("it has no `id`".into()),
    }
}

/// Scores that other programs gave, by their names: `BERTScore` and `SummaC`, whose models this
/// library does not have.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OutsideScores(HashMap<String, HashMap<String, f64>>);

impl OutsideScores {
    /// Their names.
    pub const NAMES: [&'static str; 2] = ["BERTScore", "SummaC"];

    /// Reads a file: lines with an `id` and numbers under the names, in 0 to 1.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or a line is no such object.
    pub fn read(path: &Path) -> Result<Self, EvalError> {
        let (mut scores, mut problem) = (HashMap::new(), None);
        for_each_line(path, |number, line| match Self::of_line(line) {
            Ok((id, of_item)) => {
                if scores.insert(id.clone(), of_item).is_some() {
                    problem.get_or_insert(format!("line {number}: {id} has scores already"));
                }
            }
            Err(reason) => drop(problem.get_or_insert(format!("line {number}: {reason}"))),
        })?;
        match problem {
            Some(problem) => Err(EvalError::format(path, problem)),
            None => Ok(Self(scores)),
        }
    }

    fn of_line(line: &[u8]) -> Result<(String, HashMap<String, f64>), String> {
        let value: Value =
            serde_json::from_slice(line).map_err(|error| format!("no JSON: {error}"))?;
        let mut of_item = HashMap::new();
        for name in Self::NAMES {
            let Some(score) = value[name].as_f64() else { continue };
            if !(-1.0..=1.0).contains(&score) {
                return Err(format!("{name} = {score} must be at most 1"));
            }
            of_item.insert(name.to_owned(), score);
        }
        match of_item.is_empty() {
            true => Err(format!("it has neither {}", Self::NAMES.join(" nor "))),
            false => Ok((id_of(&value)?, of_item)),
        }
    }

    pub(crate) fn get(&self, id: &str, name: &str) -> Option<f64> {
        self.0.get(id)?.get(name).copied()
    }

    /// How many items have scores.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are scores of an item.
    pub(crate) fn know(&self, id: &str) -> bool {
        self.0.contains_key(id)
    }

    /// Whether there is such a score of any item.
    pub(crate) fn have(&self, name: &str) -> bool {
        self.0.values().any(|of_item| of_item.contains_key(name))
    }
}

/// Writes answers as they come, so that what was answered is kept whatever happens.
#[derive(Debug)]
pub struct AnswerWriter {
    path: PathBuf,
    file: File,
    known: HashSet<String>,
}

impl AnswerWriter {
    /// Opens a file, or begins one. A last line that was cut off, by a kill for instance, is taken away.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or written.
    pub fn open(path: &Path) -> Result<Self, EvalError> {
        let failed = || FileError::of("write", path);
        if path.exists() && !path.is_file() {
            return Err(EvalError::format(path, "it is no file"));
        }
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).open(path).map_err(failed())?;
        let whole = whole_lines(&mut file).map_err(failed())?;
        let mut last = Vec::new();
        file.seek(SeekFrom::Start(whole)).map_err(failed())?;
        (&mut file).take(MOST).read_to_end(&mut last).map_err(failed())?;
        match answer_of(&last) {
            // Only the end of the line is missing.
            Ok(_) => file.write_all(b"\n").map_err(failed())?,
            Err(_) => file.set_len(whole).map_err(failed())?,
        }
        let known = Answers::read(path)?.answers.into_keys().collect();
        Ok(Self { path: path.to_path_buf(), file, known })
    }

    /// Whether an item is answered.
    pub fn has(&self, id: &str) -> bool {
        self.known.contains(id)
    }

    /// Adds an answer.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&mut self, answer: &Answer) -> Result<(), EvalError> {
        let line = serde_json::json!({
            "id": answer.id, "answer": answer.answer, "tokens": answer.tokens,
        });
        let line = format!("{line}\n");
        self.file.write_all(line.as_bytes()).map_err(FileError::of("write", &self.path))?;
        self.known.insert(answer.id.clone());
        Ok(())
    }
}

/// Bytes up to the end of the last whole line.
fn whole_lines(file: &mut File) -> std::io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut block = [0; 4096];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(at) = part.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}
