//! Tokenizers: a byte-level BPE trained on text, and text to tokens.

use std::{
    panic::catch_unwind,
    path::{Path, PathBuf},
};

use tokenizers::{
    AddedToken, Tokenizer, TokenizerBuilder,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainerBuilder},
    },
    normalizers::NormalizerWrapper,
    pre_tokenizers::byte_level::ByteLevel,
};

use crate::DataError;

/// Entries that a byte-level vocabulary has at least: all bytes and the end of a document.
pub const SMALLEST_VOCABULARY: usize = 257;

/// Token that ends every document.
pub const END_OF_DOCUMENT: &str = "<eod>";

/// Trains a byte-level BPE with `vocab_size` entries.
///
/// # Errors
///
/// If the vocabulary is too small for the 256 bytes and `<eod>`, or training fails.
pub fn train(
    texts: impl Iterator<Item = String> + Send,
    vocab_size: usize,
    progress: bool,
) -> Result<Tokenizer, DataError> {
    train_with(&[], texts, vocab_size, progress)
}

/// The same with other special tokens beside `<eod>`.
///
/// # Errors
///
/// As [`train`].
pub fn train_with(
    special: &[&str],
    texts: impl Iterator<Item = String> + Send,
    vocab_size: usize,
    progress: bool,
) -> Result<Tokenizer, DataError> {
    let smallest = SMALLEST_VOCABULARY + special.len();
    if vocab_size < smallest {
        return Err(DataError::Tokenizer(format!(
            "a vocabulary of {vocab_size} is below the {smallest} of bytes and special tokens"
        )));
    }
    let failed = |error: tokenizers::Error| DataError::Tokenizer(error.to_string());
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .show_progress(progress)
        .special_tokens(
            std::iter::once(&END_OF_DOCUMENT)
                .chain(special)
                .map(|&token| AddedToken::from(token, true))
                .collect(),
        )
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
    let pieces = texts
        .flat_map(|text| pieces(&text, true).into_iter().map(str::to_owned).collect::<Vec<_>>());
    let mut trainer = TrainerWrapper::from(trainer);
    tokenizer.train(&mut trainer, pieces).map_err(failed)?;
    Ok(tokenizer)
}

/// A `tokenizer.json`, or the one of a directory.
pub(crate) fn file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() }
}

/// Reads a `tokenizer.json`, or the one of a directory.
///
/// # Errors
///
/// If the file is no tokenizer.
pub fn read(path: &Path) -> Result<Tokenizer, DataError> {
    let path = &file(path);
    let bytes = std::fs::read(path).map_err(DataError::io("read", path))?;
    let failed =
        |error: String| DataError::Tokenizer(format!("cannot use {}: {error}", path.display()));
    // The library takes much for granted, and panics where it is missing.
    match catch_unwind(|| Tokenizer::from_bytes(bytes)) {
        Ok(read) => read.map_err(|error| failed(error.to_string())),
        Err(_) => Err(failed("it is no tokenizer".into())),
    }
}

/// Turns texts into tokens, for one document after another.
#[derive(Debug, Clone)]
pub struct Encoder {
    tokenizer: Tokenizer,
    eod: u32,
    /// Whether a text may be cut at a line break: not for a tokenizer that puts something before
    /// every text that it is given.
    cuts_lines: bool,
}

impl Encoder {
    /// With the token that ends documents, `<eod>` unless another one is named.
    ///
    /// # Errors
    ///
    /// If the tokenizer does not have it.
    pub fn new(tokenizer: &Tokenizer, end_of_document: &str) -> Result<Self, DataError> {
        let missing = || DataError::Tokenizer(format!("it has no {end_of_document} token"));
        let eod = tokenizer.token_to_id(end_of_document).ok_or_else(missing)?;
        let mut tokenizer = tokenizer.clone();
        tokenizer.set_encode_special_tokens(true);
        let tokens = |text: &str| {
            let encoded = tokenizer.encode_fast(text, false);
            encoded.map_or(Vec::new(), |encoded| encoded.get_ids().to_vec())
        };
        let parts = [tokens("one line"), tokens("\nanother line")].concat();
        let cuts_lines = tokens("one line\nanother line") == parts;
        Ok(Self { tokenizer, eod, cuts_lines })
    }

    /// Id of the token that ends documents.
    pub fn eod(&self) -> u32 {
        self.eod
    }

