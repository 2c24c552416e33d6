//! Every special rule of every benchmark, on a few items in the published formats.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};
use yuan_eval::{
    Answer, AnswerWriter, Answers, Benchmark, Comparison, EvalError, Item, OutsideScores, Profile,
    Scored,
};

fn write(directory: &Path, name: &str, value: &Value) {
    let path = directory.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, value.to_string()).unwrap();
}

fn lines(directory: &Path, name: &str, values: &[Value]) {
    let text: String = values.iter().map(|value| format!("{value}\n")).collect();
    fs::write(directory.join(name), text).unwrap();
}

fn items(benchmark: Benchmark, data: &Path, profile: Profile) -> Vec<Item> {
    let mut items = Vec::new();
    let keep = |item| {
        items.push(item);
        Ok(())
    };
    benchmark.for_each(data, profile, None, keep).unwrap();
    items
}

fn answers(pairs: &[(&str, &str)]) -> Answers {
    let mut answers = Answers::default();
    for (id, answer) in pairs {
        answers.insert(Answer { id: (*id).into(), answer: (*answer).into(), tokens: None });
    }
    answers
}

fn scored(benchmark: Benchmark, data: &Path, profile: Profile, answers: &Answers) -> Scored {
    let outside = OutsideScores::default();
    Scored::of(benchmark, data, profile, answers, &outside, None, |_| Ok(())).unwrap()
}

/// Metrics by set and name.
fn values(scored: &Scored) -> BTreeMap<String, f64> {
    let value =
        |score: &yuan_eval::SetScore| (format!("{} {}", score.set, score.metric), score.value);
    scored.sets.iter().map(value).collect()
}

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

const REFUSAL: &str = "Sorry. I cannot find the answer based on the context.";

fn chatrag() -> TempDir {
    let data = tempdir().unwrap();
    let question = |text: &str| vec![turn("user", text)];
    let contexts: Vec<Value> =
        (0..7).map(|n| json!({"title": format!("t{n}"), "text": "x"})).collect();
    let long: Vec<Value> = (0..9)
        .map(|n| turn(if n % 2 == 0 { "user" } else { "assistant" }, &format!("turn {n}")))
        .collect();
    write(
        data.path(),
        "doc2dial/test.json",
        &json!([
            {"messages": long, "ctxs": contexts, "answers": ["The blue cat"]},
            {"messages": question("two"), "ctxs": [{"text": "no title"}], "answer": 12},
        ]),
    );
    write(
        data.path(),
        "quac/test.json",
        &json!([
            {"messages": question("who?"), "ctxs": [], "answers": [REFUSAL]},
            {"messages": question("when?"), "ctxs": [], "answers": ["in 1999", "1999"]},
        ]),
    );
    write(
        data.path(),
        "inscit/dev.json",
        &json!([
            {"messages": question("why?"), "ctxs": [], "answers": [REFUSAL, "because"]},
        ]),
    );
    write(
        data.path(),
        "coqa/dev.json",
        &json!([
            {"messages": [turn("user", "first"), turn("assistant", "yes"), turn("user", "last")],
             "ctxs": contexts, "answers": ["a span"]},
        ]),
    );
    data
}

#[test]
fn chatrag_asks_as_its_authors_and_as_yuans() {
    let data = chatrag();
    let found = items(Benchmark::ChatRag, data.path(), Profile::Authors);
    let long = &found[0].prompt;
    // The last seven turns, the first user's of them with the instruction; five of seven contexts.
    assert!(long.contains("\n\nUser: Please give a full and complete answer for the question. turn 2\n\nAssistant: turn 3"));
    assert!(
        !long.contains("turn 1\n") && long.contains("title: t4, source: x") && !long.contains("t5")
    );
    assert!(
        long.starts_with("System: This is a chat") && long.ends_with("User: turn 8\n\nAssistant:")
    );
    assert!(found[1].prompt.contains("title: , source: no title"));
    let coqa = |profile| {
        items(Benchmark::ChatRag, data.path(), profile)
            .into_iter()
            .find(|item| item.set == "coqa")
            .unwrap()
    };
    let words = "Answer the following question with a short span. The answer needs to be just in a few words. ";
    assert!(coqa(Profile::Authors).prompt.contains(&format!("User: {words}last")));
    let yuans = coqa(Profile::Yuan).prompt;
    assert!(yuans.ends_with(
        "User: Answer the following questions in just a few words. last\n\nAssistant:\n\n"
    ));
    assert!(yuans.contains("title: t0") && !yuans.contains("title: t1"));
}

