//! `yuan pretrain --resume`: what may change, what is refused, and what damage is found.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use support::{copy_directory, fail, succeed, tiny_pretrain, write_corpus, yuan};
use tempfile::{TempDir, tempdir};
use yuan::{
    report::History,
    train::{Checkpoint, Event, Run},
};

/// A corpus and a finished run of 24 steps with a prune after step 12 and the checkpoints of steps
/// 21 and 24; made once.
fn finished() -> &'static Path {
    static MADE: OnceLock<TempDir> = OnceLock::new();
    MADE.get_or_init(|| {
        let directory = tempdir().unwrap();
        write_corpus(&directory.path().join("data"));
        let (data, run) = (directory.path().join("data"), directory.path().join("run"));
        succeed(&mut tiny_pretrain(&data, &run));
        directory
    })
    .path()
}

/// A copy of the finished run that a test may damage.
struct Copy {
    directory: TempDir,
    run: PathBuf,
}

fn copy() -> Copy {
    let directory = tempdir().unwrap();
    let run = directory.path().join("run");
    copy_directory(&finished().join("run"), &run);
    Copy { directory, run }
}

/// A copy without its last checkpoint: it goes on from step 21.
fn unfinished() -> Copy {
    let copy = copy();
    fs::remove_dir_all(copy.run.join("checkpoint-00000024")).unwrap();
    copy
}

