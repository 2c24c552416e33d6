//! Token files that another program made with a tokenizer that is given: they are copied document
//! by document, so that they get a split, a `dataset.json` and an end of every document.

use std::{ops::Range, path::PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::{PrepareOptions, Progress, Stage, TokenizerFrom, pipeline::Pipeline};
use crate::{DataError, Place, Sources, Split, TokenFile};

/// Tokens that are read at once.
const AT_ONCE: u64 = 1 << 20;
/// Bytes after which the caller is asked and a note is taken.
const BETWEEN_NOTES: u64 = 1 << 27;

/// Whether the sources are token files, `NAME.idx` or as Megatron names them without an ending;
/// then all of them are, and they are returned by their indexes.
///
/// # Errors
///
/// If some are and others are not, or the tokenizer is to be trained, for which there is no text.
pub(super) fn indexes(options: &PrepareOptions) -> Result<Option<Vec<PathBuf>>, DataError> {
    let index_of = |path: &PathBuf| match path.extension().and_then(|ending| ending.to_str()) {
        Some("idx") => Some(path.clone()),
        Some("bin") => Some(path.with_extension("idx")),
        _ if path.exists() => None,
        _ => {
            let index = crate::indexed::with_ending(path, ".idx");
            index.exists().then_some(index)
        }
    };
    let found: Vec<Option<PathBuf>> = options.sources.iter().map(index_of).collect();
    if found.iter().all(Option::is_none) {
        return Ok(None);
    }
    let Some(indexes) = found.into_iter().collect() else {
        let reason = "token files (.idx) and text cannot be prepared together: make a data set of \
                      each, and mix them by weight when they are trained on";
        return Err(DataError::Setting(reason.into()));
    };
    match options.tokenizer {
        TokenizerFrom::File(_) => Ok(Some(indexes)),
        TokenizerFrom::Training { .. } => {
            let reason = "token files need the tokenizer that they were made with: name it \
                          (--tokenizer)";
            Err(DataError::Setting(reason.into()))
        }
    }
}

impl Pipeline<'_> {
    /// Copies the documents of token files from where the state says, to the end.
    pub fn import(&mut self, sources: &Sources, progress: &dyn Progress) -> Result<(), DataError> {
        let mut files = Vec::with_capacity(sources.files().len());
        for source in sources.files() {
            let file = TokenFile::open(&source.path.with_extension(""))?;
            files.push((source, file.with_vocabulary(self.encoder.vocab_size())));
        }
        let bytes = |file: &TokenFile| file.num_tokens() * file.token_type().bytes() as u64;
        let total = files.iter().map(|(_, file)| bytes(file)).sum();
        let (mut read, mut noted) = (0, 0);
        for (number, (source, file)) in files.iter().enumerate() {
            if number < self.state.place.file {
                read += bytes(file);
                continue;
            }
            let first = std::mem::take(&mut self.state.place.record) as usize;
            for document in 0..file.num_documents() {
                let tokens = tokens_of(file, document)?;
                read += (tokens.end - tokens.start) * file.token_type().bytes() as u64;
                if document < first {
                    continue;
                }
                let name = format!("{}:{document}", source.name);
                self.copy(file, &name, tokens)?;
                self.state.place = Place { file: number, record: document as u64 + 1, offset: 0 };
                if read - noted > BETWEEN_NOTES {
                    noted = read;
                    self.note()?;
                    if !progress.goes_on(Stage::Tokens, read, total) {
                        return Err(DataError::Stopped);
                    }
                }
            }
            self.state.place = Place { file: number + 1, record: 0, offset: 0 };
        }
        progress.goes_on(Stage::Tokens, total, total);
        self.note()
    }

    fn copy(&mut self, file: &TokenFile, name: &str, tokens: Range<u64>) -> Result<(), DataError> {
        let eod = self.encoder.eod();
        // Megatron's own preparation ends documents only if it is told to.
        let ends = !tokens.is_empty() && file.read(tokens.end - 1, 1)? == [eod];
        let text = tokens.start..tokens.end - u64::from(ends);
        if text.is_empty() {
            return Ok(());
        }
        let pieces = || {
            text.clone().step_by(AT_ONCE as usize).map(|from| {
                let count = AT_ONCE.min(text.end - from) as usize;
                file.read(from, count)
            })
        };
        if self.options.drop_duplicates {
            let mut hash = Xxh3::new();
            for piece in pieces() {
                piece?.iter().for_each(|token| hash.update(&token.to_le_bytes()));
            }
            if !self.hashes.is_new(hash.digest())? {
                self.state.duplicates += 1;
                return Ok(());
            }
        }
        let split = match Split::of(name, self.options.validation) {
            Split::Train => 0,
            Split::Validation => 1,
        };
        let writer = &mut self.writers[split];
        pieces().try_for_each(|piece| writer.push(&piece?))?;
        writer.push(&[eod])?;
        writer.end_document()
    }
}

/// Where the tokens of a document are; its sequences follow each other.
fn tokens_of(file: &TokenFile, document: usize) -> Result<Range<u64>, DataError> {
    let sequences = file.document(document)?;
    if sequences.is_empty() {
        return Ok(0..0);
    }
    let begin = file.sequence(sequences.start)?.start;
    let mut end = begin;
    for sequence in sequences {
        let tokens = file.sequence(sequence)?;
        if tokens.start != end {
            return Err(DataError::damaged(
                &file.path().with_extension("idx"),
                format!("the sequences of document {document} do not follow each other"),
            ));
        }
        end = tokens.end;
    }
    Ok(begin..end)
}
