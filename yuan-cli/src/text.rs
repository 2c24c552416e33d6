//! What a user names with `--data`: text, or data sets that were prepared before.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Mutex,
};

use anyhow::{anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use yuan::{
    data::{Corpus, DataError, Dataset, Document, Progress, Stage, is_unfinished},
    train::{
        RunData,
        data::{ConversationCounts, PageCounts, WeightedPath},
    },
};

use crate::{
    console::{Console, WrongOption},
    signals::Signals,
};

/// One value of `--data`.
#[derive(Debug, Clone)]
pub struct DataArgument(WeightedPath);

impl FromStr for DataArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

impl DataArgument {
    /// The same with an absolute path, for a file of options that is read elsewhere.
    pub fn absolute(text: &str) -> String {
        let Ok(Self(WeightedPath { path, .. })) = text.parse::<Self>() else {
            return text.to_owned();
        };
        let shown = path.to_string_lossy();
        let absolute = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
        match text.strip_suffix(&*shown) {
            Some(weight) => format!("{weight}{}", absolute.display()),
            None => text.to_owned(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    pub fn weight(&self) -> f64 {
        self.0.weight
    }
}

/// What a run learns: all prepared data sets, or all text.
pub fn run_data(given: &[DataArgument]) -> anyhow::Result<RunData> {
    if let Some(DataArgument(set)) = given.iter().find(|set| is_unfinished(set.path())) {
        bail!(
            "the preparation of {} was stopped: give the same yuan prepare again, which goes on",
            set.path.display()
        );
    }
    let (prepared, text): (Vec<_>, Vec<_>) =
        given.iter().map(|DataArgument(set)| set).partition(|set| Dataset::is_in(&set.path));
    if text.is_empty() {
        return Ok(RunData::Prepared(prepared.into_iter().cloned().collect()));
    }
    let weighted = text.iter().find(|set| set.weight != 1.0);
    if let Some(text) = weighted.or(text.first().filter(|_| !prepared.is_empty())) {
        let path = text.path.display();
        return Err(anyhow!(
            "{path} holds no prepared data set ({}), which alone can be mixed: yuan prepare \
             {path} --out DIR makes one",
            Dataset::FILE
        ))
        .wrong_option();
    }
    Ok(RunData::Text(text.into_iter().map(|set| set.path.clone()).collect()))
}

/// Texts of the user in memory, and a word on what is none.
pub fn read_text(path: &Path, console: &Console) -> Result<Vec<Document>, DataError> {
    let corpus = Corpus::read(path)?;
    if let Some(skipped) = corpus.skipped.summary() {
        console.note(skipped);
    }
    Ok(corpus.documents)
}

/// What was prepared, in one line, and what was left out.
pub fn note_dataset(console: &Console, dataset: &Dataset) {
    let info = dataset.info();
    if let Some(skipped) = info.skipped.summary() {
        console.note(skipped);
    }
    if info.duplicates > 0 {
        console.note(format_args!("left out {} duplicates of documents", info.duplicates));
    }
}

/// What came of conversations, and what was left out.
pub fn note_conversations(console: &Console, counts: &ConversationCounts) {
    if let Some(skipped) = counts.skipped.summary() {
        console.note(skipped);
    }
    let [train, validation] = counts.conversations;
    console.note(format_args!(
        "{train} conversations to train on, {validation} to validate with; {} of their tokens are \
         learnt",
        counts.learnt[0] + counts.learnt[1]
    ));
    if counts.longer_than_a_row > 0 {
        console.note(format_args!(
            "left out {} conversations that are longer than a row (--seq)",
            counts.longer_than_a_row
        ));
    }
}

/// What came of questions about images, and what was left out.
pub fn note_pages(console: &Console, counts: &PageCounts) {
    if let Some(skipped) = counts.skipped.summary() {
        console.note(skipped);
    }
    let ([train, validation], [of_train, of_validation]) = (counts.documents, counts.images);
    console.note(format_args!(
        "{train} questions about {of_train} images to train on, {validation} about {of_validation} to \
         validate with"
    ));
    if counts.longer_than_a_row > 0 {
        console.note(format_args!(
            "left out {} questions that are longer with their images than a row (--seq)",
            counts.longer_than_a_row
        ));
    }
}

/// Shows how far a preparation is, and stops it after a signal.
pub struct Bar {
    bar: Mutex<Option<(Stage, ProgressBar)>>,
    is_shown: bool,
    signals: Option<Signals>,
}

impl Bar {
    pub fn new(console: &Console, signals: Option<Signals>) -> Self {
        Self { bar: Mutex::new(None), is_shown: console.shows_progress(), signals }
    }

    fn bar(stage: Stage, total: u64) -> ProgressBar {
        let what = match stage {
            Stage::Tokenizer => "training the tokenizer",
            Stage::Tokens => "text to tokens",
        };
        let style = ProgressStyle::with_template(
            "{msg:22} {bar:30} {bytes:>11} of {total_bytes}  {bytes_per_sec}  {eta} left",
        );
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(total).with_style(style).with_message(what)
    }
}

impl Progress for Bar {
    fn goes_on(&self, stage: Stage, bytes: u64, total: u64) -> bool {
        if self.is_shown {
            let mut shown = self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if shown.as_ref().is_none_or(|(other, _)| *other != stage) {
                *shown = Some((stage, Self::bar(stage, total)));
            }
            if let Some((_, bar)) = shown.as_ref() {
                bar.set_position(bytes);
                if bytes >= total {
                    bar.finish_and_clear();
                }
            }
        }
        self.signals.as_ref().is_none_or(|signals| signals.received().is_none())
    }
}

impl fmt::Debug for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bar").finish_non_exhaustive()
    }
}

/// Refuses a directory that the tokens of a preparation cannot go to.
pub fn refuse_inside(out: &Path, sources: &[PathBuf]) -> anyhow::Result<()> {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    if let Some(source) = sources.iter().find(|source| absolute(out).starts_with(absolute(source)))
    {
        bail!(
            "{} lies within {}, whose files are read: choose another directory",
            out.display(),
            source.display()
        );
    }
    Ok(())
}

/// A path as a word for a shell.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    match text.chars().all(is_plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}
