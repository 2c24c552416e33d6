//! From conversations to tokens and what of them is learnt.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_data::{DataError, JsonLines, Skipped, SkippedFiles, Split, TokenType, TokenWriter};
use yuan_files::write_whole;
use yuan_model::{
    masks,
    text::{ConversationTokens, Message, Tokenizer},
};

use super::{DataKind, DataSet, DataSets, PackedRows, WrittenFiles};
use crate::TrainError;

/// Files of conversations, and how they become tokens.
///
/// A line is an object with `messages`, a list of `{"role": …, "content": …}`, or with a `prompt`
/// and a `response`.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatFiles {
    /// `.jsonl` files, which may be compressed (`.gz`, `.zst`).
    pub files: Vec<PathBuf>,
    /// Share of the conversations that validates.
    pub validation: f64,
    /// Answers are found by Yuan's own rule ([`masks::answer_mask`]): they begin behind this token
    /// and end with the end of the document. Without it, the template tells.
    pub separator: Option<String>,
}

/// What came of files of conversations.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConversationCounts {
    /// Conversations to train on, and to validate with.
    pub conversations: [u64; 2],
    /// Their tokens.
    pub tokens: [u64; 2],
    /// Tokens that are learnt.
    pub learnt: [u64; 2],
    /// Conversations that are longer than a row, which are left out.
    pub longer_than_a_row: u64,
    /// Lines that are no conversation, or have no answer.
    pub skipped: SkippedFiles,
}

impl ConversationCounts {
    const FILE: &str = "conversations.json";

    /// Reads what was counted when a run was made.
    ///
    /// # Errors
    ///
    /// If the run has no conversations, or the file is damaged.
    pub fn load(run_dir: &Path) -> Result<Self, TrainError> {
        let path = run_dir.join(DataSets::DIRECTORY).join(Self::FILE);
        let text = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
        serde_json::from_slice(&text)
            .map_err(|error| TrainError::Damaged { path, reason: error.to_string() })
    }
}

/// Conversations on their way to the files that [`PackedRows`] reads.
#[derive(Debug)]
pub(crate) struct Conversations<'a> {
    tokenizer: &'a Tokenizer,
    eod: u32,
    separator: Option<u32>,
    row_len: usize,
    /// Tokens and masks of both splits.
    writers: [[TokenWriter; 2]; 2],
    counts: ConversationCounts,
}

impl<'a> Conversations<'a> {
    /// Writes all conversations into a directory of a run.
    ///
    /// # Errors
    ///
    /// If a file cannot be read or written, the model has no template, or no line is a
    /// conversation.
    pub fn write(
        run_dir: &Path,
        files: &ChatFiles,
        tokenizer: &'a Tokenizer,
        eod: u32,
        row_len: usize,
    ) -> Result<DataSets, TrainError> {
        let directory = run_dir.join(DataSets::DIRECTORY);
        std::fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
        let kind = TokenType::for_vocabulary(tokenizer.vocab_size());
        let writers = |split: &str| {
            let [tokens, learnt] = PackedRows::names(&directory, split);
            let tokens = TokenWriter::create(&tokens, kind)?;
            Ok::<_, DataError>([tokens, TokenWriter::create(&learnt, TokenType::U8)?])
        };
        let writers = [writers("train")?, writers("validation")?];
        let separator = match &files.separator {
            None => None,
            Some(token) => Some(tokenizer.token_id(token).ok_or_else(|| {
                DataError::Tokenizer(format!("it has no {token} token to find answers by"))
            })?),
        };
        let counts = ConversationCounts::default();
        let mut conversations = Self { tokenizer, eod, separator, row_len, writers, counts };
        for file in &files.files {
            conversations.add_file(file, files.validation)?;
        }
        let Self { writers, counts, .. } = conversations;
        if counts.conversations[0] == 0 || counts.conversations[1] == 0 {
            let [train, validation] = counts.conversations;
            let skipped =
                counts.skipped.summary().map_or_else(String::new, |text| format!("; {text}"));
            let reason = format!(
                "{train} conversations to train on and {validation} to validate with are too few: \
                 bring more, or keep a larger share to validate with (--validation){skipped}"
            );
            return Err(DataError::NoText(reason).into());
        }
        let mut written = WrittenFiles::default();
        for (split, [tokens, learnt]) in ["train", "validation"].into_iter().zip(writers) {
            let [name, mask] = PackedRows::names(Path::new(""), split);
            written.add_tokens(&name.to_string_lossy(), tokens.finish()?);
            written.add_tokens(&mask.to_string_lossy(), learnt.finish()?);
        }
        let set = DataSet {
            name: "conversations".into(),
            weight: 1.0,
            path: DataSets::DIRECTORY.into(),
            kind: DataKind::Conversations,
            tokens: counts.tokens,
            checksum: written.of("train.bin"),
            files: written,
        };
        let text = serde_json::to_string_pretty(&counts).expect("numbers are plain data");
        write_whole(&directory.join(ConversationCounts::FILE), text.as_bytes())?;
        Ok(DataSets { sets: vec![set] })
    }

