//! From a run to published weights, to fewer experts, to text, as a user does it.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use serde_json::Value;
use support::{fail, succeed, tiny_pretrain, write_corpus, yuan};
use tempfile::{TempDir, tempdir};
use yuan::train::Checkpoint;

/// A run of some steps, pruned on the way; made once for all tests.
fn run() -> &'static Path {
    static RUN: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, run) = RUN.get_or_init(|| {
        let directory = tempdir().unwrap();
        let (data, run) = (directory.path().join("data"), directory.path().join("run"));
        write_corpus(&data);
        succeed(&mut tiny_pretrain(&data, &run));
        (directory, run)
    });
    run
}

fn command(name: &str, arguments: &[&Path]) -> Command {
    let mut command = yuan(name);
    command.args(arguments);
    command
}

/// The text that a model continues a prompt with, always its likeliest.
fn generated(model: &Path, prompt: &str) -> String {
    let mut command = command("generate", &[model]);
    command.args([prompt, "--temperature", "0", "--max-new-tokens", "24", "--ignore-stop"]);
    succeed(&mut command).0
}

fn inventory(model: &Path) -> Value {
    let (out, _) = succeed(command("inspect", &[model]).arg("--json"));
    serde_json::from_str(&out).unwrap()
}

#[test]
fn a_trained_and_pruned_run_goes_to_hugging_faces_layout_and_back() {
    let temp = tempdir().unwrap();
    let [exported, half, back, again] =
        ["exported", "half", "back", "again"].map(|name| temp.path().join(name));
    let from_run = generated(run(), "the expert of");
    assert!(from_run.starts_with("the expert of") && from_run.len() > 30, "{from_run}");

    let (out, _) = succeed(command("convert", &[run(), &exported]).args(["--shard-size", "200kB"]));
    assert!(
        out.contains("Hugging Face's layout") && out.contains("problems           none"),
        "{out}"
    );
    assert!(exported.join("model.safetensors.index.json").is_file());
    assert!(
        exported.join("tokenizer.json").is_file()
            && exported.join("tokenizer_config.json").is_file()
    );
    let config: Value =
        serde_json::from_str(&fs::read_to_string(exported.join("config.json")).unwrap()).unwrap();
    let experts = &config["moe_config"]["per_layer_experts_blocks"];
    assert!(
        experts.as_array().unwrap().iter().any(|count| count.as_u64().unwrap() < 8),
        "{config}"
    );
    assert_eq!(inventory(run())["experts_per_layer"], *experts);
    assert_eq!(inventory(&exported)["parameters"], inventory(run())["stored_elements"]);
    assert_eq!(generated(&exported, "the expert of"), from_run);

    succeed(command("convert", &[&exported, &back]).arg("--run"));
    assert_eq!(inventory(&back)["layout"], "run");
    assert_eq!(generated(&back, "the expert of"), from_run);
    succeed(&mut command("convert", &[&back, &again]));
    let bytes = |path: &Path| fs::read(path.join("model.safetensors")).unwrap();
    let once = temp.path().join("once");
    succeed(&mut command("convert", &[run(), &once]));
    assert!(bytes(&again) == bytes(&once), "there and back changes nothing");

    succeed(command("convert", &[&exported, &half]).args(["--dtype", "bf16"]));
    let types = inventory(&half)["types"].clone();
    assert_eq!(types.as_object().unwrap().keys().collect::<Vec<_>>(), ["BF16"]);
    assert_eq!(
        types["BF16"]["bytes"].as_u64().unwrap() * 2,
        inventory(&once)["types"]["F32"]["bytes"].as_u64().unwrap()
    );
    generated(&half, "the expert of");
}

