//! The examples as a user runs them.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Path of an example that Cargo built beside this test.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps/<test>");
    let path = profile.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.exists(), "{} is missing: run `cargo test`, which builds it", path.display());
    path
}

/// Standard output of an example that succeeds.
fn output(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(example(name)).args(arguments).output().expect("it starts");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} failed: {err}");
    out.into_owned()
}

#[test]
fn a_model_that_is_no_yuan_is_pruned_and_goes_on_learning() {
    let out = output("prune_any", &[]);
    let losses: Vec<(f64, &str)> = out
        .lines()
        .filter_map(|line| line.strip_prefix("step ")?.split_once(": loss ")?.1.split_once(", "))
        .map(|(loss, experts)| (loss.parse().unwrap(), experts))
        .collect();
    assert_eq!(losses.len(), 6, "{out}");
    assert_eq!(losses[2].1, "[16] experts");
    assert_ne!(losses[5].1, "[16] experts", "{out}");
    assert!(losses[5].0 < losses[2].0, "it goes on learning with fewer: {out}");
}

#[test]
fn a_callback_of_ones_own_ends_a_run() {
    let out = output("custom_callback", &[]);
    assert!(out.contains("no better than") && out.contains("ended at step"), "{out}");
}

/// Its first steps, a window of loads: what it writes and shows, and not yet what it reads.
#[test]
#[cfg(feature = "images")]
fn pages_are_drawn_learnt_and_shown() {
    let directory = tempfile::tempdir().unwrap();
    let run = Command::new(example("read_pages")).arg("10").current_dir(&directory).output();
    let output = run.expect("it starts");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert!(out.contains("of 100 pages that it never saw."), "{out}");
    let page = std::fs::read_to_string(directory.path().join("runs/read_pages/report.html"));
    let page = page.unwrap();
    assert_eq!(page.matches("<img src=\"data:image/png;base64,").count(), 3);
    assert!(page.contains("Experts of images and of text"), "the loads apart");
}
