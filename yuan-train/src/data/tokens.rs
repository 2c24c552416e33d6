//! Tokens: a byte-level BPE trained on the corpus, and documents joined into streams.

use std::path::Path;

use tokenizers::{
    AddedToken, Tokenizer, TokenizerBuilder,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainerBuilder},
    },
    normalizers::NormalizerWrapper,
    pre_tokenizers::byte_level::ByteLevel,
};

use super::{Document, Split};
use crate::TrainError;

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
    let smallest = 257;
    if vocab_size < smallest {
        return Err(TrainError::Tokenizer(format!(
            "a vocabulary of {vocab_size} is below the {smallest} of bytes and <eod>"
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
    let texts = documents.iter().filter(|document| document.split() == Split::Train);
    let mut trainer = TrainerWrapper::from(trainer);
    tokenizer.train(&mut trainer, texts.map(|document| document.text.as_str())).map_err(failed)?;
    Ok(tokenizer)
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
    /// Tokenizes every document and joins them by split.
    ///
    /// # Errors
    ///
    /// If the tokenizer has no `<eod>` or fails on a document.
    pub fn new(documents: &[Document], tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        let failed = |error: tokenizers::Error| TrainError::Tokenizer(error.to_string());
        let missing = || TrainError::Tokenizer(format!("it has no {END_OF_DOCUMENT} token"));
        let eod = tokenizer.token_to_id(END_OF_DOCUMENT).ok_or_else(missing)?;
        let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
        let encoded = tokenizer.encode_batch_fast(texts, false).map_err(failed)?;
        let mut streams = Self { train: Vec::new(), validation: Vec::new(), eod };
        for (document, encoding) in documents.iter().zip(encoded) {
            let stream = match document.split() {
                Split::Train => &mut streams.train,
                Split::Validation => &mut streams.validation,
            };
            stream.extend_from_slice(encoding.get_ids());
            stream.push(eod);
        }
        Ok(streams)
    }

    /// Reads what [`save`](Self::save) wrote into `directory`.
    ///
    /// # Errors
    ///
    /// A file that is missing or is not a whole number of tokens.
    pub fn load(directory: &Path, eod: u32) -> Result<Self, TrainError> {
        let read = |name: &str| {
            let path = directory.join(name);
            let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
            let (tokens, rest) = bytes.as_chunks::<4>();
            if !rest.is_empty() {
                return Err(TrainError::Corpus(format!(
                    "{} is not a whole number of tokens",
                    path.display()
                )));
            }
            Ok(tokens.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
        };
        Ok(Self { train: read("train.tokens")?, validation: read("validation.tokens")?, eod })
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
        Ok([size("train.tokens")?, size("validation.tokens")?])
    }

    /// Writes `train.tokens` and `validation.tokens`: little-endian 32-bit ids.
    ///
    /// # Errors
    ///
    /// If a file cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), TrainError> {
        for (name, tokens) in
            [("train.tokens", &self.train), ("validation.tokens", &self.validation)]
        {
            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            yuan_model::files::write_whole(&directory.join(name), &bytes)?;
        }
        Ok(())
    }
}