fn resume(run: &Path, options: &str) -> Command {
    let mut command = yuan("pretrain");
    command.args(["--resume", "--run"]).arg(run).args(options.split_whitespace());
    command
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn last_validation(run: &Path) -> (u64, f64) {
    History::read(run).unwrap().validations().last().unwrap()
}

#[test]
fn what_may_change_changes_and_is_told() {
    let Copy { run, directory: _kept } = copy();
    let (_, said) = succeed(&mut resume(&run, ""));
    assert!(said.contains("is finished: all its 24 steps are taken"), "{said}");
    // The options that the run was made with, and those that may be others.
    let same = "--batch 2 --learning-rate 0.010 --prune-at 12 --steps 30 --checkpoint-every 0";
    let (_, said) = succeed(&mut resume(&run, same));
    assert!(said.contains("steps is 30 from here on; it was 24"), "{said}");
    assert_eq!(Checkpoint::latest(&run).unwrap().unwrap().step, 30);
    assert_eq!(Run::open(&run).unwrap().config().checkpoint_every, None);
    let history = History::read(&run).unwrap();
    let changes = history.events().iter().filter(|event| matches!(event, Event::Change { .. }));
    assert_eq!(changes.count(), 2, "steps and checkpoint_every");
    // What was changed stays so.
    let (_, said) = succeed(&mut resume(&run, ""));
    assert!(said.contains("all its 30 steps are taken"), "{said}");
    let error = fail(&mut resume(&run, "--steps 29"));
    assert!(error.contains("has taken 30 steps already"), "{error}");
}

#[test]
fn what_may_not_change_is_refused_by_name() {
    let Copy { run, directory: _kept } = unfinished();
    for (option, reason) in [
        ("--learning-rate 1e-4", "--learning-rate 1e-4: the run in "),
        ("--seq 64", "was made with 32"),
        ("--no-laep", "--no-laep: the run in "),
        ("--seed 1", "was made with 0"),
        ("--guard 0.1", "was made without"),
        ("--data elsewhere", "--data "),
    ] {
        let output = resume(&run, option).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{option}: {said}");
        assert!(said.contains(reason) && said.lines().count() == 1, "{option}: {said}");
    }
    assert_eq!(Checkpoint::latest(&run).unwrap().unwrap().step, 21, "nothing was trained");
    fs::remove_file(run.join("options.toml")).unwrap();
    let error = fail(&mut resume(&run, "--seq 32"));
    assert!(error.contains("goes on by its own settings"), "{error}");
    succeed(&mut resume(&run, ""));
}

#[test]
fn the_latest_run_is_resumed_when_none_is_named() {
    let Copy { directory, run } = unfinished();
    let mut command = yuan("pretrain");
    let error = fail(command.arg("--resume").current_dir(directory.path()));
    assert!(error.contains("there is no run in runs to resume"), "{error}");
    let runs = directory.path().join("runs");
    fs::create_dir(&runs).unwrap();
    copy_directory(&finished().join("run"), &runs.join("older"));
    let old = fs::File::options().append(true).open(runs.join("older/metrics.jsonl")).unwrap();
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    old.set_modified(long_ago).unwrap();
    fs::File::options()
        .append(true)
        .open(runs.join("older/run.json"))
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    fs::rename(&run, runs.join("newer")).unwrap();
    succeed(command.current_dir(directory.path()));
    assert!(runs.join("newer/checkpoint-00000024").is_dir());
}

#[test]
fn a_run_goes_on_on_any_ranks_that_its_experts_suffice_for() {
    // Its two groups do not fit three devices, nor its two rows four.
    for (options, steps) in [("--device flex,flex", 24), ("--device flex,flex --groups 1", 25)] {
        let Copy { run, directory: _kept } = unfinished();
        succeed(&mut resume(&run, &format!("{options} --steps {steps}")));
        let (step, loss) = last_validation(&run);
        let (_, expected) = last_validation(&finished().join("run"));
        assert_eq!(step, steps);
        assert!((loss - expected).abs() < 0.2, "{options}: {loss}, {expected}");
    }
    let Copy { run, directory: _kept } = unfinished();
    let error = fail(&mut resume(&run, "--device flex,flex,flex"));
    assert!(error.contains("a batch of 2 rows is too small for 3 ranks"), "{error}");
}

#[test]
fn rows_and_groups_that_do_not_fit_the_devices_are_shared_as_they_can_be() {
    let directory = tempdir().unwrap();
    let run = directory.path().join("run");
    let mut made = tiny_pretrain(&finished().join("data"), &run);
    succeed(made.args(["--batch", "4", "--device", "flex,flex,flex,flex", "--groups", "4"]));
    fs::remove_dir_all(run.join("checkpoint-00000024")).unwrap();
    let (_, expected) = last_validation(&run);
    for (devices, is_told) in [("flex,flex,flex", true), ("flex", false)] {
        let again = directory.path().join(devices.len().to_string());
        copy_directory(&run, &again);
        let (_, said) = succeed(&mut resume(&again, &format!("--device {devices}")));
        assert_eq!(said.contains("cannot be shared equally by 3 devices"), is_told, "{said}");
        let (step, loss) = last_validation(&again);
        assert_eq!(step, 24);
        assert!((loss - expected).abs() < 1e-2, "{devices}: {loss}, {expected}");
    }
}

#[test]
fn damaged_history_is_kept_aside_and_named() {
    let lines = fs::read_to_string(finished().join("run/metrics.jsonl")).unwrap().lines().count();
    let Copy { run, directory: _kept } = unfinished();
    let metrics = run.join("metrics.jsonl");
    let mut bytes = fs::read(&metrics).unwrap();
    bytes[40] = 0xff;
    fs::write(&metrics, &bytes).unwrap();
    let (out, said) = succeed(&mut resume(&run, ""));
    let told =
        "1 lines of metrics.jsonl are lost: what there was is kept in metrics.damaged-1.jsonl";
    assert!(said.contains(told), "{said}");
    assert_eq!(fs::read(run.join("metrics.damaged-1.jsonl")).unwrap(), bytes);
    assert!(History::read(&run).unwrap().events().len() > lines - 3);
    assert!(!out.contains("Nothing was pruned"), "{out}");

    let Copy { run, directory: _kept } = unfinished();
    fs::remove_file(run.join("metrics.jsonl")).unwrap();
    let (out, said) = succeed(&mut resume(&run, ""));
    assert!(said.contains("lines of metrics.jsonl are lost: the file is gone"), "{said}");
    assert!(!out.contains("Nothing was pruned"), "{out}");
    // It is told once.
    let (_, said) = succeed(&mut resume(&run, "--steps 26"));
    assert!(!said.contains("are lost"), "{said}");
}

#[test]
fn a_damaged_checkpoint_names_the_last_good_one() {
    let model = "checkpoint-00000024/model.safetensors";
    let optimizer = "checkpoint-00000024/optimizer.safetensors";
    type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
    let damages: [Damage<'_>; 6] = [
        ("model.safetensors is damaged", &|run| flip(&run.join(model), 5000)),
        ("optimizer.safetensors is damaged", &|run| {
            let path = run.join(optimizer);
            let mut bytes = fs::read(&path).unwrap();
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[header..].fill(0);
            fs::write(path, bytes).unwrap();
        }),
        ("model.safetensors", &|run| {
            let older = run.join("checkpoint-00000021/model.safetensors");
            fs::copy(older, run.join(model)).unwrap();
        }),
        ("state.json", &|run| {
            let path = run.join("checkpoint-00000024/state.json");
            let text = fs::read_to_string(&path).unwrap();
            fs::write(path, text.replace("\"consumed_rows\": 48", "\"consumed_rows\": 47"))
                .unwrap();
        }),
        ("were written", &|run| {
            let path = run.join("checkpoint-00000024/state.json");
            let text = fs::read_to_string(&path).unwrap();
            let most = "\"consumed_rows\": 18446744073709551615";
            fs::write(path, text.replace("\"consumed_rows\": 48", most)).unwrap();
        }),
        ("config.json", &|run| {
            fs::remove_file(run.join("checkpoint-00000024/config.json")).unwrap();
        }),
    ];
    for (reason, damage) in damages {
        let Copy { run, directory: _kept } = copy();
        damage(&run);
        let error = fail(&mut resume(&run, "--steps 25"));
        let errors = error.lines().filter(|line| line.starts_with("Error: ")).count();
        assert!(error.contains(reason) && errors == 1, "{reason}: {error}");
        assert!(error.contains("checkpoint-00000021 is whole: remove "), "{reason}: {error}");
        let listed = yuan("inspect").arg(&run).arg("--verify").output().unwrap();
        let said = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(!listed.status.success(), "{reason}: {said}");
        // Without config.json there is nothing to list.
        if reason != "config.json" {
            assert!(said.contains("remove checkpoint-00000024 to go on from"), "{reason}: {said}");
        }
        fs::remove_dir_all(run.join("checkpoint-00000024")).unwrap();
        succeed(&mut resume(&run, ""));
    }
}

#[test]
fn what_only_looks_like_a_checkpoint_is_none() {
    let Copy { run, directory: _kept } = unfinished();
    fs::write(run.join("checkpoint-99"), "a file").unwrap();
    fs::create_dir(run.join("checkpoint-500")).unwrap();
    succeed(&mut resume(&run, ""));
    // Nor does another library's make a run of published weights.
    let Copy { directory, run } = copy();
    let published = directory.path().join("published");
    succeed(yuan("convert").arg(&run).arg(&published));
    copy_directory(&run.join("checkpoint-00000021"), &published.join("checkpoint-00000021"));
    let (out, _) = succeed(yuan("inspect").arg(&published));
    assert!(out.contains("Hugging Face's layout"), "{out}");
}

#[test]
fn tokens_that_are_not_those_of_the_run_are_refused() {
    let train = |run: &Path| run.join("data/train.bin");
    type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
    let damages: [Damage<'_>; 3] = [
        ("train.bin: it has ", &|run| {
            let bytes = fs::read(train(run)).unwrap();
            fs::write(train(run), &bytes[..bytes.len() / 8 * 4]).unwrap();
        }),
        ("train.bin: it is damaged: its checksum", &|run| flip(&train(run), 0)),
        ("it is not the data set `text` that the run was made with", &|run| {
            let text = fs::read_to_string(run.join("data.json")).unwrap();
            let mut data: serde_json::Value = serde_json::from_str(&text).unwrap();
            data["sets"][0]["checksum"]["crc32"] = 7.into();
            fs::write(run.join("data.json"), data.to_string()).unwrap();
        }),
    ];
    for (reason, damage) in damages {
        let Copy { run, directory: _kept } = unfinished();
        damage(&run);
        let error = fail(&mut resume(&run, ""));
        assert!(error.contains(reason) && error.lines().count() == 1, "{reason}: {error}");
    }
}

#[test]
fn settings_that_were_edited_are_checked() {
    for (from, to, reason) in [
        ("\"seq_len\": 32", "\"seq_len\": 0", "seq_len must be at least 1"),
        ("\"windows\": 3", "\"windows\": 18446744073709551615", "is not allowed"),
        ("\"beta\": 0.4", "\"beta\": 2.0", "beta = 2 is not allowed"),
    ] {
        let Copy { run, directory: _kept } = unfinished();
        let text = fs::read_to_string(run.join("run.json")).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(run.join("run.json"), text.replace(from, to)).unwrap();
        let error = fail(&mut resume(&run, ""));
        assert!(error.contains("run.json: ") && error.contains(reason), "{error}");
    }
}

#[test]
fn a_preparation_that_failed_or_was_killed_leaves_nothing_in_the_way() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("little"), directory.path().join("run"));
    fs::create_dir(&data).unwrap();
    fs::write(data.join("a.txt"), "too little").unwrap();
    // A directory that was there before stays, and one that was made goes.
    fail(&mut tiny_pretrain(&data, &run));
    assert!(!run.exists());
    fs::create_dir(&run).unwrap();
    fail(&mut tiny_pretrain(&data, &run));
    assert!(run.read_dir().unwrap().next().is_none());
    // What a killed preparation leaves.
    fs::create_dir(run.join("data")).unwrap();
    for name in ["run.lock", "data/train.bin", "tokenizer.json.77-3.unfinished"] {
        fs::write(run.join(name), "left").unwrap();
    }
    let error = fail(&mut resume(&run, ""));
    assert!(error.contains("was never prepared to the end: start it again"), "{error}");
    succeed(tiny_pretrain(&finished().join("data"), &run).args(["--steps", "13"]));
    assert!(run.join("data/dataset.json").exists());
    assert!(!run.join("tokenizer.json.77-3.unfinished").exists());
}