    /// Entries of the vocabulary, those of added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The tokens of a text. No document ends where it spells `<eod>`: that is text, and left out
    /// only by a tokenizer for which it is no special token.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails on it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut tokens = Vec::with_capacity(text.len() / 3);
        for piece in pieces(text, self.cuts_lines) {
            let encoded = self.tokenizer.encode_fast(piece, false);
            let encoded = encoded.map_err(|error| DataError::Tokenizer(error.to_string()))?;
            // A tokenizer for which it is no special token would take it for one in a text, too.
            tokens.extend(encoded.get_ids().iter().filter(|&&id| id != self.eod));
        }
        Ok(tokens)
    }
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

/// Bytes from which a text is cut at the next line break between two words, where a tokenizer ends a
/// token anyway: a library that is given a long text at once takes a hundred bytes of memory for each
/// of its tokens.
const LONG: usize = 16 << 10;

/// The text in parts, cut at line breaks, if that changes no token, and within runs of one kind that
/// are too long, as encoded files have them, and languages that put no spaces between words where
/// there is no punctuation either.
fn pieces(text: &str, cuts_lines: bool) -> Vec<&str> {
    let (mut pieces, mut begin) = (Vec::new(), 0);
    let (mut run, mut kind) = (0, Kind::Other);
    let bytes = text.as_bytes();
    let is_word = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphanumeric);
    for (at, character) in text.char_indices() {
        let next = Kind::of(character);
        let is_long = cuts_lines && at - begin >= LONG;
        if is_long && character == '\n' && is_word(at - 1) && is_word(at + 1) {
            pieces.push(&text[begin..at]);
            begin = at;
        }
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

#[cfg(test)]
mod tests {
    use tokenizers::normalizers::prepend::Prepend;

    use super::*;

    fn words(count: usize) -> String {
        (0..count).map(|i| format!("word{} ", i % 40)).collect()
    }

    #[test]
    fn only_unbroken_runs_are_cut() {
        assert_eq!(pieces("a few words\n\n and more", true), ["a few words\n\n and more"]);
        let run = "ä".repeat(2 * LONGEST_RUN + 3);
        let cut = pieces(&run, true);
        let lengths: Vec<usize> = cut.iter().map(|piece| piece.chars().count()).collect();
        assert_eq!(lengths, [LONGEST_RUN, LONGEST_RUN, 3]);
        assert_eq!(cut.concat(), run);
        assert_eq!(pieces(&" ".repeat(LONGEST_RUN + 1), true).len(), 2);
    }

    #[test]
    fn the_tokens_of_parts_are_those_of_the_whole() {
        let text: String = (0..9000)
            .map(|i| format!("word{}{}", i % 71, ["\n", " ", "\n\n", ".\n", "\n  "][i % 5]))
            .collect();
        assert!(pieces(&text, true).len() > 2);
        assert_eq!(pieces(&text, true).concat(), text);
        let tokenizer = train([text.clone()].into_iter(), 400, false).unwrap();
        let whole = tokenizer.encode_fast(text.as_str(), false).unwrap();
        let encoder = Encoder::new(&tokenizer, END_OF_DOCUMENT).unwrap();
        assert_eq!(encoder.encode(&text).unwrap(), whole.get_ids());
        // One that begins every text with a sign of its own is given it whole.
        let mut tokenizer = tokenizer;
        tokenizer.with_normalizer(Some(Prepend::new("_".into()))).unwrap();
        let whole = tokenizer.encode_fast(text.as_str(), false).unwrap();
        let encoder = Encoder::new(&tokenizer, END_OF_DOCUMENT).unwrap();
        assert_eq!(encoder.encode(&text).unwrap(), whole.get_ids());
    }

    /// Found by `scripts/fuzz.sh`: the library panics on it.
    #[test]
    fn a_file_that_is_no_tokenizer_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("tokenizer.json");
        let decoder = r#"{"type": "ByteLevel", "added_prefix": false, "trim_offsets": true}"#;
        for text in [format!("{{\"decoder\": {decoder}}}"), "{}".into(), "no JSON".into()] {
            std::fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.starts_with("tokenizer: cannot use "), "{error}");
        }
    }

    #[test]
    fn what_a_text_spells_is_text() {
        let tokenizer = train([words(300)].into_iter(), 300, false).unwrap();
        let encoder = Encoder::new(&tokenizer, END_OF_DOCUMENT).unwrap();
        let tokens = encoder.encode("the <eod> ends").unwrap();
        assert!(!tokens.contains(&encoder.eod()));
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), "the <eod> ends");
        assert!(Encoder::new(&tokenizer, "</s>").is_err());
    }
}
