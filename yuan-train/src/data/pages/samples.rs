//! Lines and members of archives, and what questions they ask about which images.

use std::path::Path;

use serde_json::Value;
use yuan_data::JsonLines;

use super::{image::ImagePlace, tar};
use crate::TrainError;

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

/// Samples that are shown together.
const AT_ONCE: usize = 256;

/// Shows the samples of a file, some at a time, in order.
pub(super) fn for_each(
    path: &Path,
    mut show: impl FnMut(Vec<Found>) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut some = Vec::new();
    let mut collect = |found| {
        some.push(found);
        match some.len() == AT_ONCE {
            true => show(std::mem::take(&mut some)),
            false => Ok(()),
        }
    };
    match tar::is_tar(path) {
        true => tar::for_each_sample(path, &mut collect)?,
        false => for_each_line(path, &mut collect)?,
    }
    show(some)
}

fn for_each_line(
    path: &Path,
    show: &mut impl FnMut(Found) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let above = path.parent().unwrap_or(Path::new(""));
    for line in JsonLines::open(path)? {
        let (number, value) = line?;
        let read = question_of(&value).map_err(str::to_owned).and_then(|(question, answer)| {
            let paths = image_paths(&value)?.into_iter();
            let images = paths.map(|path| ImagePlace::of_file(above.join(path))).collect();
            Ok(Sample { images, question, answer })
        });
        show(Found { place: format!("line {number}"), read })?;
    }
    Ok(())
}

/// The paths under `image` or `images`.
fn image_paths(value: &Value) -> Result<Vec<&str>, String> {
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
