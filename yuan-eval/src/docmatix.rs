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
    let path = data.join(FILE);
    if !path.is_file() {
        return Err(EvalError::NoData {
            path: data.to_path_buf(),
            benchmark: "Docmatix",
            expected: FILE.into(),
        });
    }
    let mut number = 0;
    read::for_each_value(&path, |record: Record| {
        let id = format!("docmatix:{number}");
        number += 1;
        let images = record.imagepath.iter().map(|image| data.join(image)).collect();
        let gold = Gold::Sentence(record.answer);
        show(Item { id, set: "docmatix".into(), prompt: record.question, images, gold })
    })
}