#[test]
fn a_plan_prunes_published_weights_without_the_model() {
    let temp = tempdir().unwrap();
    let [exported, pruned, plan] =
        ["exported", "pruned", "plan.json"].map(|name| temp.path().join(name));
    succeed(&mut command("convert", &[run(), &exported]));
    let before = inventory(&exported);
    let loads = temp.path().join("loads.json");
    let layers: Vec<Vec<usize>> = before["experts_per_layer"]
        .as_array()
        .unwrap()
        .iter()
        .map(|count| (0..count.as_u64().unwrap() as usize).map(|expert| 10 + 7 * expert).collect())
        .collect();
    fs::write(&loads, serde_json::json!({ "layers": layers }).to_string()).unwrap();
    let mut planning = command("plan", &[&loads]);
    succeed(planning.args(["--beta", "0.3", "--top-k", "2", "--save"]).arg(&plan));
    let (out, _) = succeed(&mut command("prune", &[&exported, &plan, &pruned]));
    assert!(out.contains("% pruned), written to"), "{out}");
    let after = inventory(&pruned);
    assert!(after["parameters"].as_u64() < before["parameters"].as_u64());
    assert_eq!(after["problems"], serde_json::json!([]));
    let metadata = fs::read_to_string(pruned.join("pruned_metadata.json")).unwrap();
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    assert_eq!(metadata["original_experts_per_layer"], before["experts_per_layer"]);
    assert_eq!(metadata["per_layer_experts_blocks"], after["experts_per_layer"]);
    generated(&pruned, "the expert of");

    let error = fail(&mut command("prune", &[&exported, &plan, &pruned]));
    assert_eq!(
        error.trim_end(),
        format!("Error: {} already exists: add --overwrite to replace it", pruned.display())
    );
    let error = fail(&mut command("prune", &[&pruned, &plan, &temp.path().join("more")]));
    assert!(error.contains("is no plan for this model: "), "{error}");
    let error = fail(&mut command("prune", &[run(), &plan, &temp.path().join("more")]));
    assert!(
        error.contains("is a run: `yuan convert` makes it a directory in Hugging Face's layout"),
        "{error}"
    );
    assert!(!temp.path().join("more").exists());
}

#[test]
fn prompts_come_from_arguments_or_standard_input_and_draws_repeat_by_seed() {
    let draw = |seed: &str| {
        let mut command = command("generate", &[run()]);
        command.args([
            "the token of",
            "the load",
            "--max-new-tokens",
            "12",
            "--temperature",
            "1.5",
            "--seed",
            seed,
        ]);
        let (out, err) = succeed(&mut command);
        assert!(err.contains("tokens read in") && err.contains("generated at"), "{err}");
        out
    };
    assert_eq!(draw("1"), draw("1"));
    assert_ne!(draw("1"), draw("2"));
    let mut piped = command("generate", &[run()]);
    piped.args(["--temperature", "0", "--max-new-tokens", "24", "--ignore-stop"]);
    let prompt = tempdir().unwrap();
    fs::write(prompt.path().join("prompt"), "the expert of\n").unwrap();
    piped.stdin(Stdio::from(fs::File::open(prompt.path().join("prompt")).unwrap()));
    assert_eq!(succeed(&mut piped).0, generated(run(), "the expert of"));

    let error = fail(command("generate", &[run()]).args(["hello", "--top-p", "0"]));
    assert_eq!(
        error.trim_end(),
        "Error: top_p = 0 is out of range: expected above 0 and at most 1"
    );
    let error = fail(command("generate", &[run()]).args(["hello", "--chat"]));
    assert_eq!(
        error.trim_end(),
        "Error: chat template: the model has none, so it cannot chat: give it a text to continue"
    );
    let error = fail(command("generate", &[run()]).arg(""));
    assert_eq!(
        error.trim_end(),
        "Error: there is no prompt: give one as an argument or on standard input"
    );
    let empty = tempdir().unwrap();
    let error = fail(command("generate", &[empty.path()]).arg("hello"));
    assert!(error.contains("cannot read ") && error.contains("config.json"), "{error}");
}

