//! A run that is killed at any moment goes on exactly where its last checkpoint left it.

mod support;

use std::{fs, path::Path, process::Stdio, thread, time::Duration};

use support::{succeed, tiny_pretrain, write_corpus};
use tempfile::tempdir;
use yuan::{
    report::History,
    train::{Event, PruneExperts},
};

fn metrics_lines(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

fn writes_a_checkpoint(run: &Path) -> bool {
    let names = fs::read_dir(run).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| name.to_string_lossy().ends_with(".unfinished"))
}

/// Starts the run (or goes on with it) and kills it (SIGKILL) as soon as `now` holds.
///
/// Says whether it was killed: a run that ended first was not.
fn kill_when(data: &Path, run: &Path, options: &[&str], now: impl Fn() -> bool) -> bool {
    let mut command = tiny_pretrain(data, run);
    command.args(options);
    if run.join("run.json").exists() {
        command.arg("--resume");
    } else {
        // Killed before it was prepared: there is nothing to go on with.
        drop(fs::remove_dir_all(run));
    }
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "a resumed run failed");
            return false;
        }
        if now() {
            child.kill().unwrap();
            child.wait().unwrap();
            return true;
        }
        thread::sleep(Duration::from_micros(200));
    }
}

/// Kills a run at six moments, and goes on each time; three rounds of that, some steps apart.
fn check(options: &[&str], expected_words: &[&str]) {
    let directory = tempdir().unwrap();
    let (data, whole) = (directory.path().join("data"), directory.path().join("whole"));
    write_corpus(&data);
    succeed(tiny_pretrain(&data, &whole).args(options));
    let expected = History::read(&whole).unwrap().story();
    for words in expected_words {
        let told = |event: &Event| format!("{event:?}").contains(words);
        assert!(expected.iter().any(told), "{words}: {expected:?}");
    }
    let mut kills = 0;
    for round in 0..3 {
        let run = directory.path().join(format!("killed-{round}"));
        // In preparation, at some steps, while checkpoints are written, and around the prune.
        let pruned = run.join(PruneExperts::PLAN);
        let moments: [&dyn Fn() -> bool; 6] = [
            &|| run.exists(),
            &|| metrics_lines(&run) > 2 + 2 * round,
            &|| writes_a_checkpoint(&run),
            &|| pruned.exists(),
            &|| metrics_lines(&run) > 26 + round && writes_a_checkpoint(&run),
            &|| metrics_lines(&run) > 30 + 2 * round,
        ];
        kills += moments.iter().filter(|moment| kill_when(&data, &run, options, moment)).count();
        kill_when(&data, &run, options, || false);
        let found = History::read(&run).unwrap().story();
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found, expected, "round {round}");
        }
        assert_eq!(found.len(), expected.len(), "round {round}");
        assert!(!run.join("before-prune").exists(), "nothing is left to go back to");
    }
    assert!(kills >= 9, "only {kills} of 18 kills came before the end of a run");
}

#[test]
fn a_killed_run_resumes_with_identical_losses() {
    check(&[], &["Prune { step: 12,"]);
}

#[test]
fn a_killed_run_of_two_rounds_under_a_guard_does_too() {
    let options = ["--prune-at", "18", "--guard", "1.0", "--guard-steps", "3"];
    check(&options, &["Prune { step: 12,", "satisfied: true", "Prune { step: 18,"]);
}

#[test]
fn a_killed_run_whose_prune_is_undone_does_too() {
    check(
        &["--guard", "0.0", "--guard-steps", "1"],
        &["Prune { step: 12,", "RollBack { step: 13, to_step: 12 }"],
    );
}
