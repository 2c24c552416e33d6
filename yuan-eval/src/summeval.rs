//! Seven sets of texts and their summaries, which Yuan's authors call `SummEval`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{EvalError, Gold, Item, read};

/// Sets, the field of the text and the field of its summary.
pub(crate) const SETS: [(&str, &str, &str); 7] = [
    ("big_patent_10_percent", "description", "abstract"),
    ("billsum", "text", "summary"),
    ("cnn_dailymail", "article", "highlights"),
    ("pubmed-summarization", "article", "abstract"),
    ("samsum", "dialogue", "summary"),
    ("wikihow", "text", "summary"),
    ("xsum", "dialogue", "summary"),
];

const INSTRUCTION: &str = "You must respond based strictly on the information in a provided passage. Do \
    not incorporate any external knowledge or infer any details beyond what is given in the passage. \
    Provide a concise summary of the following passage, covering the core pieces of information \
    described.";

pub(crate) fn for_each(
    data: &Path,
    show: &mut dyn FnMut(Item) -> Result<(), EvalError>,
) -> Result<(), EvalError> {
    let mut any = false;
    for (set, source, summary) in SETS {
        let path = data.join(format!("{set}.jsonl"));
        if !path.is_file() {
            continue;
        }
        any = true;
        let mut number = 0;
        read::for_each_value(&path, |record: Map<String, Value>| {
            let field = |name: &str| {
                let text = record.get(name).and_then(Value::as_str);
                let missing = || format!("record {number}: it has no text `{name}`");
                text.map(str::to_owned).ok_or_else(|| EvalError::format(&path, missing()))
            };
            let prompt = match field("generate_prompt") {
                Ok(prompt) => prompt,
                Err(_) => format!("{INSTRUCTION}\n\nPassage:\n\"{}\".", field(source)?),
            };
            let gold = Gold::Summary(field(summary)?);
            let id = format!("{set}:{number}");
            number += 1;
            show(Item { id, set: set.into(), prompt, images: Vec::new(), gold })
        })?;
    }
    match any {
        true => Ok(()),
        false => Err(EvalError::NoData {
            path: data.to_path_buf(),
            benchmark: "SummEval",
            expected: SETS.map(|(set, ..)| format!("{set}.jsonl")).join(", "),
        }),
    }
}
