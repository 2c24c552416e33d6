//! `yuan efficiency` and `yuan ablation`: the calculation and the study of the paper's tables.

mod support;

use std::fs;

use support::{fail, succeed, write_corpus, yuan};
use tempfile::tempdir;

#[test]
fn the_efficiency_of_ultra_grows_with_each_part_of_laep() {
    let (out, _) = succeed(&mut yuan("efficiency"));
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
    // What is needed for either model, and what pruning saves of it.
    let gpus = |name: &str, how: &str| -> usize {
        let row = out.lines().find(|line| line.starts_with(name) && line.contains(how));
        row.unwrap().split_whitespace().nth(5).unwrap().parse().unwrap()
    };
    assert!(gpus("pruned ", "recomputed") < gpus("before ", "recomputed"), "{out}");
    assert!(out.contains("1516.2 B") && out.contains("1010.7 B"), "{out}");
    let (out, _) = succeed(yuan("efficiency").args(["--capacity", "1"]));
    assert!(out.contains("no number of stages fits 1 GB"), "{out}");
    let (out, _) = succeed(yuan("efficiency").args(["--stages", "2"]));
    assert!(out.contains("does not fit"), "{out}");
    let message = fail(yuan("efficiency").args(["--groups", "16"]));
    assert!(message.contains("--groups 16 does not divide the released count of"), "{message}");
}

#[test]
fn the_ablation_fills_its_tables() {
    let directory = tempdir().unwrap();
    let (data, out) = (directory.path().join("data"), directory.path().join("out"));
    write_corpus(&data);
    let ablation = || {
        let mut command = yuan("ablation");
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
    // Every row but the bases and those that the paper does not have: what one seed says of them
    // does not depend on how a CPU rounds.
    assert_eq!(table.matches("one seed tells nothing").count(), 13, "{table}");
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
    // Outcomes of other settings do not mix, and what the ablation did not make stays.
    let message = fail(ablation().args(["--steps", "9"]));
    assert!(message.contains("holds an ablation with other settings"), "{message}");
    let message = fail(ablation().arg("--out").arg(&data));
    assert!(message.contains("data holds no ablation"), "{message}");
    assert!(data.join("text-00.md").is_file());
}