    fn add_file(&mut self, path: &Path, validation: f64) -> Result<(), TrainError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for line in JsonLines::open(path)? {
            let (number, value) = line?;
            let skip = |reason: &str| {
                Skipped::record(name.clone(), reason.into(), format!("line {number}"))
            };
            let messages = match messages_of(&value) {
                Ok(messages) => messages,
                Err(reason) => {
                    self.counts.skipped.add(skip(reason), 1);
                    continue;
                }
            };
            let encoded = match self.separator {
                None => self.tokenizer.encode_conversation(&messages),
                Some(separator) => self
                    .tokenizer
                    .encode_messages(&messages)
                    .map(|tokens| behind_separators(tokens, self.eod, separator)),
            };
            let ConversationTokens { tokens, learnt } =
                encoded.map_err(|error| TrainError::Damaged {
                    path: path.to_path_buf(),
                    reason: format!("line {number}: {error}"),
                })?;
            // What is predicted first is the second token.
            if !learnt.iter().skip(1).any(|learnt| *learnt) {
                self.counts.skipped.add(skip("no answer to learn"), 1);
                continue;
            }
            let split = match Split::of(&format!("{name}:{number}"), validation) {
                Split::Train => 0,
                Split::Validation => 1,
            };
            let mask: Vec<u32> = learnt.iter().map(|&learnt| learnt.into()).collect();
            let [token_writer, mask_writer] = &mut self.writers[split];
            for (writer, numbers) in [(token_writer, &tokens), (mask_writer, &mask)] {
                writer.push(numbers)?;
                writer.end_document()?;
            }
            self.counts.longer_than_a_row += u64::from(tokens.len() > self.row_len + 1);
            self.counts.conversations[split] += 1;
            self.counts.tokens[split] += tokens.len() as u64;
            self.counts.learnt[split] += mask.iter().map(|&learnt| u64::from(learnt)).sum::<u64>();
        }
        Ok(())
    }
}

/// What of a conversation is learnt by Yuan's own rule; nothing where an answer has no separator
/// before it, or no end.
fn behind_separators(tokens: Vec<u32>, eod: u32, separator: u32) -> ConversationTokens {
    let mut learnt = vec![false; tokens.len()];
    let labels = tokens.get(1..).unwrap_or_default();
    let count = |wanted| labels.iter().filter(|&&token| token == wanted).count();
    let (ends, separators) = (count(eod), count(separator));
    let is_clear = separators > 0 && (ends == separators || (ends == 0 && separators == 1));
    if is_clear && let Ok(mask) = masks::answer_mask(labels, eod, separator) {
        learnt[1..].copy_from_slice(&mask);
    }
    ConversationTokens { tokens, learnt }
}

/// The messages of a line, or why it has none.
fn messages_of(value: &Value) -> Result<Vec<Message>, &'static str> {
    if ["image", "images"].iter().any(|key| value.get(key).is_some()) {
        return Err("lines with images, which the first line of the file has none of");
    }
    let text = |value: &Value| value.as_str().map(str::to_owned);
    if let (Some(prompt), Some(response)) = (text(&value["prompt"]), text(&value["response"])) {
        return Ok(vec![Message::new("user", prompt), Message::new("assistant", response)]);
    }
    let messages = value["messages"].as_array();
    let messages = messages.ok_or("lines without `messages`, or `prompt` and `response`")?;
    let message =
        |value: &Value| Some(Message::new(text(&value["role"])?, text(&value["content"])?));
    let messages: Option<Vec<Message>> = messages.iter().map(message).collect();
    let messages = messages.ok_or("messages without a `role` and a `content`")?;
    match messages.iter().any(|message| message.role == "assistant") {
        true => Ok(messages),
        false => Err("no answer of an assistant"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_begin_behind_separators_or_nothing_is_learnt() {
        let (eod, sep) = (0, 1);
        let learnt = |tokens: &[u32]| behind_separators(tokens.to_vec(), eod, sep).learnt;
        assert_eq!(learnt(&[5, 6, 1, 7, 0]), [false, false, false, true, true]);
        let two = [5, 1, 7, 0, 6, 1, 8, 0];
        assert_eq!(learnt(&two), [false, false, true, true, false, false, true, true]);
        for unclear in [&[5, 6, 7][..], &[5, 6, 7, 0], &[5, 1, 6, 1, 7], &[]] {
            assert!(!learnt(unclear).contains(&true), "{unclear:?}");
        }
    }

    #[test]
    fn lines_are_conversations_or_say_why_not() {
        let pair = messages_of(&json!({"prompt": "2 + 2?", "response": "4"})).unwrap();
        assert_eq!(pair, [Message::new("user", "2 + 2?"), Message::new("assistant", "4")]);
        let turns = json!({"messages": [{"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"}], "id": 7});
        assert_eq!(messages_of(&turns).unwrap().len(), 2);
        for (line, reason) in [
            (json!({"text": "x"}), "lines without `messages`, or `prompt` and `response`"),
            (json!({"messages": [{"role": "user"}]}), "messages without a `role` and a `content`"),
            (json!({"messages": [{"role": "user", "content": "Hi"}]}), "no answer of an assistant"),
            (json!([1, 2]), "lines without `messages`, or `prompt` and `response`"),
        ] {
            assert_eq!(messages_of(&line).unwrap_err(), reason);
        }
    }
}
