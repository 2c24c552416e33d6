//! The smaller examples as a user runs them.

mod support;

use std::{fs, process::Command};

use support::{example, fail, succeed, write_corpus};
use tempfile::tempdir;

#[test]
fn a_model_that_is_no_yuan_is_pruned_and_goes_on_learning() {
    let (out, _) = succeed(&mut Command::new(example("prune_any")));
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
fn the_efficiency_of_ultra_grows_with_each_part_of_laep() {
    let (out, _) = succeed(&mut Command::new(example("efficiency")));
    let tflops = |name: &str| -> f64 {
        let row = out
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("{name}: {out}"));
        row[name.len()..].split_whitespace().next().unwrap().parse().unwrap()
    };
    let (base, pruned) = (tflops("base "), tflops("pruned only "));
    let (both, balanced) = (tflops("pruned and rearranged "), tflops("pruned, perfect balance "));
    assert!(base < pruned && pruned < both && both <= balanced, "{out}");
    let message = fail(Command::new(example("efficiency")).args(["--groups", "16"]));
    assert!(message.contains("--groups 16 does not divide the released count of"), "{message}");
}

#[test]
fn the_ablation_fills_its_tables() {
    let directory = tempdir().unwrap();
    let (data, out) = (directory.path().join("data"), directory.path().join("out"));
    write_corpus(&data);
    let ablation = || {
        let mut command = Command::new(example("ablation"));
        command
            .arg("--data")
            .arg(&data)
            .arg("--out")
            .arg(&out)
            .args(["--seeds", "1", "--steps", "8"]);
        command.args([
            "--prune-at",
            "4",
            "--hidden",
            "16",
            "--layers",
            "2",
            "--experts",
            "4",
            "--batch",
            "2",
        ]);
        command.args(["--seq", "16", "--vocab", "300"]);
        command
    };
    let (table, _) = succeed(&mut ablation());
    for row in [
        "Table 1",
        "Table 2",
        "DeepSeek-V3 auxiliary loss 1e-4",
        "beta 0.05",
        "alpha 0.2 and 0.4 in turn",
    ] {
        assert!(table.contains(row), "{row}: {table}");
    }
    assert!(table.matches("one seed tells nothing").count() >= 8, "{table}");
    assert!(fs::read_to_string(out.join("ablation.svg")).unwrap().contains("beta 0.2"));
    // What is there is not trained again: the second time is told from the outcomes.
    let (again, _) = succeed(&mut ablation());
    assert_eq!(again, table);
    let weights = fs::read_dir(&out).unwrap().flatten().any(|run| {
        fs::read_dir(run.path()).is_ok_and(|mut files| {
            files.any(|file| file.unwrap().file_name().to_string_lossy().starts_with("checkpoint"))
        })
    });
    assert!(!weights, "no weights are kept");
    assert!(
        fail(ablation().args(["--device", "abacus"])).contains("there is no device \"abacus\"")
    );
}
