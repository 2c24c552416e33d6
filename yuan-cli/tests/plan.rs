//! `yuan plan`: the dry run as a table and as JSON.

mod support;

use std::fs;

use serde_json::{Value, json};
use support::{fail, succeed, tiny_pretrain, write_corpus, yuan};
use tempfile::tempdir;
use yuan::laep::PrunePlan;

#[test]
fn a_dry_run_prints_json_or_a_table() {
    let directory = tempdir().unwrap();
    let loads = directory.path().join("loads.json");
    fs::write(
        &loads,
        r#"{"layers": [[5, 400, 30, 900, 2, 250, 350, 63], [1, 1, 1, 1, 1, 1, 1, 1]]}"#,
    )
    .unwrap();
    let plan = || {
        let mut command = yuan("plan");
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
fn a_sweep_is_a_table_and_a_picture() {
    let directory = tempdir().unwrap();
    let (loads, picture) =
        (directory.path().join("loads.json"), directory.path().join("sweep.svg"));
    let size = r#"{"parameters": 1000, "parameters_per_expert": 50, "top_k": 2}"#;
    let text = format!(r#"{{"layers": [[5, 400, 30, 900, 2, 250, 350, 63]], "model": {size}}}"#);
    fs::write(&loads, text).unwrap();
    let sweep = || {
        let mut command = yuan("plan");
        command
            .arg(&loads)
            .args(["--sweep", "--alphas", "0.1,inf", "--betas", "0.01,0.1", "--picture"])
            .arg(&picture);
        command
    };
    let (table, _) = succeed(&mut sweep());
    assert_eq!(table.lines().count(), 5, "{table}");
    let svg = fs::read_to_string(&picture).unwrap();
    assert!(svg.contains("alpha inf") && svg.contains("Experts that would be pruned"));
    let (json, _) = succeed(sweep().arg("--json"));
    let rows = serde_json::from_str::<Value>(&json).unwrap();
    let pruned: Vec<_> =
        rows["sweep"].as_array().unwrap().iter().map(|row| row["pruned"].clone()).collect();
    // Ascending 2, 5, 30, 63, 250 …: 1 % is 20 tokens, 10 % is 200; a tenth of the mean is 25.
    assert_eq!(json!(pruned), json!([2, 2, 2, 4]));
    assert_eq!(rows["sweep"][3]["parameters"], 200);
}

#[test]
fn what_is_wrong_is_said_in_a_sentence() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("loads.json");
    let run = |text: &str, extra: &[&str]| {
        fs::write(&path, text).unwrap();
        let message = fail(yuan("plan").arg(&path).args(extra));
        assert!(!message.contains("panicked"), "{message}");
        message
    };
    assert!(fail(yuan("plan").arg("/nowhere.json")).contains("cannot read /nowhere.json"));
    assert!(run("{\"layers\": [[1, -2]]}", &[]).contains("non-negative integers"));
    assert!(run("{\"layers\": [[0, 0]]}", &[]).contains("no load was recorded for layer 0"));
    assert!(run("{\"layers\": []}", &[]).contains("there are no layers to plan for"));
    assert!(
        run("{\"layers\": [[1, 2, 3]]}", &["--multiple-of", "2"]).contains("layer 0 has 3 experts")
    );
    assert!(
        run("{\"layers\": [[1, 2]]}", &["--beta", "nan"]).contains("beta = NaN is not allowed")
    );
    assert!(run("{\"layers\": [[1, NaN]]}", &[]).contains("non-negative integers"));
    assert!(run("{\"layers\": [[1, 2.5]]}", &[]).contains("non-negative integers"));
    assert!(
        run("{\"layers\": [[1, 2]]}", &["--alpha", "0.1,0.2"])
            .contains("alpha has 2 values for 1 layers")
    );
    assert!(
        run("{\"layers\": [[1, 2]]}", &["--groups", "0"]).contains("groups = 0 is not allowed")
    );
}

#[test]
fn the_limits_of_a_run_hold_for_its_plan_unless_others_are_given() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("data"), directory.path().join("run"));
    write_corpus(&data);
    succeed(tiny_pretrain(&data, &run).args(["--groups", "2", "--multiple-of", "4"]));
    let made = PrunePlan::from_json(&fs::read_to_string(run.join("plan.json")).unwrap()).unwrap();
    let kept = |extra: &[&str]| {
        let (out, _) = succeed(yuan("plan").arg(&run).arg("--json").args(extra));
        let plan: Value = serde_json::from_str(&out).unwrap();
        let layers = plan["layers"].as_array().unwrap();
        layers.iter().map(|layer| layer["kept"].clone()).collect::<Vec<_>>()
    };
    let of_the_run: Vec<Value> = made.kept().into_iter().map(Value::from).collect();
    assert_eq!(kept(&[]), of_the_run);
    // Said again, the run's own groups change nothing.
    assert_eq!(kept(&["--groups", "2"]), of_the_run);
    // Others are the multiple where the run's does not fit them.
    let counts = kept(&["--groups", "8"]);
    assert!(counts.iter().all(|kept| kept.as_array().unwrap().len() == 8), "{counts:?}");
}
