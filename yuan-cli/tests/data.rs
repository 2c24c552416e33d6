//! `yuan prepare`, training on what it made, and `yuan finetune`.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};

/// Runs the program in a directory.
fn yuan(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_yuan"));
    command.current_dir(directory).args(arguments).output().expect("the program starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Text of some megabytes, a tenth of it twice.
fn write_text(directory: &Path, documents: usize) {
    fs::create_dir(directory).unwrap();
    let line = |i: usize| {
        let words = (0..120).map(|word| format!("word{} ", word * (i % 90 + 7) % 211 + i % 3));
        serde_json::json!({"text": words.collect::<String>(), "id": i}).to_string() + "\n"
    };
    let lines: String = (0..documents).map(line).collect();
    fs::write(directory.join("lines.jsonl"), lines).unwrap();
    let text: String = (0..40_000).map(|i| format!("of its own{}\n", i % 4001)).collect();
    fs::write(directory.join("text.md"), text).unwrap();
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect()
}

#[test]
fn a_preparation_killed_at_any_moment_goes_on_and_makes_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let text = temp.path().join("text");
    write_text(&text, 6_000);
    let command = |out: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_yuan"));
        command.arg("prepare").arg(&text).args(["--vocab", "400", "--out"]);
        command.arg(temp.path().join(out)).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    assert!(command("whole").args(["--threads", "1"]).status().unwrap().success());
    let whole = files(&temp.path().join("whole"));
    let mut killed = 0;
    for wait in (0..).map(|round| 20 + round * 37 % 600) {
        let mut process = command("killed").spawn().unwrap();
        sleep(Duration::from_millis(wait));
        let done = process.try_wait().unwrap();
        process.kill().unwrap();
        let status = process.wait().unwrap();
        if done.is_some() {
            assert!(status.success());
            break;
        }
        killed += 1;
        // However slow the machine is, it comes to an end.
        if killed == 12 {
            assert!(command("killed").status().unwrap().success());
            break;
        }
    }
    assert!(killed > 0);
    assert!(files(&temp.path().join("killed")) == whole, "after {killed} kills");
}

#[test]
fn prepared_sets_are_mixed_by_weight_and_remembered() {
    let temp = tempfile::tempdir().unwrap();
    write_text(&temp.path().join("web-text"), 800);
    write_text(&temp.path().join("code-text"), 500);
    let prepare = |name: &str, more: &[&str]| {
        let text = format!("{name}-text");
        let arguments = [&["prepare", &text, "--out", name], more].concat();
        let output = yuan(temp.path(), &arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        output
    };
    let output = prepare("web", &["--vocab", "300"]);
    assert!(stdout(&output).contains("tokens to train on, in "), "{}", stdout(&output));
    assert!(stderr(&output).contains("duplicates of documents"), "{}", stderr(&output));
    prepare("code", &["--tokenizer", "web"]);
    let sets = ["--data", "web=0.7:web", "--data", "code=0.3:code"];
    let tiny = "pretrain --run run --steps 4 --batch 2 --seq 32 --layers 1 --hidden 32 --experts 4 \
                --no-laep --validate-every 2 --schedule wsd --decay-steps 2";
    let arguments: Vec<&str> = tiny.split_whitespace().chain(sets).collect();
    let output = yuan(temp.path(), &arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let metrics = fs::read_to_string(temp.path().join("run/metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"sets\":{\"code\":"), "losses of every set");
    let options = fs::read_to_string(temp.path().join("run/options.toml")).unwrap();
    assert!(options.contains("\"web=0.7:/") && options.contains("\"code=0.3:/"), "{options}");
    // Resumed, the sets are the run's, and no others.
    let resume = ["pretrain", "--resume", "--run", "run", "--steps", "6"];
    let output = yuan(temp.path(), &resume);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = yuan(temp.path(), &[&resume[..], &["--data", "web"]].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));

    let refused = |arguments: &[&str], sentence: &str| {
        let output = yuan(temp.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(sentence), "{}", stderr(&output));
    };
    refused(
        &["pretrain", "--data", "web=0.7:web", "--data", "text=0.3:code-text"],
        "code-text holds no prepared data set (dataset.json), which alone can be mixed: yuan prepare \
         code-text --out DIR makes one",
    );
    refused(&["pretrain", "--data", "web=much:web"], "`much` is no weight");
    refused(
        &["prepare", "web-text", "--out", "web-text/tokens"],
        "lies within web-text, whose files are read",
    );
    refused(&["prepare", "web-text", "--out", "web"], "web holds a complete data set already");
}

#[test]
fn a_model_is_tuned_on_conversations_and_answers() {
    let temp = tempfile::tempdir().unwrap();
    write_text(&temp.path().join("text"), 500);
    let base = "pretrain --run base --data text --vocab 300 --steps 2 --batch 2 --seq 64 --layers 1 \
                --hidden 32 --experts 4 --no-laep";
    let output = yuan(temp.path(), &base.split_whitespace().collect::<Vec<_>>());
    assert!(output.status.success(), "{}", stderr(&output));
    let conversation = |i: usize| {
        let (question, answer) = (format!("word{i}?"), format!("word{}", i + 1));
        serde_json::json!({"prompt": question, "response": answer}).to_string() + "\n"
    };
    fs::write(temp.path().join("chat.jsonl"), (0..80).map(conversation).collect::<String>())
        .unwrap();
    let tune = "finetune base --data chat.jsonl --run tuned --steps 3 --batch 2 --seq 64 --isolate \
                --validation 0.2";
    let output = yuan(temp.path(), &tune.split_whitespace().collect::<Vec<_>>());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("turns are written as User: … and Assistant: …"));
    let resume = ["pretrain", "--resume", "--run", "tuned", "--steps", "4"];
    let output = yuan(temp.path(), &resume);
    assert!(output.status.success(), "{}", stderr(&output));
    // The template came along, into an export, too, and chatting needs nothing else.
    for directory in ["tuned", "exported"] {
        if directory == "exported" {
            let output = yuan(temp.path(), &["convert", "tuned", "exported"]);
            assert!(output.status.success(), "{}", stderr(&output));
        }
        assert!(temp.path().join(directory).join("chat_template.jinja").is_file());
        let chat = ["generate", directory, "--chat", "word3?", "--max-new-tokens", "4"];
        let output = yuan(temp.path(), &chat);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let refused = |arguments: &str, sentence: &str| {
        let output = yuan(temp.path(), &arguments.split_whitespace().collect::<Vec<_>>());
        assert!(!output.status.success());
        assert!(stderr(&output).contains(sentence), "{}", stderr(&output));
    };
    refused("finetune base", "name the conversations, or questions about images, with --data FILE");
    refused("finetune base --data nowhere.jsonl", "cannot read nowhere.jsonl");
    refused("finetune base --data chat.jsonl --vocab 400", "cannot be used with");
    refused("finetune text --data chat.jsonl", "text");
}
