//! From tokens to text as they come.

use tokenizers::Tokenizer;

use super::file::TextError;

/// Turns tokens into text as they come; some give nothing until the next one completes a letter.
///
/// All the text together is what the tokenizer makes of all tokens at once, those of the prompt
/// included, less the prompt's: a decoder may put a space before a word that it would leave out
/// before the first one.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Some tokens of the prompt, and those that came.
    tokens: Vec<u32>,
    /// Where the tokens begin that are decoded together with new ones …
    context: usize,
    /// … and where those begin whose text has not been given yet.
    new: usize,
}

/// Tokens of the prompt that decoders look back at, with some to spare.
const LOOK_BACK: usize = 16;

/// Tokens that a letter may have; what is not complete after so many is none.
const MOST_PENDING: usize = 16;

/// What a decoder writes in place of a letter that is not complete.
const INCOMPLETE: char = '\u{fffd}';

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let tokens = prompt[prompt.len().saturating_sub(LOOK_BACK)..].to_vec();
        let new = tokens.len();
        Self { tokenizer, tokens, context: 0, new }
    }

    /// The text that a token adds; it may be empty.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn step(&mut self, token: u32) -> Result<String, TextError> {
        self.tokens.push(token);
        let text = self.pending()?;
        let is_incomplete = text.is_empty() || text.ends_with(INCOMPLETE);
        if is_incomplete && self.tokens.len() - self.new < MOST_PENDING {
            return Ok(String::new());
        }
        (self.context, self.new) = (self.new, self.tokens.len());
        Ok(text)
    }

    /// What is left when no token follows: of a letter that is not complete, the sign for that.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn finish(self) -> Result<String, TextError> {
        self.pending()
    }

    /// The text of the tokens whose text has not been given.
    fn pending(&self) -> Result<String, TextError> {
        let decode = |tokens: &[u32]| {
            let text = self.tokenizer.decode(tokens, true);
            text.map_err(|error| TextError::Tokenizer(error.to_string()))
        };
        let before = decode(&self.tokens[self.context..self.new])?;
        let mut all = decode(&self.tokens[self.context..])?;
        // Usually all of `before`; a prompt may end in the middle of a letter, which the tokens
        // that came complete.
        let same = before.chars().zip(all.chars()).take_while(|(before, all)| before == all);
        let common = same.map(|(letter, _)| letter.len_utf8()).sum();
        Ok(all.split_off(common))
    }
}
