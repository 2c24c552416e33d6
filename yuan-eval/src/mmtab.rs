//! `MMTab` (Zheng et al., arXiv 2406.08100): questions about images of tables, by the rules of
//! Table-LLaVA's evaluation.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
};

use serde::Deserialize;

use crate::{
    EvalError, Gold, Item,
    read::{for_each_value, present, text_of},
    relaxed::{Value, last_with, objects},
};

/// Files of questions; the second one holds a part of them, a line each.
const ITEMS: [&str; 2] = ["MMTab-eval_test_data_49K.json", "MMTab-eval_test_data_49K.jsonl"];
const TABLES: &str = "MMTab-eval_test_tables_23K.json";

/// Sets whose name is their task.
const TASKS: [&str; 10] =
    ["TSD", "TCL", "RCE", "MCD", "TCE", "TR", "OOD_TSD", "OOD_TCL", "OOD_RCE", "OOD_TCE"];
const LISTS: [&str; 8] =
    ["TABMWP", "WTQ", "HiTab", "TAT-QA", "TabFact", "InfoTabs", "AIT-QA", "PubHealthTab"];
const TEXTS: [&str; 4] = ["FeTaQA", "HiTab_t2t", "Rotowire", "WikiBIO"];

/// The metrics that the published mean is taken over.
pub(crate) const MEAN_OF: [(&str, &str); 17] = [
    ("TABMWP", "accuracy"),
    ("WTQ", "accuracy"),
    ("HiTab", "accuracy"),
    ("TAT-QA", "accuracy"),
    ("FeTaQA", "BLEU"),
    ("TabFact", "accuracy"),
    ("InfoTabs", "accuracy"),
    ("HiTab_t2t", "BLEU"),
    ("Rotowire", "BLEU"),
    ("WikiBIO", "BLEU"),
    ("TSD", "rows"),
    ("TSD", "columns"),
    ("TCE", "accuracy"),
    ("TCL", "accuracy"),
    ("MCD", "F1"),
    ("RCE", "rows F1"),
    ("RCE", "columns F1"),
];

