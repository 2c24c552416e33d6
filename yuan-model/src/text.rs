//! Text to tokens and back, as the files beside published weights say: `tokenizer.json`,
//! `tokenizer_config.json`, `generation_config.json` and a chat template.

use std::{collections::BTreeMap, fs, panic::catch_unwind, path::Path};

use serde_json::Value;

#[cfg(feature = "chat")]
use crate::vision::ImageLayout;
use crate::{YuanConfig, storage::refuse_pointer};
use yuan_files::FileError;

#[cfg(feature = "chat")]
mod chat;
#[cfg(feature = "chat")]
mod conversation;
mod file;
mod stream;

#[cfg(feature = "chat")]
pub use chat::{ChatTemplate, Message, Rendered};
#[cfg(feature = "chat")]
pub use conversation::ConversationTokens;
pub use file::TextError;
use file::json;
pub use stream::TextStream;

/// The tokenizer of a model directory.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    /// `bos_token`, `eos_token`, … of `tokenizer_config.json`.
    special_tokens: BTreeMap<String, String>,
    /// `eos_token_id` of `generation_config.json`.
    generation_stops: Vec<u32>,
    #[cfg(feature = "chat")]
    chat_template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and what there is of the other files.
    ///
    /// # Errors
    ///
    /// No `tokenizer.json`, or a file that is not what its name says.
    pub fn load(directory: &Path) -> Result<Self, TextError> {
        let path = directory.join("tokenizer.json");
        if let Err(error) = refuse_pointer(&path) {
            return Err(TextError::Pointer(error.to_string()));
        }
        let bytes = fs::read(&path).map_err(FileError::of("read", &path))?;
        let tokenizer =
            tokenizer_of(&bytes).map_err(|reason| TextError::Format { path, reason })?;
        let config = json(&directory.join("tokenizer_config.json"))?.unwrap_or_default();
        let generation = json(&directory.join("generation_config.json"))?.unwrap_or_default();
        let special_tokens = config.as_object().into_iter().flatten().filter_map(|(key, value)| {
            let content = value.as_str().or_else(|| value.get("content")?.as_str())?;
            key.ends_with("_token").then(|| (key.clone(), content.to_owned()))
        });
        let generation_stops = match &generation["eos_token_id"] {
            Value::Array(ids) => ids.iter().filter_map(token_id).collect(),
            id => token_id(id).into_iter().collect(),
        };
        Ok(Self {
            tokenizer,
            special_tokens: special_tokens.collect(),
            generation_stops,
            #[cfg(feature = "chat")]
            chat_template: ChatTemplate::find(directory, &config)?,
        })
    }

    /// The tokens of a text, with those that the tokenizer puts around it if `add_special_tokens`.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.tokenizer.encode_fast(text, add_special_tokens).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a text in which nothing is a special token, whatever it spells.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut tokenizer = self.tokenizer.clone();
        tokenizer.set_encode_special_tokens(true);
        let encoding = tokenizer.encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens; special ones have none.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TextError> {
        self.tokenizer.decode(tokens, true).map_err(failed)
    }

    /// A stream from the tokens that follow `prompt` to text: call `step` with each, and `finish`
    /// at the end.
    pub fn stream(&self, prompt: &[u32]) -> TextStream<'_> {
        TextStream::new(&self.tokenizer, prompt)
    }

    /// The text of tokens that follow others.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn decode_after(&self, prompt: &[u32], tokens: &[u32]) -> Result<String, TextError> {
        let (mut text, mut stream) = (String::new(), self.stream(prompt));
        for &token in tokens {
            text.push_str(&stream.step(token)?);
        }
        Ok(text + &stream.finish()?)
    }

    /// Id of a token by its text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Text of a token by its id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Tokens that end a text: `eos` and `eod` of the model's configuration, and what the
    /// tokenizer's files say.
    pub fn stop_tokens(&self, config: &YuanConfig) -> Vec<u32> {
        let named = self.special_tokens.get("eos_token").and_then(|token| self.token_id(token));
        let configured = config.tokens.eos.iter().copied().chain(config.tokens.eod).chain(named);
        let mut stops: Vec<u32> = configured.chain(self.generation_stops.iter().copied()).collect();
        stops.sort_unstable();
        stops.dedup();
        stops
    }
}

#[cfg(feature = "chat")]
impl Tokenizer {
    /// The chat template, if the directory has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The tokens of a conversation, ready for the model's answer.
    ///
    /// # Errors
    ///
    /// There is no chat template, it refuses the messages, or the tokenizer fails.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, TextError> {
        let template = self.template()?;
        // The template writes the special tokens itself.
        self.encode(&template.render(messages, &self.special_tokens, true)?.text, false)
    }

    /// The tokens of a conversation with images, which become `rows` rows of the model each, in the
    /// order of the [messages that have them](Message::with_images).
    ///
    /// A template that knows parts of a message decides where an image goes. With any other one it
    /// stands before the text of its message.
    ///
    /// # Errors
    ///
    /// As [`encode_chat`](Self::encode_chat), and if the messages have more or fewer images.
    pub fn encode_chat_with_images(
        &self,
        messages: &[Message],
        layout: &ImageLayout,
        rows: &[usize],
    ) -> Result<Vec<u32>, TextError> {
        let with_parts = self.encode_chat(messages);
        if let Ok(tokens) = with_parts
            && let Ok(tokens) = layout.with_room(&tokens, rows)
        {
            return Ok(tokens);
        }
        let [.., start, end] = ImageLayout::TOKENS;
        let marked = |message: &Message| {
            let marks = format!("{start}{end}").repeat(message.images);
            Message::new(message.role.clone(), marks + &message.content)
        };
        let marked: Vec<Message> = messages.iter().map(marked).collect();
        let tokens = self.encode_chat(&marked)?;
        layout.with_room(&tokens, rows).map_err(|error| TextError::Template(error.to_string()))
    }
}

#[cfg(feature = "chat")]
impl Tokenizer {
    fn template(&self) -> Result<&ChatTemplate, TextError> {
        self.chat_template.as_ref().ok_or_else(|| {
            let reason = "the model has none, so it cannot chat: give it a text to continue";
            TextError::Template(reason.into())
        })
    }
}

/// The tokenizer of a `tokenizer.json`.
fn tokenizer_of(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    // The library takes valid JSON for granted in places, and panics where it is none.
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|error| error.to_string())?;
    let read = || tokenizers::Tokenizer::from_bytes(bytes);
    match catch_unwind(read) {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(_) => Err("it is no tokenizer".into()),
    }
}

fn failed(error: tokenizers::Error) -> TextError {
    TextError::Tokenizer(error.to_string())
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
