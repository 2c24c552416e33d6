//! A conversation as tokens, and which of them are the assistant's.

use std::ops::Range;

use super::{ChatTemplate, Message, TextError, Tokenizer, failed};

/// The tokens of a whole conversation, and which of them a model learns to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConversationTokens {
    /// What the template makes of the conversation.
    pub tokens: Vec<u32>,
    /// Whether a token is the assistant's: its answers, and what ends each of them.
    pub learnt: Vec<bool>,
}

impl Tokenizer {
    /// The tokens of a conversation as the model's template writes it, and which are learnt.
    ///
    /// A template that marks what the assistant says (`{% generation %}`) decides. With any other
    /// one, an answer is what the template adds to the conversation before it when that is ready
    /// for an answer: the answer, and what ends it. A token that lies in an answer with any of its
    /// characters belongs to it, as in the `transformers` library.
    ///
    /// # Errors
    ///
    /// There is no chat template, it refuses the messages or writes the beginning of a conversation
    /// otherwise when it goes on, or the tokenizer fails.
    pub fn encode_conversation(
        &self,
        messages: &[Message],
    ) -> Result<ConversationTokens, TextError> {
        let template = self.template()?;
        let rendered = template.render(messages, &self.special_tokens, false)?;
        let answers = match rendered.assistant.is_empty() {
            false => rendered.assistant,
            true => self.answers(template, messages, &rendered.text)?,
        };
        // The template writes the special tokens itself.
        let encoding = self.tokenizer.encode(rendered.text.as_str(), false).map_err(failed)?;
        let mut learnt = Vec::with_capacity(encoding.len());
        for &(begin, end) in encoding.get_offsets() {
            // A tokenizer may say that a token of spaces alone is empty, where it begins.
            let end = end.max(begin + 1);
            let is_in = |answer: &Range<usize>| begin < answer.end && end > answer.start;
            learnt.push(answers.iter().any(is_in));
        }
        Ok(ConversationTokens { tokens: encoding.get_ids().to_vec(), learnt })
    }

    /// The tokens of a whole conversation, whatever of it is learnt.
    ///
    /// # Errors
    ///
    /// There is no chat template, it refuses the messages, or the tokenizer fails.
    pub fn encode_messages(&self, messages: &[Message]) -> Result<Vec<u32>, TextError> {
        let rendered = self.template()?.render(messages, &self.special_tokens, false)?;
        self.encode(&rendered.text, false)
    }

    /// What the template writes for each answer, in bytes of `text`.
    fn answers(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        text: &str,
    ) -> Result<Vec<Range<usize>>, TextError> {
        let mut answers = Vec::new();
        for (at, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let before = template.render(&messages[..at], &self.special_tokens, true)?.text;
            let after = template.render(&messages[..=at], &self.special_tokens, false)?.text;
            if !text.starts_with(&after) || !after.starts_with(&before) {
                let reason = "it writes the beginning of a conversation otherwise when it goes on, so \
                              that nobody can tell what the assistant says: mark it with \
                              {% generation %}";
                return Err(TextError::Template(reason.into()));
            }
            answers.push(before.len()..after.len());
        }
        Ok(answers)
    }
}