#[test]
fn chatrag_scores_by_its_authors_rules_and_by_yuans_quirks() {
    let data = chatrag();
    let said = answers(&[
        ("doc2dial:0", "a blue cat<|end_of_sentence|> and more"),
        ("doc2dial:1", "12"),
        ("quac:0", "The text does NOT MENTION it, or it is not mentioned."),
        ("quac:1", "1999"),
        ("inscit:0", REFUSAL),
        ("coqa:0", "span"),
        ("coqa:9", "nobody asked"),
    ]);
    let by_authors = scored(Benchmark::ChatRag, data.path(), Profile::Authors, &said);
    let found = values(&by_authors);
    assert_eq!(found["doc2dial F1"], 100.0);
    assert_eq!(found["quac F1"], 100.0);
    assert_eq!(found["inscit F1"], 0.0);
    assert_eq!((by_authors.items, by_authors.answered, by_authors.unknown), (6, 6, 1));
    assert!(by_authors.average.is_none());
    assert!(by_authors.missing.contains(&"convfinqa (accuracy)".to_owned()));
    let found = values(&scored(Benchmark::ChatRag, data.path(), Profile::Yuan, &said));
    // No rule takes effect, and answers without an end lose a character.
    assert!(found["quac F1"] < 30.0);
    assert_eq!(found["inscit F1"], 100.0);
    assert_eq!(found["coqa F1"], 0.0);
}

#[test]
fn calculations_are_right_by_any_of_the_rules() {
    let data = tempdir().unwrap();
    let cases: [(Value, &str, &str, &str, bool); 17] = [
        (json!(7), "", "x", "no number", false),
        (json!("yes"), "a", "x", "yes, it is", true),
        (json!("yes"), "a", "x", "no", false),
        (json!(25.0), "a", "x", "It is 25.0 dollars", true),
        (json!(25.0), "a", "x", "It is 25", true),
        (json!(25), "a", "x", "It is 25.", true),
        (json!(1234.5), "a", "x", "It is $1,234.5 million", true),
        (json!(0.4), "10 / 25", "x", "10 (2017) / 25", true),
        (json!(0.4), "10 / 25", "x", "10 (in 2017) / 25", false),
        (json!(0.123_456), "1 + 2 - 3", "x", "about 0.123", true),
        (json!(0.123_456), "1 + 2 - 3", "x", "about 0.12", true),
        (json!(0.123_456), "1 + 2 - 3", "what percent?", "12.35 %", true),
        (json!(0.123_456), "1 + 2 - 3", "what percent?", "12.3 %", true),
        (json!(0.123_456), "1 + 2 - 3", "what share?", "12.3 %", false),
        (json!(-10.5), "1 + 2 - 3", "x", "a decrease of 10.5", true),
        (json!(-10.5), "1 + 2 - 3", "x", "a fall of 10.5", false),
        (json!(-3), "1 + 2 - 3", "x", "a decrease of 3", true),
    ];
    let record = |(result, formula, question, ..): &(Value, &str, &str, &str, bool)| json!({"messages": [turn("user", question)], "ctxs": [], "answers": [formula], "exe_answer": result});
    write(data.path(), "convfinqa/dev.json", &Value::Array(cases.iter().map(record).collect()));
    for item in items(Benchmark::ChatRag, data.path(), Profile::Authors) {
        let at: usize = item.id.split_once(':').unwrap().1.parse().unwrap();
        let (.., answer, right) = &cases[at];
        assert_eq!(item.gold.score(answer), [[f64::from(u8::from(*right)), 1.0]], "{answer}");
        assert_eq!(item.gold.score(""), [[0.0, 1.0]]);
    }
}

