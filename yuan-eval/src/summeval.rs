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
    let files = SETS.map(|(set, ..)| (set, format!("{set}.jsonl")));
    read::for_each_item("SummEval", data, &files, show, |at, record: Map<String, Value>| {
        let (_, source, summary) = SETS[at];
        let field = |name: &str| {
            let text = record.get(name).and_then(Value::as_str);
            text.map(str::to_owned).ok_or_else(|| format!("it has no text `{name}`"))
        };
        let prompt = match field("generate_prompt") {
            Ok(prompt) => prompt,
            Err(_) => format!("{INSTRUCTION}\n\nPassage:\n\"{}\".", field(source)?),
        };
        Ok((prompt, Vec::new(), Gold::Summary(field(summary)?)))
    })
}
