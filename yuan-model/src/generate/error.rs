//! What can go wrong when text is generated, each in one sentence.

use crate::ModelError;

/// Why nothing could be generated.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A prompt has no token to continue.
    #[error("prompt {sequence} is empty")]
    EmptyPrompt {
        /// Index of the prompt.
        sequence: usize,
    },
    /// A prompt has a token that the model does not know.
    #[error("prompt {sequence} has the token {token}, but the vocabulary ends at {vocab_size}")]
    UnknownToken {
        /// Index of the prompt.
        sequence: usize,
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// The images of a prompt do not fit it, or the model.
    #[error("prompt {sequence}: {error}")]
    Images {
        /// Index of the prompt.
        sequence: usize,
        /// What does not fit.
        error: ModelError,
    },
    /// A number of the sampling is out of its range.
    #[error("{name} = {value} is out of range: expected {expected}")]
    Sampling {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// Prompt and continuation would be longer than positions are counted.
    #[error("max_new_tokens is too large: with the prompt it makes {tokens} tokens of at most 2³¹")]
    TooLong {
        /// Tokens of the longest prompt and its continuation.
        tokens: usize,
    },
    /// The model's scores are no numbers.
    #[error(
        "the scores for token {position} of sequence {sequence} are not finite: the weights are damaged"
    )]
    NotFinite {
        /// Index of the prompt.
        sequence: usize,
        /// Position of the token in the continuation.
        position: usize,
    },
    /// The device failed to compute or to hand over its results.
    #[error("the device failed: {0}")]
    Device(String),
}
