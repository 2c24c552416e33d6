//! `yuan evaluate`: prompts for any program, answers of a model, scores and comparisons.

mod support;

use std::{fs, path::Path};

use serde_json::{Value, json};
use support::{fail, succeed, tiny_pretrain, write_corpus, yuan};
use tempfile::tempdir;

fn write_data(data: &Path) {
    let record = |question: &str, answer: &str| {
        json!({
            "messages": [{"role": "user", "content": question}],
            "ctxs": [{"title": "", "text": "Mixtures of experts route tokens."}],
            "answers": [answer],
        })
    };
    let quac: Vec<Value> = (0..5).map(|n| record(&format!("question {n}?"), "tokens")).collect();
    fs::create_dir_all(data.join("quac")).unwrap();
    fs::write(data.join("quac/test.json"), Value::Array(quac).to_string()).unwrap();
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn answers_of_any_program_are_scored_and_compared() {
    let directory = tempdir().unwrap();
    let data = directory.path().join("data");
    write_data(&data);
    let path = |name: &str| directory.path().join(name);
    let evaluate = || {
        let mut command = yuan("evaluate");
        command.arg("chatrag").arg("--data").arg(&data);
        command
    };
    let prompts = path("prompts.jsonl");
    succeed(evaluate().arg("--prompts").arg(&prompts));
    let asked = lines(&prompts);
    assert_eq!(asked.len(), 5);
    assert!(asked[3]["prompt"].as_str().unwrap().ends_with("question 3?\n\nAssistant:"));
    // Two programs answer: one knows the last question as well.
    for (name, known) in [("first", 3), ("second", 4)] {
        let answers: String = asked[..4]
            .iter()
            .enumerate()
            .map(|(n, item)| {
                let answer = if n < known { "the tokens" } else { "experts" };
                format!("{}\n", json!({"id": item["id"], "answer": answer}))
            })
            .collect();
        let file = path(&format!("{name}.jsonl"));
        fs::write(&file, answers + "no answer\n").unwrap();
        let mut command = evaluate();
        let (out, notes) = succeed(command.arg("--answers").arg(file).arg("--out").arg(path(name)));
        let share = 20 * known;
        assert!(out.contains(&format!("{share}.0")) && out.contains("4 of 5"), "{out}");
        assert!(notes.contains("1 items have no answer and count as wrong."), "{notes}");
        assert!(notes.contains("1 lines are no answers; line 5: no JSON"), "{notes}");
        let scores: Value =
            serde_json::from_slice(&fs::read(path(name).join("scores.json")).unwrap()).unwrap();
        assert_eq!(scores["sets"][0]["value"].as_f64().unwrap().round(), share as f64);
        let page = fs::read_to_string(path(name).join("evaluation.html")).unwrap();
        assert!(page.contains("54.5") && page.contains("quac:3"), "published beside, worst below");
    }
    let mut command = yuan("evaluate");
    let (out, _) = succeed(command.arg("--compare").arg(path("first")).arg(path("second")));
    assert!(out.contains("60.00") && out.contains("80.00") && out.contains("+20.00"), "{out}");

    // Scores by the rules of others are not compared with these.
    let mut command = evaluate();
    command.args(["--profile", "yuan", "--answers"]).arg(path("second.jsonl"));
    succeed(command.arg("--out").arg(path("other-rules")));
    let mut command = yuan("evaluate");
    let error = fail(command.arg("--compare").arg(path("first")).arg(path("other-rules")));
    assert!(
        error.contains("by the rules of authors") && error.contains("those of yuan"),
        "{error}"
    );

    let error = fail(evaluate().arg("--out").arg(path("none")));
    assert!(error.contains("name a --model that answers, or a file with --answers"), "{error}");
    let error = fail(yuan("evaluate").arg("glue").arg("--data").arg(&data));
    assert!(error.contains("`glue` is no benchmark: expected chatrag, summeval"), "{error}");
    let error =
        fail(yuan("evaluate").arg("mmtab").arg("--data").arg(&data).arg("--prompts").arg(prompts));
    assert!(error.contains("none of the files of MMTab is there; expected"), "{error}");
}

#[test]
fn a_model_answers_goes_on_where_it_stopped_and_its_perplexity_is_measured() {
    let directory = tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (data, corpus, run) = (path("data"), path("corpus"), path("run"));
    write_data(&data);
    write_corpus(&corpus);
    succeed(&mut tiny_pretrain(&corpus, &run));
    let ask = |out: &Path, more: &[&str]| {
        let mut command = yuan("evaluate");
        command.arg("chatrag").arg("--data").arg(&data).arg("--model").arg(&run);
        command.args(["--max-new-tokens", "6", "--batch", "2", "--out"]).arg(out).args(more);
        command
    };
    let [whole, part] = [path("whole"), path("part")];
    succeed(&mut ask(&whole, &["--temperature", "0"]));
    succeed(&mut ask(&part, &["--temperature", "0", "--limit", "2"]));
    succeed(&mut ask(&part, &["--temperature", "0"]));
    let by_id = |out: &Path| {
        let mut answers = lines(&out.join("answers.jsonl"));
        answers.sort_by_key(|answer| answer["id"].as_str().unwrap().to_owned());
        answers
    };
    assert_eq!(by_id(&whole).len(), 5);
    assert_eq!(by_id(&whole), by_id(&part));
    assert!(by_id(&whole)[0]["tokens"].as_u64().unwrap() <= 6);
    // Answers that were drawn otherwise are not mixed with these.
    let error = fail(&mut ask(&whole, &["--temperature", "1"]));
    assert!(error.contains("holds answers that were given otherwise"), "{error}");

    // Nor answers to other questions, or of a model that has learnt more since.
    let text = fs::read_to_string(data.join("quac/test.json")).unwrap();
    fs::write(data.join("quac/test.json"), text.replace("question 4", "question 9")).unwrap();
    let error = fail(&mut ask(&whole, &["--temperature", "0"]));
    assert!(error.contains("holds answers that were given otherwise"), "{error}");
    fs::write(data.join("quac/test.json"), text).unwrap();
    succeed(&mut ask(&whole, &["--temperature", "0"]));

    let out = path("perplexity");
    let mut command = yuan("evaluate");
    command.arg("perplexity").arg("--data").arg(&corpus).arg("--model").arg(&run);
    let (text, _) = succeed(command.args(["--seq", "64", "--out"]).arg(&out));
    assert!(text.starts_with("perplexity "), "{text}");
    let scores: Value =
        serde_json::from_slice(&fs::read(out.join("scores.json")).unwrap()).unwrap();
    let (value, nats) = (&scores["perplexity"], &scores["nats_per_token"]);
    assert!((value.as_f64().unwrap().ln() - nats.as_f64().unwrap()).abs() < 1e-9);
    // The tokens of all documents, each with its end, but for the first of each row.
    let items = lines(&out.join("items.jsonl"));
    let tokens: f64 =
        items.iter().map(|item| item["scores"]["perplexity"][1][1].as_f64().unwrap()).sum();
    assert_eq!(Some(tokens), scores["tokens"].as_f64());
    let mut mixed = yuan("evaluate");
    mixed.arg("perplexity").arg("--data").arg(&corpus).arg("--model").arg(&run);
    let error = fail(mixed.args(["--seq", "64", "--out"]).arg(&whole));
    assert!(error.contains("holds scores of \"chatrag\": choose another --out"), "{error}");
    // What a model has learnt is likelier than what it has not.
    assert!(value.as_f64().unwrap() < 400.0, "{scores}");
}
