//! Text of prompts to tokens, and tokens of answers to text.

use yuan_model::text::Tokenizer;
use yuan_train::TrainError;

/// How text becomes tokens of a prompt, and tokens of an answer text.
#[derive(Debug, Clone)]
pub struct PromptTokenizer {
    tokenizer: Tokenizer,
    stop_tokens: Vec<u32>,
    is_chat: bool,
}

impl PromptTokenizer {
    /// By the tokenizer of a model, whose answers end with any of `stop_tokens`.
    ///
    /// # Errors
    ///
    /// If prompts are turns of a conversation, and the model has no chat template or this build knows
    /// none.
    pub fn new(
        tokenizer: Tokenizer,
        stop_tokens: Vec<u32>,
        is_chat: bool,
    ) -> Result<Self, TrainError> {
        let made = Self { tokenizer, stop_tokens, is_chat };
        if is_chat {
            made.prompt("")?;
        }
        Ok(made)
    }

    /// Tokens that end an answer.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// The tokens of a prompt.
    pub(crate) fn prompt(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        if !self.is_chat {
            return Ok(self.tokenizer.encode(text, false)?);
        }
        #[cfg(feature = "chat")]
        return Ok(self.tokenizer.encode_chat(&[yuan_model::text::Message::new("user", text)])?);
        #[cfg(not(feature = "chat"))]
        Err(yuan_data::DataError::Setting(
            "prompts as turns of a conversation need the feature `chat`".into(),
        )
        .into())
    }

    /// The text of an answer to a prompt.
    pub(crate) fn answer(&self, prompt: &[u32], tokens: &[u32]) -> Result<String, TrainError> {
        Ok(self.tokenizer.decode_after(prompt, tokens)?)
    }
}