#[derive(Deserialize)]
struct Record {
    item_id: String,
    image_id: String,
    input: String,
    output: String,
    task_type: String,
    dataset_name: String,
    answer_list: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Table {
    image_id: String,
    table_rows: Vec<Vec<String>>,
}

pub(crate) fn for_each(
    data: &Path,
    show: &mut dyn FnMut(Item) -> Result<(), EvalError>,
) -> Result<(), EvalError> {
    let file = present(data, &ITEMS).into_iter().next().ok_or_else(|| EvalError::NoData {
        path: data.to_path_buf(),
        benchmark: "MMTab",
        expected: ITEMS.join(" or "),
    })?;
    let mut tables = HashMap::new();
    let file_of_tables = data.join(TABLES);
    if file_of_tables.is_file() {
        for_each_value(&file_of_tables, |table: Table| {
            tables.insert(table.image_id, table.table_rows);
            Ok(())
        })?;
    }
    for_each_value(&file, |record: Record| {
        let set = match TASKS.contains(&record.task_type.as_str()) {
            true => record.task_type.clone(),
            false => record.dataset_name.clone(),
        };
        let Some(gold) = gold(&set, &record, &tables)
            .map_err(|reason| EvalError::format(&file, format!("{}: {reason}", record.item_id)))?
        else {
            return Ok(());
        };
        let images = vec![data.join("images").join(format!("{}.jpg", record.image_id))];
        show(Item { id: record.item_id, set, prompt: record.input, images, gold })
    })
}

/// None for sets that are scored elsewhere (`ToTTo`) or by drawing trees (TR).
fn gold(
    set: &str,
    record: &Record,
    tables: &HashMap<String, Vec<Vec<String>>>,
) -> Result<Option<Gold>, String> {
    let answers = || -> Vec<String> { record.answer_list.iter().map(text_of).collect() };
    Ok(Some(match set.trim_start_matches("OOD_") {
        "TSD" => Gold::Structure(size_of(&record.answer_list)?),
        "TCE" => Gold::Structure(Structure::Cells(cells(&record.output))),
        "TCL" => Gold::Structure(Structure::Places(places(&record.output))),
        "MCD" => Gold::Structure(Structure::Merged(
            answers().iter().flat_map(|answer| regions(answer)).collect(),
        )),
        "RCE" => {
            let table = tables.get(&record.image_id).ok_or_else(|| {
                format!("its table {} is not in {TABLES}, which is needed", record.image_id)
            })?;
            Gold::Structure(Structure::lines_of(&record.output, table))
        }
        "TabMCQ" => Gold::Choice(answers().into_iter().next().ok_or("it has no answer")?),
        set if LISTS.contains(&set) => Gold::List(answers()),
        set if TEXTS.contains(&set) => Gold::Text(record.output.clone()),
        _ => return Ok(None),
    }))
}

fn size_of(answers: &[serde_json::Value]) -> Result<Structure, String> {
    match answers.first().and_then(|size| size.as_array()).map(Vec::as_slice) {
        Some([rows, columns]) => {
            Ok(Structure::Size { rows: text_of(rows), columns: text_of(columns) })
        }
        _ => Err("its answer is no number of rows and of columns".into()),
    }
}

/// Whether the last `{"answer": …}` holds these values, in any order.
pub(crate) fn is_list(answer: &str, expected: &[String]) -> bool {
    let Some(found) = last_with(answer, "answer") else { return false };
    let found = found.get("answer").map(Value::texts).unwrap_or_default();
    let set = |values: &[String]| values.iter().cloned().collect::<HashSet<String>>();
    set(&found) == set(expected)
}

/// Whether the last `{"answer": …}` is this option, such as `(D) Blood`, or its text alone.
pub(crate) fn is_choice(answer: &str, expected: &str) -> bool {
    let Some(found) = last_with(answer, "answer") else { return false };
    let found = found.get("answer").map(Value::texts).unwrap_or_default();
    let text = expected.split_once(' ').map_or("", |(_, text)| text);
    found.first().is_some_and(|found| found == expected || found == text)
}

/// What a table is made of.
#[derive(Debug, Clone, PartialEq)]
pub enum Structure {
    /// How many rows and columns it has.
    Size {
        /// Rows.
        rows: String,
        /// Columns.
        columns: String,
    },
    /// Values by their places, `row_column`.
    Cells(BTreeMap<String, String>),
    /// Places by the values of the cells.
    Places(BTreeMap<String, String>),
    /// Regions that were merged, `row_column_row_column`; none if nothing was.
    Merged(Vec<String>),
    /// Cells of rows and of columns.
    Lines {
        /// Cells by the number of their row, from 1 on.
        rows: BTreeMap<usize, Vec<String>>,
        /// Cells by the number of their column.
        columns: BTreeMap<usize, Vec<String>>,
    },
}

fn cells(text: &str) -> BTreeMap<String, String> {
    let mut cells = BTreeMap::new();
    for object in objects(text) {
        let [row, column, value] =
            ["row_id", "column_id", "cell_value"].map(|key| object.get(key).map(|v| &v.written));
        if let (Some(row), Some(column), Some(value)) = (row, column, value) {
            // The first that is said about a place counts.
            cells.entry(format!("{row}_{column}")).or_insert_with(|| value.clone());
        }
    }
    cells
}

fn places(text: &str) -> BTreeMap<String, String> {
    let places = objects(text).into_iter().filter_map(|object| {
        let [value, place] = ["value", "location"].map(|key| object.get(key).map(|v| &v.written));
        Some((value?.clone(), place?.clone()))
    });
    places.collect()
}

fn regions(text: &str) -> Vec<String> {
    let corner = |value: Option<&Value>| -> Option<String> {
        let [row, column] = value?.list()? else { return None };
        Some(format!("{}_{}", row.written, column.written))
    };
    let regions = objects(text).into_iter().filter_map(|object| {
        let corners = ["top-left", "bottom-right"].map(|key| corner(object.get(key)));
        let [first, last] = corners;
        Some(format!("{}_{}", first?, last?))
    });
    regions.collect()
}

/// Cells by number, of rows and of columns.
fn lines(text: &str) -> [BTreeMap<usize, Vec<String>>; 2] {
    let mut lines = [BTreeMap::new(), BTreeMap::new()];
    for object in objects(text) {
        let Some(cells) = object.get("cell_list").and_then(|cells| cells.list()) else { continue };
        let cells = cells.iter().map(|cell| cell.written.clone()).collect();
        for (key, lines) in ["row_id", "column_id"].into_iter().zip(&mut lines) {
            if let Some(number) = object.get(key).and_then(|number| number.written.parse().ok()) {
                lines.insert(number, cells);
                break;
            }
        }
    }
    lines
}

impl Structure {
    /// The rows and columns that a right answer names, with the cells of the table.
    fn lines_of(output: &str, table: &[Vec<String>]) -> Self {
        let [rows, columns] = lines(output);
        let row = |number: usize| table.get(number.wrapping_sub(1)).cloned().unwrap_or_default();
        let column = |number: usize| -> Vec<String> {
            let cell = |row: &Vec<String>| match row.len() {
                // A row of one cell goes across the table.
                1 => row.first().cloned(),
                _ => row.get(number.wrapping_sub(1)).cloned(),
            };
            table.iter().filter_map(cell).collect()
        };
        Self::Lines {
            rows: rows.into_keys().map(|number| (number, row(number))).collect(),
            columns: columns.into_keys().map(|number| (number, column(number))).collect(),
        }
    }