#[test]
fn summaries_have_a_mean_only_with_scores_from_outside() {
    let data = tempdir().unwrap();
    let sets = [
        ("big_patent_10_percent", "description", "abstract"),
        ("billsum", "text", "summary"),
        ("cnn_dailymail", "article", "highlights"),
        ("pubmed-summarization", "article", "abstract"),
        ("samsum", "dialogue", "summary"),
        ("wikihow", "text", "summary"),
        ("xsum", "dialogue", "summary"),
    ];
    for (set, source, summary) in sets {
        let line = json!({source: "Much text.", summary: "Little text."});
        lines(data.path(), &format!("{set}.jsonl"), &[line]);
    }
    let found = items(Benchmark::SummEval, data.path(), Profile::Authors);
    assert!(found[0].prompt.ends_with("\n\nPassage:\n\"Much text.\"."));
    let said: Vec<(String, &str)> =
        found.iter().map(|item| (item.id.clone(), "<think>so</think>Little text.")).collect();
    let said: Vec<(&str, &str)> = said.iter().map(|(id, text)| (id.as_str(), *text)).collect();
    let said = answers(&said);
    let without = scored(Benchmark::SummEval, data.path(), Profile::Authors, &said);
    assert!(without.average.is_none());
    assert!(values(&without).values().all(|&value| value == 100.0));
    // Yuan's program keeps what was thought.
    let kept = scored(Benchmark::SummEval, data.path(), Profile::Yuan, &said);
    assert!(values(&kept)["xsum ROUGE-1"] < 100.0);
    let outside = data.path().join("outside.jsonl");
    let score = |item: &Item| json!({"id": item.id, "BERTScore": 0.9, "SummaC": 0.4});
    lines(data.path(), "outside.jsonl", &found.iter().map(score).collect::<Vec<_>>());
    let outside = OutsideScores::read(&outside).unwrap();
    let with = Scored::of(
        Benchmark::SummEval,
        data.path(),
        Profile::Authors,
        &said,
        &outside,
        None,
        |_| Ok(()),
    )
    .unwrap();
    let mean = with.average.unwrap();
    assert!((mean.value - (30.0 + 0.35 * 90.0 + 0.35 * 40.0)).abs() < 1e-9, "{mean:?}");
}

