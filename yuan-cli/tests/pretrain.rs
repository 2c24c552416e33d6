//! `yuan pretrain` as a user runs it: what it leaves, and what it says when something is
//! wrong.

mod support;

use std::{fs, process::Command};

use support::{fail, succeed, tiny_plain, tiny_pretrain, write_corpus, yuan};
use tempfile::tempdir;
use yuan::{laep::PrunePlan, model::YuanConfig, report::History, train::Checkpoint};

#[test]
fn a_run_leaves_metrics_plan_checkpoints_and_pictures() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("data"), directory.path().join("run"));
    write_corpus(&data);
    let (out, err) = succeed(&mut tiny_pretrain(&data, &run));
    assert!(err.contains("pruned [8, 8] experts to ["), "{err}");
    for row in [
        "parameters",
        "experts per layer",
        "tokens per second",
        "validation loss",
        "busiest expert / mean",
    ] {
        assert!(out.contains(row), "{out}");
    }
    assert!(out.contains("before (to step 12)") && out.contains("after"), "{out}");

    let plan = PrunePlan::from_json(&fs::read_to_string(run.join("plan.json")).unwrap()).unwrap();
    let checkpoint = Checkpoint::latest(&run).unwrap().unwrap();
    assert_eq!(checkpoint.step, 24);
    let config = YuanConfig::load(&checkpoint.path.join("config.json")).unwrap();
    assert_eq!(config.experts_per_layer, plan.experts_per_layer());
    assert!(plan.num_pruned() > 0);
    for (picture, words) in
        [("loss.svg", "experts pruned, step 12"), ("expert_load.svg", "crossed out: pruned")]
    {
        let svg = fs::read_to_string(run.join(picture)).unwrap();
        assert!(
            svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains(words),
            "{picture}"
        );
    }

    // The plan that was applied is what the dry run says of the same loads.
    let loads = run.join("loads.json");
    let (json, _) = succeed(yuan("plan").arg(&loads).args([
        "--beta",
        "0.4",
        "--multiple-of",
        "2",
        "--min-experts",
        "2",
        "--groups",
        "2",
        "--top-k",
        "2",
        "--json",
    ]));
    let dry: serde_json::Value = serde_json::from_str(&json).unwrap();
    for (layer, dry) in plan.layers.iter().zip(dry["layers"].as_array().unwrap()) {
        assert_eq!(serde_json::json!(layer.kept), dry["kept"]);
        assert_eq!(serde_json::json!(layer.pruned), dry["pruned"]);
        assert_eq!(serde_json::json!(layer.groups), dry["groups"]);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let directory = tempdir().unwrap();
    let data = directory.path().join("data");
    write_corpus(&data);
    let run = |name: &str| {
        let run = directory.path().join(name);
        succeed(&mut tiny_pretrain(&data, &run));
        let checkpoint = Checkpoint::latest(&run).unwrap().unwrap().path;
        fs::read(checkpoint.join("model.safetensors")).unwrap()
    };
    assert!(run("a") == run("b"), "weights differ after 24 steps");
}

#[test]
fn a_prune_before_the_first_window_is_complete_is_drawn_too() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("data"), directory.path().join("run"));
    write_corpus(&data);
    for window in ["16", "99"] {
        succeed(tiny_pretrain(&data, &run).args(["--window", window]));
        assert!(run.join("report.html").exists() && run.join("load_history.svg").exists());
        fs::remove_dir_all(&run).unwrap();
    }
}

#[test]
fn a_prune_that_could_not_work_is_refused_before_anything_is_read() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("nowhere"), directory.path().join("run"));
    for (options, reason) in [
        ("--steps 8", "the prune after step 12 would never happen: the run has 8 steps"),
        (
            "--guard 0.1 --guard-steps 13",
            "the guard judges the prune after step 12 within 13 steps",
        ),
        ("--guard 0.1 --guard-steps 18446744073709551615", "but the run ends after 24"),
        ("--beta 2", "beta = 2 is not allowed: expected a share of the load, from 0 to 1"),
        ("--min-experts 9", "min_experts = 9 must be at most the 8 experts of a layer"),
        ("--stable-windows 18446744073709551615", "windows = 18446744073709551615 is not allowed"),
        ("--rearrange-every 1 --groups 3 --multiple-of 3", "experts, which"),
    ] {
        let message = fail(tiny_pretrain(&data, &run).args(options.split(' ')));
        assert_sentence(&message, reason);
        assert!(!run.exists());
    }
}