    /// What an answer adds to the sums of each metric.
    pub(crate) fn score(&self, answer: &str) -> Vec<Vec<f64>> {
        match self {
            Self::Size { rows, columns } => {
                let found = size_in(answer);
                let is = |found: Option<&String>, wanted: &String| {
                    vec![f64::from(u8::from(found == Some(wanted))), 1.0]
                };
                let [found_rows, found_columns] = [0, 1].map(|at| found.as_ref().map(|f| &f[at]));
                vec![is(found_rows, rows), is(found_columns, columns)]
            }
            Self::Cells(expected) => vec![shared(expected, &cells(answer))],
            Self::Places(expected) => vec![shared(expected, &places(answer))],
            Self::Merged(expected) if expected.is_empty() => {
                let lower = answer.to_lowercase();
                let says_none = ["does not contain any merged cells", "no merged cell"];
                let is_right = says_none.iter().any(|said| lower.contains(said));
                vec![vec![f64::from(u8::from(is_right)), 1.0, 1.0]]
            }
            Self::Merged(expected) => {
                let found = regions(answer);
                // A region that is named twice is right once.
                let right = found.iter().collect::<HashSet<_>>();
                let right = right.into_iter().filter(|region| expected.contains(region)).count();
                vec![[right, found.len(), expected.len()].map(|count| count as f64).to_vec()]
            }
            Self::Lines { rows, columns } => {
                let found = lines(answer);
                [rows, columns].into_iter().zip(&found).map(|(w, f)| common(w, f)).collect()
            }
        }
    }

    /// What is right, in words.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Size { rows, columns } => format!("{rows} rows and {columns} columns"),
            Self::Cells(cells) | Self::Places(cells) => {
                let pairs = cells.iter().map(|(key, value)| format!("{key}: {value}"));
                pairs.collect::<Vec<_>>().join(", ")
            }
            Self::Merged(regions) if regions.is_empty() => "no merged cells".into(),
            Self::Merged(regions) => regions.join(", "),
            Self::Lines { rows, columns } => format!("rows {rows:?}, columns {columns:?}"),
        }
    }
}

/// Expected values that were found, whatever their case, and expected ones.
fn shared(expected: &BTreeMap<String, String>, found: &BTreeMap<String, String>) -> Vec<f64> {
    let is_right = |(key, value): &(&String, &String)| {
        found.get(*key).is_some_and(|found| found.to_lowercase() == value.to_lowercase())
    };
    vec![expected.iter().filter(is_right).count() as f64, expected.len() as f64]
}

/// Cells in common, found and expected ones. Cells of lines that nobody asked for are found, and not
/// expected.
fn common(
    expected: &BTreeMap<usize, Vec<String>>,
    found: &BTreeMap<usize, Vec<String>>,
) -> Vec<f64> {
    let mut right = 0;
    for (number, cells) in found {
        let mut left = expected.get(number).cloned().unwrap_or_default();
        for cell in cells {
            if let Some(at) = left.iter().position(|other| other == cell) {
                left.swap_remove(at);
                right += 1;
            }
        }
    }
    let count = |lines: &BTreeMap<usize, Vec<String>>| lines.values().map(Vec::len).sum::<usize>();
    [right, count(found), count(expected)].map(|count| count as f64).to_vec()
}

/// Rows and columns in the last object that names them, or in `m rows and n columns`.
fn size_in(answer: &str) -> Option<[String; 2]> {
    let answer = answer.to_lowercase().replace('\\', "");
    if let Some(object) = last_with(&answer, "row_number") {
        let [rows, columns] =
            ["row_number", "column_number"].map(|key| object.get(key).map(|v| v.written.clone()));
        return Some([rows?, columns?]);
    }
    // The last place counts.
    answer.rmatch_indices(" rows and ").find_map(|(at, middle)| {
        let (before, after) = (&answer[..at], &answer[at + middle.len()..]);
        let not_digit = |c: char| !c.is_ascii_digit();
        let rows = &before[before
            .rfind(not_digit)
            .map_or(0, |end| end + before[end..].chars().next().map_or(1, char::len_utf8))..];
        let columns = &after[..after.find(not_digit).unwrap_or(after.len())];
        let is_size = after[columns.len()..].starts_with(" columns")
            && !rows.is_empty()
            && !columns.is_empty();
        is_size.then(|| [rows.to_owned(), columns.to_owned()])
    })
}
