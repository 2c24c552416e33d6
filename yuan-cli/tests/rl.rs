//! Learning from rewards through the program: a run, its interruption, its ranks, and what is refused.

mod support;

use std::{fs, path::Path, process::Command};

use serde_json::Value;
use support::{fail, succeed, tiny_plain, write_corpus, yuan};
use tempfile::{TempDir, tempdir};

/// A small model, and questions some of whose answers it says by chance: its texts have many an "a".
fn made() -> TempDir {
    let home = tempdir().unwrap();
    write_corpus(&home.path().join("text"));
    succeed(&mut tiny_plain(&home.path().join("text"), &home.path().join("base")));
    let line =
        |n: usize| format!("{{\"prompt\": \"the load of expert {n} is\", \"answer\": \"a\"}}\n");
    fs::write(home.path().join("questions.jsonl"), (0..60).map(line).collect::<String>()).unwrap();
    home
}

fn rl(home: &Path, run: &str, more: &[&str]) -> Command {
    let mut command = yuan("rl");
    command.arg(home.join("base")).arg("--data").arg(home.join("questions.jsonl"));
    command.arg("--run").arg(home.join(run));
    let options = "--steps 4 --prompts 6 --answers 4 --mini-batch 2 --max-new-tokens 24 \
        --prompt-tokens 40 --learning-rate 1e-3 --checkpoint-every 1";
    command.args(options.split_whitespace()).args(more);
    command
}

fn events(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// All of a run but its times.
fn story(run: &Path) -> Vec<Value> {
    let mut events = events(run);
    events.retain(|event| event["event"] != "start" && event["event"] != "change");
    for event in &mut events {
        event["seconds"] = 0.into();
    }
    events
}

#[test]
fn a_model_learns_from_rewards_and_an_interrupted_run_goes_on() {
    let home = made();
    let (out, err) = succeed(&mut rl(home.path(), "run", &[]));
    assert!(err.contains("% right, reward"), "{err}");
    assert!(!out.contains("pruned"), "{out}");
    let run = home.path().join("run");
    let rollouts: Vec<Value> =
        events(&run).into_iter().filter(|event| event["event"] == "rollout").collect();
    assert!(rollouts.iter().any(|event| event["held_out"] == true));
    assert!(rollouts.iter().any(|event| event["held_out"] == false && event["learnt"] != 0));
    assert!(run.join("rollouts.svg").is_file());
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.contains("<h2>Rewards</h2>") && page.contains("\"/right\""), "{page}");

    // Four steps are no window of loads.
    let error = fail(yuan("plan").arg(&run));
    assert!(error.contains("has no loads yet"), "{error}");

    // A run that has ended can be extended.
    let pieces = home.path().join("pieces");
    succeed(&mut rl(home.path(), "pieces", &["--steps", "3"]));
    let mut resume = yuan("pretrain");
    resume.args(["--resume", "--steps", "4", "--run"]).arg(&pieces);
    succeed(&mut resume);
    let last = |run: &Path| story(run).into_iter().rfind(|event| event["event"] == "step");
    assert_eq!(last(&pieces).unwrap()["step"], 4);

    // What it keeps of its data is known again.
    let kept = run.join("data/questions.jsonl");
    let changed = fs::read_to_string(&kept).unwrap().replace("expert 7", "expert 8");
    fs::write(&kept, changed).unwrap();
    let mut resume = yuan("pretrain");
    resume.args(["--resume", "--steps", "5", "--run"]).arg(&run);
    let error = fail(&mut resume);
    assert!(error.contains("questions.jsonl: it is not what was written"), "{error}");
    assert!(error.contains("begin another run from this one"), "{error}");
    fs::remove_file(run.join("tokenizer.json")).unwrap();
    let inspected = yuan("inspect").arg(&run).output().unwrap();
    let listed = String::from_utf8_lossy(&inspected.stdout).into_owned();
    assert!(listed.contains("tokenizer.json is missing"), "{listed}");
}

#[test]
fn two_ranks_learn_together() {
    let home = made();
    succeed(&mut rl(home.path(), "one", &[]));
    succeed(&mut rl(home.path(), "two", &["--device", "flex,flex"]));
    let first = |run: &str| {
        let mut rollouts =
            story(&home.path().join(run)).into_iter().filter(|event| event["event"] == "rollout");
        let mut first = rollouts.next().unwrap();
        // Three prompts make two for each rank, so one of them is read twice.
        first["layers"].take();
        first
    };
    assert_eq!(first("two"), first("one"));
    let steps = |run: &str| {
        events(&home.path().join(run)).iter().filter(|event| event["event"] == "step").count()
    };
    assert_eq!((steps("one"), steps("two")), (4, 4));
}

#[test]
fn what_cannot_be_learnt_is_refused_in_a_sentence() {
    let home = made();
    let file = home.path().join("questions.jsonl");
    let refused = |more: &[&str]| fail(&mut rl(home.path(), "none", more));
    for (options, sentence) in [
        (&["--answers", "1"][..], "answers = 1 must be at least 2"),
        (&["--mini-batch", "0"], "must be at least 1"),
        (&["--mini-batch", "7"], "mini_batch = 7 must be at most the 6 prompts"),
        (&["--prompts", "99999999999"], "must be at most 1048576"),
        (&["--answers", "99999999999"], "must be at most 1048576"),
        (&["--batch", "3"], "--batch 3 does not divide the 8 answers of an update"),
        (&["--overlong-buffer", "4"], "--overlong-buffer goes with --reward outcome"),
        (&["--entropy-share", "2"], "share = 2 must be above 0 and at most 1"),
        (&["--prompt-tokens", "3"], "tokens of a prompt = "),
        (&["--chat"], "chat template"),
    ] {
        let error = refused(options);
        assert!(error.contains(sentence), "{options:?}: {error}");
        assert!(!error.contains("panicked"), "{error}");
        fs::remove_dir_all(home.path().join("none")).ok();
    }
    fs::write(&file, "{\"prompt\": \"a\", \"answer\": \"b\"}\n{\"prompt\": \"a\"}\n").unwrap();
    let error = refused(&[]);
    assert!(
        error.contains("questions.jsonl: ") && error.contains("line 2: missing field"),
        "{error}"
    );
    assert!(!home.path().join("none").exists(), "nothing is left");
    fs::write(&file, "{\"prompt\": \"a\", \"answer\": \"zzz\"}\n").unwrap();
    let error = refused(&["--prompts", "2", "--reward", "outcome"]);
    assert!(error.contains("rewarded alike"), "{error}");
    let error = fail(yuan("rl").arg(home.path().join("base")));
    assert!(error.contains("--data <FILE>"), "{error}");
    fs::remove_file(&file).unwrap();
    let error = fail(&mut rl(home.path(), "gone", &[]));
    assert!(error.contains("cannot read") && error.contains("questions.jsonl"), "{error}");
}
