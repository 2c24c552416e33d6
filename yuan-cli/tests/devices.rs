//! The same programs on every device: `YUAN_DEVICE` names those to compare with `flex`, such as
//! `ndarray,wgpu`.

mod support;

use std::{fs, path::Path};

use serde_json::Value;
use support::{fail, succeed, tiny_pretrain, write_corpus, yuan};
use tempfile::tempdir;

/// Devices to compare with the first.
fn devices() -> Vec<String> {
    let wanted = std::env::var("YUAN_DEVICE").unwrap_or_else(|_| "flex,ndarray".into());
    wanted.split(',').filter(|name| *name != "flex").map(str::to_owned).collect()
}

/// A training run of some steps with a prune in the middle, on a device.
fn train(device: &str, data: &Path, run: &Path, more: &[&str]) {
    let mut command = tiny_pretrain(data, run);
    succeed(
        command.args(["--device", device, "--steps", "16", "--learning-rate", "1e-3"]).args(more),
    );
}

fn events(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn losses(run: &Path) -> Vec<f64> {
    events(run)
        .iter()
        .filter(|event| event["event"] == "step")
        .map(|event| event["loss"].as_f64().unwrap())
        .collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn a_run_with_a_prune_and_its_text_are_the_same_on_every_device() {
    let temp = tempdir().unwrap();
    let data = temp.path().join("data");
    write_corpus(&data);
    // Devices draw other initial weights from a seed: all start from those of one.
    let init = temp.path().join("init");
    train("flex", &data, &init, &["--steps", "12"]);
    let on = |device: &str, name: &str, more: &[&str]| {
        let run = temp.path().join(format!("{}-{name}", device.replace(':', "-")));
        let mut command = yuan("pretrain");
        command.arg("--init").arg(&init).arg("--data").arg(&data).arg("--run").arg(&run);
        command.args([
            "--device",
            device,
            "--steps",
            "16",
            "--batch",
            "2",
            "--seq",
            "32",
            "--learning-rate",
            "1e-3",
        ]);
        command.args(["--window", "2", "--prune-at", "8", "--beta", "0.4", "--min-experts", "2"]);
        command.args(["--validate-every", "8", "--checkpoint-every", "8"]).args(more);
        succeed(&mut command);
        run
    };
    let text = |run: &Path, device: &str| {
        let mut command = yuan("generate");
        command.arg(run).args([
            "the expert of a",
            "--temperature",
            "0",
            "--max-new-tokens",
            "12",
            "--ignore-stop",
        ]);
        succeed(command.args(["--device", device])).0
    };
    let reference = on("flex", "f32", &[]);
    let expected = losses(&reference);
    let plan = |run: &Path| fs::read_to_string(run.join("plan.json")).unwrap();
    assert_eq!(expected.len(), 16);
    for device in devices() {
        let run = on(&device, "f32", &[]);
        // TF32 products of a card drift further than f32 ones.
        let tolerance = if device.starts_with("cuda") { 2e-2 } else { 1e-4 };
        let worst = largest_difference(&losses(&run), &expected);
        assert!(worst <= tolerance, "{device}: losses differ by {worst:e}");
        if !device.starts_with("cuda") {
            assert_eq!(plan(&run), plan(&reference), "{device}");
        }
        // One model, read by both.
        assert_eq!(text(&reference, &device), text(&reference, "flex"), "{device}");
    }
}

#[test]
fn bf16_trains_as_f32_does() {
    let temp = tempdir().unwrap();
    let data = temp.path().join("data");
    write_corpus(&data);
    let [single, half] = ["f32", "bf16"].map(|precision| {
        let run = temp.path().join(precision);
        train("flex", &data, &run, &["--precision", precision]);
        losses(&run)
    });
    assert_eq!(single.len(), 16);
    assert_ne!(single, half, "it is another type");
    let worst = largest_difference(&single, &half);
    assert!(worst < 0.03, "losses differ by {worst}");
}

#[test]
fn a_run_without_fast_versions_learns_the_same() {
    let temp = tempdir().unwrap();
    let data = temp.path().join("data");
    write_corpus(&data);
    let [fast, portable] = [&[][..], &["--portable"]].map(|more| {
        let run = temp.path().join(if more.is_empty() { "fast" } else { "portable" });
        train("flex", &data, &run, more);
        losses(&run)
    });
    let worst = largest_difference(&fast, &portable);
    assert!(worst < 1e-4, "losses differ by {worst:e}");
    assert_ne!(fast, portable, "they round differently");
}

#[test]
fn a_device_that_is_not_there_is_one_sentence() {
    let message = |device: &str| {
        let output = fail(yuan("pretrain").args(["--device", device]));
        // Mesa's drivers may add lines of their own when they are asked for adapters.
        let mut ours = output.lines().filter(|line| line.starts_with("Error: "));
        let sentence = ours.next().unwrap_or_else(|| panic!("{output}")).to_owned();
        assert_eq!(ours.next(), None, "{output}");
        sentence
    };
    let found = message("gpu");
    assert!(
        found.starts_with(
            "Error: there is no device \"gpu\": no backend has this name; found: flex, "
        ),
        "{found}"
    );
    let found = message("flex:3");
    let expected =
        "Error: there is no device \"flex:3\": there are 1, counted from 0; found: flex, ";
    assert!(found.starts_with(expected), "{found}");
}