/// Items of every kind, and a right answer to each.
fn mmtab() -> TempDir {
    let data = tempdir().unwrap();
    let item = |id: &str, set: &str, task: &str, output: &str, answers: Value| {
        json!({"item_id": id, "image_id": "table", "input": "?", "output": output, "task_type": task,
               "dataset_name": set, "answer_list": answers})
    };
    let records = json!([
        item("list", "WTQ", "TQA", r#"So {"answer": ["b", "a"]}."#, json!(["a", "b"])),
        item("number", "TABMWP", "TQA", r#"{"answer": ["2.5"]}"#, json!([2.5])),
        item("choice", "TabMCQ", "TQA", r#"{"answer": ["(D) Blood"]}"#, json!(["(D) Blood"])),
        item("text", "FeTaQA", "TQA", "The cat sat on the mat.", json!(["x"])),
        item("size", "WTQ", "TSD", r#"{"row_number": "3", "column_number": "4"}"#, json!([[3, 4]])),
        item(
            "cells",
            "WTQ",
            "TCE",
            r#"[{"row_id": "1", "column_id": "2", "cell_value": "Ab"}, {"row_id": "2", "column_id": "2", "cell_value": "7"}]"#,
            json!([])
        ),
        item(
            "places",
            "WTQ",
            "TCL",
            r#"{"value": "Year", "location": "(1, 2)"}, {"value": "No", "location": "DOES NOT EXIST"}"#,
            json!([])
        ),
        item(
            "merged",
            "WTQ",
            "MCD",
            r#"{"top-left": [1, 1], "bottom-right": [1, 2]}, {"top-left": [2, 1], "bottom-right": [3, 1]}"#,
            json!([
                r#"{"top-left": [1, 1], "bottom-right": [1, 2]}"#,
                r#"{"top-left": [2, 1], "bottom-right": [3, 1]}"#
            ])
        ),
        item(
            "unmerged",
            "WTQ",
            "MCD",
            "This table does not contain any merged cells.",
            json!(["None"])
        ),
        item(
            "lines",
            "WTQ",
            "RCE",
            r#"{"row_id": "2", "cell_list": ["a", "b"]} {"column_id": "1", "cell_list": ["head", "a", "c"]}"#,
            json!([])
        ),
        item("elsewhere", "ToTTo", "T2T", "x", json!([])),
        item("tree", "WTQ", "TR", "<table>", json!(["x"])),
    ]);
    write(data.path(), "MMTab-eval_test_data_49K.json", &records);
    let rows = json!([["head"], ["a", "b"], ["c", "d"]]);
    write(
        data.path(),
        "MMTab-eval_test_tables_23K.json",
        &json!([{"image_id": "table", "table_rows": rows}]),
    );
    data
}

#[test]
fn tables_are_scored_task_by_task() {
    let data = mmtab();
    let found = items(Benchmark::MmTab, data.path(), Profile::Authors);
    assert_eq!(found.len(), 10);
    assert!(found[0].images[0].ends_with("images/table.jpg"));
    let by_id = |id: &str| &found.iter().find(|item| item.id == id).unwrap().gold;
    let score = |id: &str, answer: &str| by_id(id).score(answer);
    let is = |right: bool| vec![vec![f64::from(u8::from(right)), 1.0]];
    // The last of two answers wins; quotes of both kinds, and numbers.
    assert_eq!(score("list", r#"{"answer": ["x"]}, no: {'answer': ['b', "a", "a"]}"#), is(true));
    assert_eq!(score("list", r#"{"answer": ["a", "b"]}, no: {"answer": ["a"]}"#), is(false));
    assert_eq!(score("list", "a, b"), is(false));
    assert_eq!(score("number", r#"{"answer": 2.5}"#), is(true));
    assert_eq!(score("choice", r#"{"answer": "Blood"}"#), is(true));
    assert_eq!(score("choice", r#"{"answer": ["(A) Sweat"]}"#), is(false));
    assert_eq!(score("size", "It has 3 rows and 5 columns."), [[1.0, 1.0], [0.0, 1.0]]);
    assert_eq!(
        score("size", r#"{"row_number": 9, "column_number": "4"}"#),
        [[0.0, 1.0], [1.0, 1.0]]
    );
    assert_eq!(
        score("cells", r#"{"row_id": 1, "column_id": 2, "cell_value": "AB"}"#),
        [[1.0, 2.0]]
    );
    assert_eq!(
        score(
            "places",
            r#"{"value": "Year", "location": "(1, 2)"}{"value": "No", "location": "does not exist"}"#
        ),
        [[2.0, 2.0]]
    );
    assert_eq!(score("places", r#"{"value": "Year", "location": (1, 3)}"#), [[0.0, 2.0]]);
    let one = r#"{"top-left": [1, 1], "bottom-right": [1, 2]}"#;
    assert_eq!(score("merged", &format!("{one} and {one}")), [[1.0, 2.0, 2.0]]);
    assert_eq!(score("unmerged", "There is NO merged cell."), [[1.0, 1.0, 1.0]]);
    assert_eq!(score("unmerged", one), [[0.0, 1.0, 1.0]]);
    // A cell twice is right once, and a column that nobody asked for is found, not expected.
    let lines =
        r#"{"row_id": 2, "cell_list": ["a", "a", "x"]} {"column_id": 2, "cell_list": ["b"]}"#;
    assert_eq!(score("lines", lines), [[1.0, 3.0, 2.0], [0.0, 1.0, 3.0]]);
}

#[test]
fn documents_are_scored_by_words_and_by_how_many_come_close() {
    let data = tempdir().unwrap();
    let record = |answer: &str| json!({"question": "?", "answer": answer, "imagepath": ["images/a.png"], "idx": 0});
    lines(
        data.path(),
        "docmatrix_questions.jsonl",
        &[record("one two three four"), record("yes it is so")],
    );
    let said = answers(&[("docmatix:0", "one two three four five"), ("docmatix:1", "no")]);
    let found = values(&scored(Benchmark::Docmatix, data.path(), Profile::Yuan, &said));
    assert!((found["docmatix F1"] - 100.0 * (8.0 / 9.0) / 2.0).abs() < 1e-9);
    assert_eq!(found["docmatix F1 above 0.8"], 50.0);
}

#[test]
fn right_answers_score_all_and_empty_ones_nothing() {
    let chat = chatrag();
    let tables = mmtab();
    for (benchmark, data) in [(Benchmark::ChatRag, &chat), (Benchmark::MmTab, &tables)] {
        let found = items(benchmark, data.path(), Profile::Authors);
        let records: Vec<Value> = match benchmark {
            Benchmark::MmTab => {
                let text = fs::read(data.path().join("MMTab-eval_test_data_49K.json")).unwrap();
                serde_json::from_slice(&text).unwrap()
            }
            _ => Vec::new(),
        };
        let right = |item: &Item| match benchmark {
            Benchmark::MmTab => {
                let record = records.iter().find(|record| record["item_id"] == item.id).unwrap();
                record["output"].as_str().unwrap().to_owned()
            }
            _ => item.gold.shown().split(" | ").last().unwrap().to_owned(),
        };
        let gold: Vec<(&str, String)> =
            found.iter().map(|it| (it.id.as_str(), right(it))).collect();
        let gold: Vec<(&str, &str)> = gold.iter().map(|(id, text)| (*id, text.as_str())).collect();
        let all = scored(benchmark, data.path(), Profile::Authors, &answers(&gold));
        assert!(
            values(&all).values().all(|value| (value - 100.0).abs() < 1e-9),
            "{:?}",
            values(&all)
        );
        assert!(
            all.sets.iter().all(|set| set.interval.iter().all(|edge| (edge - 100.0).abs() < 1e-9))
        );
        let empty: Vec<(&str, &str)> = gold.iter().map(|(id, _)| (*id, "")).collect();
        for said in [answers(&empty), Answers::default()] {
            let none = scored(benchmark, data.path(), Profile::Authors, &said);
            assert!(values(&none).values().all(|&value| value == 0.0), "{:?}", values(&none));
        }
    }
}

#[test]
fn answers_are_kept_whatever_happens_and_what_is_none_is_counted() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("answers.jsonl");
    let answer = |id: &str| Answer { id: id.into(), answer: "yes\nno".into(), tokens: Some(3) };
    let mut writer = AnswerWriter::open(&path).unwrap();
    writer.write(&answer("a:0")).unwrap();
    writer.write(&answer("a:1")).unwrap();
    drop(writer);
    // Killed in the middle of a line: that one is answered again.
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    let mut writer = AnswerWriter::open(&path).unwrap();
    assert!(writer.has("a:0") && !writer.has("a:1"));
    writer.write(&answer("a:1")).unwrap();
    let read = Answers::read(&path).unwrap();
    assert_eq!((read.len(), read.malformed), (2, 0));
    assert_eq!(read.get("a:1"), Some(&answer("a:1")));

    fs::write(
        &path,
        "{\"id\": 7, \"answer\": \"x\"}\n\n{\n{\"id\": \"b\"}\n{\"id\": 7, \"answer\": \"y\"}\n",
    )
    .unwrap();
    let read = Answers::read(&path).unwrap();
    assert_eq!((read.len(), read.malformed, read.repeated), (1, 2, 1));
    assert!(read.first_malformed.as_deref().unwrap().starts_with("line 3: no JSON"));
    assert_eq!(read.get("7").unwrap().answer, "y");
    let error = Answers::read(directory.path()).unwrap_err().to_string();
    assert!(error.ends_with("it is no file"), "{error}");
}

#[test]
fn data_that_are_none_are_a_sentence() {
    let data = tempdir().unwrap();
    let error = |benchmark: Benchmark| {
        benchmark.for_each(data.path(), Profile::Authors, None, |_| Ok(())).unwrap_err().to_string()
    };
    for benchmark in Benchmark::ALL {
        let error = error(benchmark);
        assert!(
            error.contains(&format!("none of the files of {benchmark} is there; expected")),
            "{error}"
        );
        assert_eq!(benchmark.name().parse(), Ok(benchmark));
    }
    write(data.path(), "quac/test.json", &json!([{"messages": [], "answers": ["x"]}]));
    assert!(
        error(Benchmark::ChatRag)
            .ends_with("record 0: its conversation does not end with a question")
    );
    fs::write(data.path().join("quac/test.json"), "[{}").unwrap();
    assert!(error(Benchmark::ChatRag).contains("quac/test.json: missing field `messages`"));
    fs::write(data.path().join("quac/test.json"), " \n ").unwrap();
    assert!(error(Benchmark::ChatRag).ends_with("it is empty"));
}

#[test]
fn two_models_are_compared_item_by_item() {
    let data = tempdir().unwrap();
    let record = |n: usize| json!({"question": "?", "answer": format!("word{n}"), "imagepath": []});
    let records: Vec<Value> = (0..60).map(record).collect();
    lines(data.path(), "docmatrix_questions.jsonl", &records);
    let evaluate = |name: &str, right: usize| {
        let mut said = Answers::default();
        for n in 0..60 {
            let word = if n < right { format!("word{n}") } else { "wrong".into() };
            said.insert(Answer { id: format!("docmatix:{n}"), answer: word, tokens: None });
        }
        let mut text = String::new();
        let outside = OutsideScores::default();
        let each = |item| {
            text += &format!("{}\n", serde_json::to_string(&item).unwrap());
            Ok::<_, EvalError>(())
        };
        Scored::of(Benchmark::Docmatix, data.path(), Profile::Authors, &said, &outside, None, each)
            .unwrap();
        let path = data.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let [a, b, same] = [evaluate("a", 20), evaluate("b", 40), evaluate("same", 20)];
    let found = Comparison::of([&a, &b]).unwrap();
    let f1 = &found.sets[0];
    assert!((f1.values[1] - f1.values[0] - 100.0 / 3.0).abs() < 1e-9);
    assert!(f1.interval[0] > 15.0 && f1.interval[1] < 55.0 && f1.other_sign == 0.0, "{f1:?}");
    let none = Comparison::of([&a, &same]).unwrap();
    assert_eq!((none.sets[0].interval, none.sets[0].other_sign), ([0.0, 0.0], 1.0));
    let text = fs::read_to_string(&b).unwrap();
    fs::write(&b, text.lines().skip(1).collect::<Vec<_>>().join("\n")).unwrap();
    let error = Comparison::of([&a, &b]).unwrap_err().to_string();
    assert!(error.contains("has no item docmatix:0, and"), "{error}");
}

#[test]
fn answers_are_read_as_models_write_them() {
    let data = mmtab();
    let found = items(Benchmark::MmTab, data.path(), Profile::Authors);
    let score = |id: &str, answer: &str| {
        found.iter().find(|item| item.id == id).unwrap().gold.score(answer)
    };
    // Within another object, in bold, with escapes.
    let cells = r#"{"answer": [{"row_id": "1", "column_id": "2", "cell_value": "\u0041b"}]}"#;
    assert_eq!(score("cells", cells), [[1.0, 2.0]]);
    let merged = r#"{"merged_cells": [{"top-left": [1, 1], "bottom-right": [1, 2]}]}"#;
    assert_eq!(score("merged", merged), [[1.0, 1.0, 2.0]]);
    assert_eq!(
        score("lines", r#"{"answer": [{"row_id": "2", "cell_list": ["a", "b"]}]}"#)[0],
        [2.0; 3]
    );
    for answer in ["**3 rows and 4 columns**", "(3 rows and 4 columns)", "é3 rows and 4 columns"] {
        assert_eq!(score("size", answer), [[1.0, 1.0], [1.0, 1.0]], "{answer}");
    }
    assert_eq!(score("size", "rows and columns"), [[0.0, 1.0], [0.0, 1.0]]);
    // What a model thinks, and what ends its answer, is no part of it.
    let data = chatrag();
    for answer in ["a span</s>", "<think>hm, well</think>a span<eod>", "span<|im_end|>x"] {
        let said = answers(&[("coqa:0", answer)]);
        let found = values(&scored(Benchmark::ChatRag, data.path(), Profile::Authors, &said));
        assert_eq!(found["coqa F1"], 100.0, "{answer}");
    }
}

#[test]
fn means_of_sets_and_scores_from_outside_are_whole_or_not_there() {
    let data = tempdir().unwrap();
    let question =
        |n: usize| json!({"messages": [turn("user", "?")], "answers": [format!("word{n}")]});
    for (name, count) in [("cooking", 1), ("travel", 2), ("movies", 4)] {
        let records: Vec<Value> = (0..count).map(question).collect();
        write(data.path(), &format!("doqa/test_{name}.json"), &Value::Array(records));
    }
    let said = answers(&[("doqa_cooking:0", "word0"), ("doqa_travel:0", "word0")]);
    let found = values(&scored(Benchmark::ChatRag, data.path(), Profile::Authors, &said));
    // The mean of the sets, and not of their items.
    assert!((found["doqa F1"] - 50.0).abs() < 1e-9, "{found:?}");

    let lines_of =
        |n: usize| (0..n).map(|_| json!({"dialogue": "x", "summary": "y"})).collect::<Vec<_>>();
    let summaries = tempdir().unwrap();
    lines(summaries.path(), "xsum.jsonl", &lines_of(2));
    let said = answers(&[("xsum:0", "y"), ("xsum:1", "y")]);
    let score = |name: &str, values: &[Value]| {
        lines(summaries.path(), name, values);
        OutsideScores::read(&summaries.path().join(name))
    };
    let some = [
        json!({"id": "xsum:0", "BERTScore": 0.9, "SummaC": 0.5}),
        json!({"id": "xsum:1", "BERTScore": 0.7}),
        json!({"id": "xsum-1", "SummaC": 0.5}),
    ];
    let outside = score("some.jsonl", &some).unwrap();
    let found = Scored::of(
        Benchmark::SummEval,
        summaries.path(),
        Profile::Authors,
        &said,
        &outside,
        None,
        |_| Ok(()),
    )
    .unwrap();
    let metrics: Vec<(&str, f64)> =
        found.sets.iter().map(|set| (set.metric.as_str(), set.value.round())).collect();
    assert_eq!(metrics, [("ROUGE-1", 100.0), ("ROUGE-2", 0.0), ("BERTScore", 80.0)]);
    assert_eq!(found.unused_scores, 1);
    let error = score("large.jsonl", &[json!({"id": 1, "SummaC": 90})]).unwrap_err().to_string();
    assert!(error.ends_with("line 1: SummaC = 90 must be at most 1"), "{error}");
    let twice = [json!({"id": 1, "SummaC": 0.1}), json!({"id": 1, "SummaC": 0.2})];
    let error = score("twice.jsonl", &twice).unwrap_err().to_string();
    assert!(error.ends_with("line 2: 1 has scores already"), "{error}");
}

#[test]
fn items_are_told_apart_and_files_are_read_to_their_end() {
    let data = mmtab();
    let path = data.path().join("MMTab-eval_test_data_49K.json");
    let mut records: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let first = records[0].clone();
    records.as_array_mut().unwrap().push(first);
    let refused = || {
        let (answers, outside) = (Answers::default(), OutsideScores::default());
        let profile = Profile::Authors;
        let scored = Scored::of(
            Benchmark::MmTab,
            data.path(),
            profile,
            &answers,
            &outside,
            None,
            |_| Ok(()),
        );
        scored.unwrap_err().to_string()
    };
    fs::write(&path, records.to_string()).unwrap();
    assert_eq!(refused(), "two items have the id list");
    fs::write(&path, "[]").unwrap();
    assert!(refused().ends_with("holds no item of MMTab"));
    fs::write(&path, "[] more").unwrap();
    assert!(refused().contains("trailing characters"));
    // A last line without its end is an answer if it is whole.
    let file = data.path().join("answers.jsonl");
    fs::write(&file, r#"{"id": "a", "answer": "x"}"#).unwrap();
    let mut writer = AnswerWriter::open(&file).unwrap();
    assert!(writer.has("a"));
    writer.write(&Answer { id: "b".into(), answer: "y".into(), tokens: None }).unwrap();
    assert_eq!(Answers::read(&file).unwrap().len(), 2);
    // Comparisons of what is not comparable.
    let [a, b] = ["a", "b"].map(|name| data.path().join(name));
    let line = |metric: &str, numbers: &[f64]| json!({"id": "1", "set": "s", "answered": true, "scores": {metric: ["mean", numbers]}});
    lines(data.path(), "a", &[line("F1", &[1.0, 1.0])]);
    lines(data.path(), "b", &[line("F1", &[1.0, 1.0]), line("other", &[1.0, 1.0])]);
    for files in [[&a, &b], [&b, &a]] {
        let error = Comparison::of(files.map(std::path::PathBuf::as_path)).unwrap_err().to_string();
        assert!(error.contains("a has no other of s, and "), "{error}");
    }
    lines(data.path(), "b", &[line("F1", &[1.0, 1.0, 1.0])]);
    let error = Comparison::of([&a, &b]).unwrap_err().to_string();
    assert!(error.ends_with("1: its numbers for F1 are none"), "{error}");
}