#[test]
fn what_is_reported_of_a_prune_in_the_last_step_is_measured_after_it() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("data"), directory.path().join("run"));
    write_corpus(&data);
    let (out, err) = succeed(tiny_pretrain(&data, &run).args(["--steps", "12"]));
    assert!(err.contains("only 0 steps are left to recover from a prune"), "{err}");
    let history = History::read(&run).unwrap();
    let [.., (12, before), (12, after)] = history.validations().collect::<Vec<_>>()[..] else {
        panic!("{out}");
    };
    assert!(after > before, "{before}, {after}");
    assert_eq!(history.stages().last().unwrap().validation, Some((12, after)));
    // With a guard that has no time left, stable loads are not pruned on: the first window of those
    // that are compared ends after step 2, and they are stable after step 6 at the earliest.
    let guarded = directory.path().join("guarded");
    let pretrain = || {
        let mut pretrain = tiny_plain(&data, &guarded);
        pretrain.args("--stable-windows 2 --max-change 0.9 --min-rank-correlation -0.9".split(' '));
        pretrain
    };
    let message = fail(pretrain().args("--guard 1.0 --guard-steps 19".split(' ')));
    assert_sentence(&message, "the prune after step 6 within 19 steps");
}

#[test]
fn a_plan_that_was_made_elsewhere_is_applied() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("data"), directory.path().join("run"));
    write_corpus(&data);
    // Loads of a run without a prune, a plan from them with limits per layer, and a run that
    // applies it.
    succeed(tiny_plain(&data, &run).args(["--steps", "8", "--no-laep"]));
    let plan = directory.path().join("edited.json");
    let limits = ["--alpha", "inf,0.5", "--beta", "0.3,1", "--multiple-of", "2", "--groups", "2"];
    let (table, _) = succeed(yuan("plan").arg(&run).args(limits).arg("--save").arg(&plan));
    assert!(table.contains("tokens losing"), "{table}");
    let planned = PrunePlan::from_json(&fs::read_to_string(&plan).unwrap()).unwrap();
    let second = directory.path().join("second");
    succeed(tiny_pretrain(&data, &second).arg("--plan").arg(&plan));
    let applied =
        PrunePlan::from_json(&fs::read_to_string(second.join("plan.json")).unwrap()).unwrap();
    assert_eq!(applied, planned);
    let checkpoint = Checkpoint::latest(&second).unwrap().unwrap();
    let config = YuanConfig::load(&checkpoint.path.join("config.json")).unwrap();
    assert_eq!(config.experts_per_layer, planned.experts_per_layer());

    let third = directory.path().join("third");
    let message =
        fail(tiny_pretrain(&data, &third).args(["--layers", "3"]).arg("--plan").arg(&plan));
    assert_sentence(&message, "edited.json is no plan for this model: expected 3 layers, found 2");
    fs::write(&plan, "{}").unwrap();
    let message = fail(tiny_pretrain(&data, &third).arg("--plan").arg(&plan));
    assert_sentence(&message, "not a prune plan: missing field `limits`");
    assert!(!third.exists());
}

