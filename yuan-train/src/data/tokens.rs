//! Tokens: a byte-level BPE trained on the corpus, and documents joined into streams.

use std::path::Path;

use tokenizers::{
    AddedToken, Encoding, Tokenizer, TokenizerBuilder,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainerBuilder},
    },
    normalizers::NormalizerWrapper,
    pre_tokenizers::byte_level::ByteLevel,
};

use super::{Document, Split};
use crate::{TrainError, checksums::Checksums};
use yuan_model::{files::write_whole, storage::Checksum};

/// Shares of the tokens that documents chosen by their names may validate; outside of it, they are
/// too few for that.
const BY_NAME: std::ops::RangeInclusive<f64> = 0.01..=0.25;

/// Entries that a byte-level vocabulary has at least: all bytes and the end of a document.
pub const SMALLEST_VOCABULARY: usize = 257;

/// Token that ends every document.
pub const END_OF_DOCUMENT: &str = "<eod>";

/// Documents of both splits as streams of tokens, each document ended by `<eod>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenStreams {
    /// Trained on.
    pub train: Vec<u32>,
    /// Only measured on.
    pub validation: Vec<u32>,
    /// Id of [`END_OF_DOCUMENT`].
    pub eod: u32,
}

/// Trains a byte-level BPE with `vocab_size` entries on the training documents.
///
/// # Errors
///
/// If the vocabulary is too small for the 256 bytes and `<eod>`, or training fails.
pub fn train_tokenizer(
    documents: &[Document],
    vocab_size: usize,
    progress: bool,
) -> Result<Tokenizer, TrainError> {
    if vocab_size < SMALLEST_VOCABULARY {
        return Err(TrainError::Tokenizer(format!(
            "a vocabulary of {vocab_size} is below the {SMALLEST_VOCABULARY} of bytes and <eod>"
        )));
    }
    let failed = |error: tokenizers::Error| TrainError::Tokenizer(error.to_string());
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .show_progress(progress)
        .special_tokens(vec![AddedToken::from(END_OF_DOCUMENT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer: Tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(byte_level))
            .with_decoder(Some(byte_level))
            .build()
            .map_err(failed)?
            .into();
    let is_trained_on = |document: &&Document| document.split() == Split::Train;
    let mut texts: Vec<&Document> = documents.iter().filter(is_trained_on).collect();
    if texts.is_empty() {
        texts = documents.iter().collect();
    }
    let pieces = texts.iter().flat_map(|document| pieces(&document.text));
    let mut trainer = TrainerWrapper::from(trainer);
    tokenizer.train(&mut trainer, pieces).map_err(failed)?;
    Ok(tokenizer)
}

/// Characters of one kind in a row that a tokenizer gets at once: its time grows with their square.
const LONGEST_RUN: usize = 512;

/// What a tokenizer takes together.
#[derive(PartialEq, Eq)]
enum Kind {
    Letter,
    Digit,
    Space,
    Other,
}

impl Kind {
    fn of(character: char) -> Self {
        match character {
            c if c.is_alphabetic() => Self::Letter,
            c if c.is_numeric() => Self::Digit,
            c if c.is_whitespace() => Self::Space,
            _ => Self::Other,
        }
    }
}

/// The text in parts, cut only within runs of one kind that are too long, as encoded files have
/// them, and languages that put no spaces between words where there is no punctuation either.
fn pieces(text: &str) -> Vec<&str> {
    let (mut pieces, mut begin) = (Vec::new(), 0);
    let (mut run, mut kind) = (0, Kind::Other);
    for (at, character) in text.char_indices() {
        let next = Kind::of(character);
        run = if next == kind { run + 1 } else { 1 };
        kind = next;
        if run > LONGEST_RUN {
            pieces.push(&text[begin..at]);
            (begin, run) = (at, 1);
        }
    }
    pieces.push(&text[begin..]);
    pieces
}

/// Reads a `tokenizer.json`.
///
/// # Errors
///
/// If the file is no tokenizer.
pub fn read_tokenizer(path: &Path) -> Result<Tokenizer, TrainError> {
    let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
    let failed = |error| TrainError::Tokenizer(format!("cannot use {}: {error}", path.display()));
    Tokenizer::from_bytes(bytes).map_err(failed)
}

impl TokenStreams {
    /// Names of the files in a run directory.
    pub const FILES: [&str; 2] = ["train.tokens", "validation.tokens"];

    /// Tokenizes every document and joins them by split. No document ends where it spells `<eod>`:
    /// that is text, and left out only by a tokenizer for which it is no special token.
    ///
    /// Where the names of a few documents leave next to nothing to train on or to validate with,
    /// the end of each document, a twentieth of it, validates.
    ///
    /// # Errors
    ///
    /// If the tokenizer has no `<eod>` or fails on a document.
    pub fn new(documents: &[Document], tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        let failed = |error: tokenizers::Error| TrainError::Tokenizer(error.to_string());
        let missing = || TrainError::Tokenizer(format!("it has no {END_OF_DOCUMENT} token"));
        let eod = tokenizer.token_to_id(END_OF_DOCUMENT).ok_or_else(missing)?;
        let mut tokenizer = tokenizer.clone();
        tokenizer.set_encode_special_tokens(true);
        let cut: Vec<Vec<&str>> = documents.iter().map(|document| pieces(&document.text)).collect();
        let encoded = tokenizer.encode_batch_fast(cut.concat(), false).map_err(failed)?;
        let mut encoded = encoded.iter();
        let mut tokens = Vec::with_capacity(documents.len());
        for pieces in &cut {
            let ids = encoded.by_ref().take(pieces.len()).flat_map(Encoding::get_ids);
            // A tokenizer for which it is no special token would take it for one in a text, too.
            tokens.push(ids.copied().filter(|&id| id != eod).collect::<Vec<u32>>());
        }
        let validates: Vec<bool> =
            documents.iter().map(|document| document.split() == Split::Validation).collect();
        let count = |wanted: bool| -> usize {
            let wanted =
                validates.iter().zip(&tokens).filter(|(validates, _)| **validates == wanted);
            wanted.map(|(_, tokens)| tokens.len() + 1).sum()
        };
        let share = count(true) as f64 / (count(true) + count(false)).max(1) as f64;
        let mut streams = Self { train: Vec::new(), validation: Vec::new(), eod };
        for (tokens, validates) in tokens.iter().zip(validates) {
            let first = match (BY_NAME.contains(&share), validates) {
                (true, true) => 0,
                (true, false) => tokens.len(),
                (false, _) => tokens.len() - tokens.len() / 20,
            };
            let (train, validation) = tokens.split_at(first);
            for (stream, tokens) in
                [(&mut streams.train, train), (&mut streams.validation, validation)]
            {
                if !tokens.is_empty() {
                    stream.extend_from_slice(tokens);
                    stream.push(eod);
                }
            }
        }
        Ok(streams)
    }

    /// Reads what [`save`](Self::save) wrote into `directory`, for a model of `vocab_size` tokens.
    ///
    /// # Errors
    ///
    /// A file that is missing, is not what was written, or holds tokens beyond the vocabulary.
    pub fn load(directory: &Path, eod: u32, vocab_size: usize) -> Result<Self, TrainError> {
        let checksums = match directory.join(Checksums::FILE).exists() {
            true => Checksums::load(directory)?,
            // Of a run of an earlier version.
            false => Checksums::default(),
        };
        let read = |name: &str| {
            let path = directory.join(name);
            let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
            let damaged = |reason: String| Err(TrainError::Damaged { path: path.clone(), reason });
            if let Some(problem) = checksums.problem(name, Checksum::of(&bytes)) {
                return damaged(problem);
            }
            let (tokens, rest) = bytes.as_chunks::<4>();
            if !rest.is_empty() {
                return damaged("it is not a whole number of tokens".into());
            }
            let tokens: Vec<u32> = tokens.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
            // Devices look tokens up without asking whether there are so many.
            match tokens.iter().max() {
                Some(&most) if most as usize >= vocab_size => damaged(format!(
                    "it holds the token {most}, but the model has only {vocab_size}: it was made \
                     with another tokenizer"
                )),
                _ => Ok(tokens),
            }
        };
        let [train, validation] = Self::FILES;
        Ok(Self { train: read(train)?, validation: read(validation)?, eod })
    }

    /// Tokens of both files in `directory`.
    ///
    /// # Errors
    ///
    /// If one is missing.
    pub fn sizes(directory: &Path) -> Result<[u64; 2], TrainError> {
        let size = |name: &str| {
            let path = directory.join(name);
            let bytes = std::fs::metadata(&path).map_err(TrainError::io("read", &path))?.len();
            Ok::<_, TrainError>(bytes / 4)
        };
        let [train, validation] = Self::FILES;
        Ok([size(train)?, size(validation)?])
    }

    /// Writes `train.tokens` and `validation.tokens`, little-endian 32-bit ids, and their
    /// checksums.
    ///
    /// # Errors
    ///
    /// If a file cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), TrainError> {
        let mut checksums = Checksums::default();
        for (name, tokens) in Self::FILES.into_iter().zip([&self.train, &self.validation]) {
            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            checksums.add(name, Checksum::of(&bytes));
            write_whole(&directory.join(name), &bytes)?;
        }
        checksums.save(directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(name: &str, text: impl Into<String>) -> Document {
        Document { name: name.into(), text: text.into() }
    }

    fn words(count: usize) -> String {
        (0..count).map(|i| format!("word{} ", i % 40)).collect()
    }

    #[test]
    fn only_unbroken_runs_are_cut() {
        assert_eq!(pieces("a few words\n\n and more"), ["a few words\n\n and more"]);
        let run = "ä".repeat(2 * LONGEST_RUN + 3);
        let cut = pieces(&run);
        let lengths: Vec<usize> = cut.iter().map(|piece| piece.chars().count()).collect();
        assert_eq!(lengths, [LONGEST_RUN, LONGEST_RUN, 3]);
        assert_eq!(cut.concat(), run);
        assert_eq!(pieces(&" ".repeat(LONGEST_RUN + 1)).len(), 2);
    }

    #[test]
    fn what_a_text_spells_is_text() {
        // Enough of them validate that no document is split within.
        let name = |i| format!("{i}.txt");
        let validates = |name: &String| document(name, "").split() == Split::Validation;
        let names = (0..).map(name).filter(validates).take(3);
        let names: Vec<String> =
            names.chain((0..).map(name).filter(|name| !validates(name)).take(40)).collect();
        let text = format!("{}the <eod> ends", words(30));
        let documents: Vec<_> = names.iter().map(|name| document(name, &text[..])).collect();
        let tokenizer = train_tokenizer(&documents, 300, false).unwrap();
        let streams = TokenStreams::new(&documents, &tokenizer).unwrap();
        let ends = |tokens: &[u32]| tokens.iter().filter(|&&token| token == streams.eod).count();
        assert_eq!((ends(&streams.train), ends(&streams.validation)), (40, 3));
        let text = [&streams.train, &streams.validation]
            .map(|tokens| tokenizer.decode(tokens, true).unwrap())
            .concat();
        assert!(text.contains("the <eod> ends"));
    }

    #[test]
    fn one_document_is_split_within() {
        for name in ["input.txt", "a", "b", "c", "d"] {
            let documents = [document(name, words(2000))];
            let tokenizer = train_tokenizer(&documents, 300, false).unwrap();
            let streams = TokenStreams::new(&documents, &tokenizer).unwrap();
            let (train, validation) = (streams.train.len(), streams.validation.len());
            let share = validation as f64 / (train + validation) as f64;
            assert!((0.04..0.06).contains(&share), "{name}: {train} and {validation}");
        }
    }

    #[test]
    fn an_unbroken_text_takes_no_longer_than_another() {
        // Quadratic, this would take hours.
        let mut state = 1_u32;
        let mut letter = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from(b'a' + (state >> 24) as u8 % 26)
        };
        let blob: String = (0..1_000_000).map(|_| letter()).collect();
        let documents = [document("blob", blob)];
        let tokenizer = train_tokenizer(&documents, 400, false).unwrap();
        assert!(TokenStreams::new(&documents, &tokenizer).unwrap().train.len() > 100_000);
    }
}
