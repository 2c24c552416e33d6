//! The example `plan`: the dry run as a table and as JSON.

mod support;

use std::{fs, process::Command};

use serde_json::{Value, json};
use support::{example, fail, succeed};
use tempfile::tempdir;

#[test]
fn a_dry_run_prints_json_or_a_table() {
    let directory = tempdir().unwrap();
    let loads = directory.path().join("loads.json");
    fs::write(&loads, r#"{"layers": [[5, 400, 30, 900, 2, 250, 350, 63], [1, 1, 1, 1, 1, 1, 1, 1]]}"#)
        .unwrap();
    let plan = || {
        let mut command = Command::new(example("plan"));
        command.arg(&loads).args([
            "--alpha",
            "inf",
            "--beta",
            "0.1",
            "--multiple-of",
            "2",
            "--min-experts",
            "2",
            "--groups",
            "2",
        ]);
        command
    };
    let (out, _) = succeed(plan().arg("--json"));
    let expected = json!({"layers": [
        {"kept": [3, 5, 1, 6], "pruned": [0, 2, 4, 7], "groups": [[3, 5], [1, 6]]},
        {"kept": [0, 2, 4, 6, 1, 3, 5, 7], "pruned": [], "groups": [[0, 2, 4, 6], [1, 3, 5, 7]]},
    ]});
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), expected);
    let (table, _) = succeed(&mut plan());
    assert!(table.contains("25.0 % of the experts pruned"), "{table}");
}

#[test]
fn what_is_wrong_is_said_in_a_sentence() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("loads.json");
    let run = |text: &str, extra: &[&str]| {
        fs::write(&path, text).unwrap();
        let message = fail(Command::new(example("plan")).arg(&path).args(extra));
        assert!(!message.contains("panicked"), "{message}");
        message
    };
    assert!(fail(Command::new(example("plan")).arg("/nowhere.json")).contains("cannot read /nowhere.json"));
    assert!(run("{\"layers\": [[1, -2]]}", &[]).contains("non-negative integers"));
    assert!(run("{\"layers\": [[0, 0]]}", &[]).contains("no load was recorded for layer 0"));
    assert!(run("{\"layers\": []}", &[]).contains("there are no layers to plan for"));
    assert!(run("{\"layers\": [[1, 2, 3]]}", &["--multiple-of", "2"]).contains("layer 0 has 3 experts"));
    assert!(run("{\"layers\": [[1, 2]]}", &["--beta", "nan"]).contains("beta = NaN is not allowed"));
    assert!(run("{\"layers\": [[1, 2]]}", &["--groups", "0"]).contains("groups = 0 is not allowed"));
}
