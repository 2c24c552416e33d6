//! Questions about images, as lines and members of archives hold them.

use serde_json::Value;

use super::image::ImagePlace;

/// A line or a member of an archive, and what could be made of it.
pub(super) struct Found {
    /// Where in its file it is: `line 3`.
    pub place: String,
    pub read: Result<Sample, String>,
}

/// A question about images, and its answer.
pub(super) struct Sample {
    /// At least one.
    pub images: Vec<ImagePlace>,
    pub question: String,
    pub answer: String,
}

/// The paths under `image` or `images`.
pub(super) fn image_paths(value: &Value) -> Result<Vec<&str>, String> {
    let paths: Option<Vec<&str>> = match (&value["image"], &value["images"]) {
        (Value::String(path), Value::Null) => Some(vec![path.as_str()]),
        (Value::Null, Value::Array(paths)) => paths.iter().map(Value::as_str).collect(),
        (Value::Null, Value::Null) => None,
        (_, Value::Null) => return Err("lines whose `image` is no path".into()),
        (Value::Null, _) => return Err("lines whose `images` are no list of paths".into()),
        _ => return Err("lines with `image` and `images`: leave one of them out".into()),
    };
    let none = || "lines without `image`, a path, or `images`, a list of paths".to_owned();
    paths.filter(|paths| !paths.is_empty()).ok_or_else(none)
}

/// Question and answer of an object, or why it has none.
pub(super) fn question_of(value: &Value) -> Result<(String, String), &'static str> {
    let pair = (value["prompt"].as_str(), value["response"].as_str());
    let (question, answer) = match (pair, value["messages"].as_array().map(Vec::as_slice)) {
        ((Some(question), Some(answer)), _) => (question, answer),
        (_, Some([question, answer])) => {
            let is_pair = question["role"] == "user" && answer["role"] == "assistant";
            let texts = (question["content"].as_str(), answer["content"].as_str());
            match texts {
                (Some(question), Some(answer)) if is_pair => (question, answer),
                _ => return Err("messages that are no question of a user and its answer"),
            }
        }
        (_, Some(_)) => return Err("messages that are more than one question and its answer"),
        _ => return Err("lines without `prompt` and `response`, or `messages`"),
    };
    match answer.is_empty() {
        true => Err("no answer to learn"),
        false => Ok((question.to_owned(), answer.to_owned())),
    }
}