#[test]
fn training_goes_on_from_any_model() {
    let temp = tempdir().unwrap();
    let [exported, data, second] =
        ["exported", "data", "second"].map(|name| temp.path().join(name));
    succeed(&mut command("convert", &[run(), &exported]));
    write_corpus(&data);
    let template = "{% for m in messages %}U: {{ m.content }} A:{% endfor %}";
    fs::write(exported.join("chat_template.jinja"), template).unwrap();
    fs::write(exported.join("generation_config.json"), r#"{"eos_token_id": [0, 10]}"#).unwrap();
    let mut pretrain = command("pretrain", &[]);
    pretrain.arg("--data").arg(&data).arg("--run").arg(&second).arg("--init").arg(&exported);
    pretrain.args([
        "--steps",
        "2",
        "--batch",
        "2",
        "--seq",
        "32",
        "--no-laep",
        "--learning-rate",
        "1e-9",
    ]);
    succeed(&mut pretrain);
    assert_eq!(inventory(&second)["experts_per_layer"], inventory(&exported)["experts_per_layer"]);
    // A chat model stays one: its template and the tokens that end an answer.
    for name in ["chat_template.jinja", "generation_config.json", "tokenizer.json"] {
        let [before, after] =
            [&exported, &second].map(|directory| fs::read(directory.join(name)).unwrap());
        assert!(before == after, "{name}");
    }
    succeed(command("generate", &[&second]).args([
        "--chat",
        "the expert",
        "--max-new-tokens",
        "1",
    ]));
    // At a learning rate of nothing the model is the one that it started from.
    assert_eq!(generated(&second, "the expert of"), generated(&exported, "the expert of"));
    let error =
        fail(command("pretrain", &[]).arg("--init").arg(&exported).args(["--experts", "4"]));
    assert!(error.contains("cannot be used with"), "{error}");
}

#[test]
fn a_damaged_checkpoint_is_shown_with_what_is_wrong() {
    let temp = tempdir().unwrap();
    let exported = temp.path().join("exported");
    succeed(&mut command("convert", &[run(), &exported]));
    let file = fs::OpenOptions::new().write(true).open(exported.join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1000).unwrap();
    let output = command("inspect", &[&exported]).output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{out}");
    assert!(
        out.contains("model.safetensors is cut off: 1000 bytes of its tensors are missing"),
        "{out}"
    );
    let error = fail(&mut command("convert", &[&exported, &temp.path().join("copy")]));
    assert!(error.contains("the file is cut off: 1000 bytes"), "{error}");
    assert!(!temp.path().join("copy").exists());
}

/// A file-size limit stands in for a full disk: the same call fails, with another number.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_previous_output_as_it_was() {
    let temp = tempdir().unwrap();
    let exported = temp.path().join("exported");
    succeed(&mut command("convert", &[run(), &exported]));
    let before = fs::read(exported.join("model.safetensors")).unwrap();
    let convert = yuan("convert");
    let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\" --overwrite";
    let mut limited = Command::new("bash");
    let error = fail(
        limited
            .args(["-c", script])
            .arg(convert.get_program())
            .args(convert.get_args())
            .arg(run())
            .arg(&exported),
    );
    assert!(error.contains("cannot write ") && error.contains("File too large"), "{error}");
    assert!(fs::read(exported.join("model.safetensors")).unwrap() == before);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1, "nothing half-written is left");
}

#[test]
fn replacing_a_model_spares_whatever_is_none() {
    let temp = tempdir().unwrap();
    let path = |name: &str| temp.path().join(name);
    fs::write(path("file"), "mine").unwrap();
    fs::create_dir(path("photos")).unwrap();
    fs::write(path("photos").join("cat.png"), "mine").unwrap();
    let convert = |from: &Path, to: &Path| {
        let mut convert = command("convert", &[from, to]);
        convert.arg("--overwrite");
        convert
    };
    let error = fail(&mut convert(run(), &path("file")));
    assert!(error.contains("file is a file: name a directory to write"), "{error}");
    let error = fail(&mut convert(run(), &path("photos")));
    assert!(error.contains("photos is no directory of a model alone"), "{error}");
    // Nor is a project that has a `config.json`, and runs below it.
    fs::create_dir(path("project")).unwrap();
    fs::write(path("project").join("config.json"), "{}").unwrap();
    let error = fail(&mut convert(run(), &path("project")));
    assert!(error.contains("project is no directory of a model alone"), "{error}");
    support::copy_directory(run(), &path("project").join("runs").join("first"));
    fail(&mut convert(run(), &path("project")));
    assert!(path("project").join("runs").join("first").join("run.json").exists());
    // By another spelling, and from inside of it.
    let spelled = run().join("..").join(run().file_name().unwrap());
    let error = fail(&mut convert(run(), &spelled));
    assert!(error.contains("which is read: name another directory"), "{error}");
    let checkpoint = Checkpoint::latest(run()).unwrap().unwrap().path;
    let error = fail(&mut convert(&checkpoint, run()));
    assert!(error.contains("which is read: name another directory"), "{error}");
    let mut left: Vec<_> =
        fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "photos", "project"]);
    assert_eq!(fs::read_to_string(path("file")).unwrap(), "mine");
    assert!(path("photos").join("cat.png").is_file() && run().join("run.json").is_file());
    // A model is replaced.
    succeed(&mut command("convert", &[run(), &path("model")]));
    succeed(&mut convert(run(), &path("model")));
}

#[test]
fn a_checkpoint_is_found_from_inside_of_it() {
    let checkpoint = Checkpoint::latest(run()).unwrap().unwrap().path;
    let mut inside = command("generate", &[Path::new(".")]);
    inside.args(["the expert of", "--temperature", "0", "--max-new-tokens", "24", "--ignore-stop"]);
    let (out, _) = succeed(inside.current_dir(&checkpoint));
    assert_eq!(out, generated(run(), "the expert of"));
}

#[test]
fn more_tokens_than_there_are_positions_are_refused() {
    let mut endless = command("generate", &[run()]);
    let output =
        endless.args(["hello", "--max-new-tokens", "18446744073709551615"]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("max_new_tokens is too large"), "{error}");
    assert_eq!((output.status.code(), output.stdout), (Some(1), Vec::new()));
}
