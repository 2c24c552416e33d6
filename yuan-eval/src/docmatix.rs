//! Docmatix (Laurençon et al. 2024) as Yuan's authors cut it: 500 questions about two to four pages.
//!
//! Their scorer is not published. The F1 over words is what the published numbers look like; the share
//! of answers above 0.8, as in their reward for this task, stands beside it.

use std::path::Path;

use serde::Deserialize;

use crate::{EvalError, Gold, Item, read};

const FILE: &str = "docmatrix_questions.jsonl";

#[derive(Deserialize)]
struct Record {
    question: String,
    answer: String,
    imagepath: Vec<String>,
}

pub(crate) fn for_each(
    data: &Path,
    show: &mut dyn FnMut(Item) -> Result<(), EvalError>,
) -> Result<(), EvalError> {
    let files = [("docmatix", FILE.to_owned())];
    read::for_each_item("Docmatix", data, &files, show, |_, record: Record| {
        let images = record.imagepath.iter().map(|image| data.join(image)).collect();
        Ok((record.question, images, Gold::Sentence(record.answer)))
    })
}
