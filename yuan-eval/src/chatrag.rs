//! ChatRAG-Bench (Liu et al., arXiv 2401.10225): questions in conversations about documents.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    EvalError, Gold, Item, Message, Profile,
    convfinqa::Calculation,
    gold::REFUSAL,
    read::{self, text_of},
};

/// Sets and their files.
pub(crate) const SETS: [(&str, &str); 12] = [
    ("doc2dial", "doc2dial/test.json"),
    ("quac", "quac/test.json"),
    ("qrecc", "qrecc/test.json"),
    ("coqa", "coqa/dev.json"),
    ("doqa_cooking", "doqa/test_cooking.json"),
    ("doqa_travel", "doqa/test_travel.json"),
    ("doqa_movies", "doqa/test_movies.json"),
    ("convfinqa", "convfinqa/dev.json"),
    ("sqa", "sqa/test.json"),
    ("topiocqa", "topiocqa/dev.json"),
    ("hybridial", "hybridial/test.json"),
    ("inscit", "inscit/dev.json"),
];

/// Messages that a prompt keeps.
const LAST: usize = 7;

const SYSTEM: &str = "System: This is a chat between a user and an artificial intelligence assistant. \
    The assistant gives helpful, detailed, and polite answers to the user's questions based on the \
    context. The assistant should also indicate when the answer cannot be found in the context.";

#[derive(Deserialize)]
struct Record {
    messages: Vec<Message>,
    #[serde(default)]
    ctxs: Vec<Context>,
    answers: Option<Value>,
    answer: Option<Value>,
    exe_answer: Option<Value>,
}

#[derive(Deserialize)]
struct Context {
    title: Option<String>,
    text: String,
}

pub(crate) fn for_each(
    data: &Path,
    profile: Profile,
    show: &mut dyn FnMut(Item) -> Result<(), EvalError>,
) -> Result<(), EvalError> {
    let files = SETS.map(|(set, file)| (set, file.to_owned()));
    read::for_each_item("ChatRAG", data, &files, show, |at, record: Record| {
        let (set, _) = SETS[at];
        let prompt = prompt(set, &record, profile)?;
        Ok((prompt, Vec::new(), gold(set, &record, profile)?))
    })
}

/// Where the instruction of a set stands.
enum Turn {
    FirstOfUser,
    Last,
}

fn instruction(set: &str, profile: Profile) -> (Turn, &'static str) {
    use Profile::{Authors, Yuan};
    use Turn::{FirstOfUser, Last};
    match (set, profile) {
        ("coqa", Authors) => (
            Last,
            "Answer the following question with a short span. The answer needs to be just in a few \
             words. ",
        ),
        ("coqa", Yuan) => (Last, "Answer the following questions in just a few words. "),
        ("topiocqa", Authors) => (
            Last,
            "Answer the following question with a short span, or a full and complete answer. ",
        ),
        ("topiocqa", Yuan) => {
            (Last, "Answer the following questions in JUST a few words or one sentence. ")
        }
        ("sqa", Authors) => (Last, "Answer the following question with one or a list of items. "),
        ("sqa", Yuan) => (
            Last,
            "Answer the following questions with one or a list of entities. Do not give a detailed \
             explanation. Answer needs to be as short as possible. ",
        ),
        ("convfinqa", Yuan) => (
            FirstOfUser,
            "Answer the following questions with just a number from context or just the math \
             arithmetic using +, -, * or /. ",
        ),
        (_, Authors) => (FirstOfUser, "Please give a full and complete answer for the question. "),
        (_, Yuan) => (FirstOfUser, "Please give an answer in just one sentence. "),
    }
}

fn contexts(set: &str, profile: Profile) -> usize {
    match (profile, set) {
        (Profile::Authors, _) | (_, "doc2dial" | "topiocqa" | "hybridial" | "inscit") => 5,
        (Profile::Yuan, "qrecc") => 3,
        (Profile::Yuan, _) => 1,
    }
}

fn prompt(set: &str, record: &Record, profile: Profile) -> Result<String, &'static str> {
    let mut turns = record.messages[record.messages.len().saturating_sub(LAST)..].to_vec();
    if turns.last().is_none_or(|turn| turn.role != "user") {
        return Err("its conversation does not end with a question");
    }
    let (turn, instruction) = instruction(set, profile);
    let addressed = match turn {
        Turn::FirstOfUser => turns.iter_mut().find(|turn| turn.role == "user"),
        Turn::Last => turns.last_mut(),
    };
    if let Some(turn) = addressed {
        turn.content.insert_str(0, instruction);
    }
    let mut parts = vec![SYSTEM.to_owned()];
    for Context { title, text } in record.ctxs.iter().take(contexts(set, profile)) {
        let title = title.as_deref().unwrap_or_default();
        parts.push(format!("title: {title}, source: {text}"));
    }
    for Message { role, content } in turns {
        let speaker = if role == "user" { "User" } else { "Assistant" };
        parts.push(format!("{speaker}: {content}"));
    }
    let end = if profile == Profile::Yuan { "Assistant:\n\n" } else { "Assistant:" };
    parts.push(end.into());
    Ok(parts.join("\n\n"))
}

fn gold(set: &str, record: &Record, profile: Profile) -> Result<Gold, &'static str> {
    let mut references = match (&record.answers, &record.answer) {
        (Some(Value::Array(values)), _) | (None, Some(Value::Array(values))) => {
            values.iter().map(text_of).collect()
        }
        (Some(value), _) | (None, Some(value)) => vec![text_of(value)],
        (None, None) => return Err("it has neither `answers` nor `answer`"),
    };
    if set == "convfinqa" {
        return Ok(Gold::Calculation(Calculation {
            result: record.exe_answer.clone().ok_or("it has no `exe_answer`")?,
            formula: references.into_iter().next().ok_or("its `answers` are empty")?,
            question: record.messages.last().map(|turn| turn.content.clone()).unwrap_or_default(),
        }));
    }
    // In Yuan's program none of the special rules takes effect.
    let has_rules = profile == Profile::Authors;
    if has_rules && set == "inscit" {
        references.retain(|reference| reference != REFUSAL);
    }
    if references.iter().all(|reference| reference.trim().is_empty()) {
        return Err("none of its answers has a word");
    }
    let knows_refusals = has_rules && (set == "quac" || set.starts_with("doqa"));
    Ok(Gold::Words { references, knows_refusals })
}