/// One sentence: a line that names what is wrong, and nothing else.
fn assert_sentence(message: &str, expected: &str) {
    let lines: Vec<&str> = message.lines().filter(|line| line.starts_with("Error: ")).collect();
    assert_eq!(lines.len(), 1, "{message}");
    assert!(lines[0].contains(expected), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    assert!(message.matches("os error").count() <= 1, "a cause is said once: {message}");
}

#[test]
fn what_is_wrong_is_said_in_a_sentence() {
    let directory = tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (data, run) = (path("data"), path("run"));
    write_corpus(&data);
    fs::create_dir(path("empty")).unwrap();
    fs::create_dir(path("short")).unwrap();
    fs::write(path("short").join("a.txt"), "too short").unwrap();
    fs::create_dir(path("taken")).unwrap();
    fs::write(path("taken").join("mine.txt"), "mine").unwrap();

    let message = fail(yuan("pretrain").arg("--stepz"));
    assert!(message.contains("unexpected argument '--stepz'"), "{message}");
    let message = fail(yuan("pretrain").args(["--steps", "many"]));
    assert!(message.contains("invalid value 'many' for '--steps <STEPS>'"), "{message}");

    let with = |extra: &[&str]| fail(tiny_pretrain(&data, &run).args(extra));
    assert_sentence(&fail(&mut tiny_pretrain(&path("nowhere"), &run)), "nowhere");
    assert_sentence(&fail(&mut tiny_pretrain(&path("empty"), &run)), "empty holds no text");
    assert_sentence(&fail(&mut tiny_pretrain(&path("short"), &run)), "too little text to");
    assert_sentence(&fail(&mut tiny_pretrain(&data, &path("taken"))), "taken is not empty");
    assert_sentence(
        &fail(tiny_pretrain(&data, &path("nowhere")).arg("--resume")),
        "holds no run to resume",
    );
    assert_sentence(
        &with(&["--device", "abacus"]),
        "there is no device \"abacus\": no backend has this name; found: flex",
    );
    assert!(!run.exists(), "a refused run leaves nothing behind");
}

#[test]
fn wrong_settings_are_refused_before_anything_is_read() {
    let directory = tempdir().unwrap();
    let base = |extra: &[&str]| {
        let run = directory.path().join("run");
        let message = fail(yuan("pretrain").arg("--run").arg(&run).args(extra));
        assert!(!run.exists());
        message
    };
    assert_sentence(&base(&["--steps", "0"]), "steps must be at least 1");
    assert_sentence(&base(&["--learning-rate", "NaN"]), "learning_rate = NaN must be positive");
    assert_sentence(&base(&["--beta=-1"]), "beta = -1 is not allowed");
    assert_sentence(
        &base(&["--multiple-of", "3"]),
        "multiple_of = 3 is not divisible by groups = 2",
    );
    assert_sentence(&base(&["--beta", "0.1,0.2"]), "beta has 2 values for 4 layers");
    assert_sentence(&base(&["--guard=-1"]), "the guard's margin = -1 must not be negative");
    assert_sentence(&base(&["--prune-at", "9,3"]), "[9, 3], must ascend");
    assert_sentence(
        &base(&["--z-loss=-1"]),
        "the router z-loss's coefficient = -1 must not be negative",
    );
    assert_sentence(
        &base(&["--experts", "9", "--groups", "2"]),
        "layer 0 has 9 experts, which multiple_of = 2 does not divide",
    );
    assert_sentence(
        &base(&["--hidden", "30", "--layers", "0"]),
        "num_hidden_layers must be at least 1",
    );
    assert_sentence(&base(&["--vocab", "100"]), "a vocabulary of 100 is below");
}

#[test]
fn a_wrong_option_is_status_2_and_a_failure_is_status_1() {
    let directory = tempdir().unwrap();
    let status = |extra: &[&str]| {
        let mut command = yuan("pretrain");
        command.arg("--run").arg(directory.path().join("run")).args(extra);
        command.output().unwrap().status.code()
    };
    for wrong in [
        &["--stepz"][..],
        &["--steps", "0"],
        &["--beta", "-1"],
        &["--hidden", "33"],
        &["--layers", "99999999999"],
        &["--device", "abacus"],
        &["--prune-at", "9,3"],
    ] {
        assert_eq!(status(wrong), Some(2), "{wrong:?}");
    }
    assert_eq!(status(&["--data", "/nowhere"]), Some(1));
    assert_eq!(status(&["--plan", "/nowhere.json"]), Some(1));
    // A negative number is a value, whose sentence names what it is for.
    let message = fail(yuan("pretrain").args(["--seed", "-1"]));
    assert!(message.contains("invalid value '-1' for '--seed <NUMBER>'"), "{message}");
}

#[test]
fn a_corrupt_checkpoint_stops_a_resume() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("data"), directory.path().join("run"));
    write_corpus(&data);
    succeed(&mut tiny_pretrain(&data, &run));
    let checkpoint = Checkpoint::latest(&run).unwrap().unwrap().path;
    fs::write(checkpoint.join("model.safetensors"), b"not a tensor").unwrap();
    let mut resume = tiny_pretrain(&data, &run);
    assert_sentence(&fail(resume.args(["--resume", "--steps", "25"])), "model.safetensors");
}

/// A limit on the size of files stands in for a full disk: the write fails half way in the same
/// place.
#[cfg(unix)]
#[test]
fn a_failed_write_ends_the_run_and_leaves_the_last_checkpoint() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("data"), directory.path().join("run"));
    write_corpus(&data);
    let start = tiny_pretrain(&data, &run);
    let limited = |kib: u32, extra: &[&str]| {
        let mut shell = Command::new("bash");
        shell
            .arg("-c")
            .arg(format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\""))
            .arg(start.get_program());
        shell.args(start.get_args()).args(extra);
        shell
    };
    // Smaller than the tensors, larger than everything else.
    let message = fail(&mut limited(300, &[]));
    assert_sentence(&message, "cannot write");
    assert!(message.contains("model.safetensors"), "{message}");
    let left: Vec<_> =
        fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("checkpoint")), "{left:?}");
    // With room again, the run goes on from what is complete.
    succeed(tiny_pretrain(&data, &run).arg("--resume"));
}
