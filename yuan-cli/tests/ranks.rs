//! A run over processes of one device each, as users and launchers start it; and what becomes of it
//! when one of them is killed.
#![cfg(target_os = "linux")]

mod support;

use std::{
    fs,
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use support::{fail, succeed, tiny_plain, tiny_pretrain, write_corpus, yuan};
use tempfile::tempdir;
use yuan::{report::History, train::Event};

/// Losses of all steps, and what was pruned.
fn losses(run: &Path) -> (Vec<f64>, Vec<Vec<usize>>) {
    let (mut losses, mut prunes) = (Vec::new(), Vec::new());
    for event in History::read(run).unwrap().events() {
        match event {
            Event::Step(metrics) => losses.push(metrics.loss),
            Event::Prune { experts_after, .. } => prunes.push(experts_after.clone()),
            _ => {}
        }
    }
    (losses, prunes)
}

#[track_caller]
fn assert_same_run(run: &Path, expected: &Path) {
    let ((found, prunes), (expected, expected_prunes)) = (losses(run), losses(expected));
    assert_eq!(found.len(), expected.len());
    assert_eq!(prunes, expected_prunes);
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        // Sums in another order, carried on by every update.
        assert!((found - expected).abs() < 1e-3, "step {step}: {found} is not {expected}");
    }
}

#[test]
fn processes_of_one_device_each_train_as_one_device_does() {
    let directory = tempdir().unwrap();
    let data = directory.path().join("data");
    write_corpus(&data);
    let one = |batch: &str| {
        let run = directory.path().join(format!("one-{batch}"));
        succeed(tiny_pretrain(&data, &run).args(["--batch", batch]));
        run
    };
    let ones = [one("2"), one("4")];
    for (name, ranks, rows) in [("spread", 2, "1"), ("copied", 2, "2"), ("both", 4, "2")] {
        let run = directory.path().join(name);
        let mut command = tiny_pretrain(&data, &run);
        let (devices, batch) = (vec!["flex"; ranks].join(","), ranks.to_string());
        command.args(["--device", &devices, "--batch", &batch]);
        command.args(["--data-parallel", rows, "--groups", "2"]);
        let (out, _) = succeed(&mut command);
        assert!(out.contains("validation loss") && out.contains("report.html"), "{out}");
        assert_same_run(&run, &ones[ranks / 4]);
        // A checkpoint of ranks is one of one device, too.
        let (text, _) = succeed(yuan("generate").arg(&run).args(["the", "--max-new-tokens", "4"]));
        assert!(!text.trim().is_empty());
        let (shown, _) = succeed(yuan("inspect").arg(&run).arg("--verify"));
        assert!(shown.contains("model-00001.safetensors"), "{shown}");
        let exported = directory.path().join(format!("{name}-exported"));
        succeed(yuan("convert").arg(&run).arg(&exported));
        assert!(exported.join("model.safetensors").is_file());
    }
}

#[test]
fn processes_that_a_launcher_starts_find_each_other() {
    let directory = tempdir().unwrap();
    let (data, one) = (directory.path().join("data"), directory.path().join("one"));
    write_corpus(&data);
    succeed(&mut tiny_pretrain(&data, &one));
    let run = directory.path().join("run");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: usize| {
        let mut command = tiny_pretrain(&data, &run);
        command
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", "2")
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let ranks = [start(1), start(0)].map(|rank| rank.wait_with_output().unwrap());
    for rank in &ranks {
        assert!(rank.status.success(), "{}", String::from_utf8_lossy(&rank.stderr));
    }
    assert!(ranks[0].stdout.is_empty(), "the first rank alone tells of the run");
    assert_same_run(&run, &one);
}

/// The processes that one started.
fn children(parent: u32) -> Vec<u32> {
    let file = format!("/proc/{parent}/task/{parent}/children");
    let list = fs::read_to_string(file).unwrap_or_default();
    list.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

fn is_there(path: &Path) -> bool {
    (0..12_000).any(|_| path.exists() || (thread::sleep(Duration::from_millis(5)), false).1)
}

/// A run on two ranks of so many steps that it goes on when its first checkpoints are seen.
fn long(data: &Path, run: &Path, steps: &str) -> Command {
    let mut command = yuan("pretrain");
    command.arg("--data").arg(data).arg("--run").arg(run).args(["--steps", steps]);
    let options = "--layers 2 --hidden 32 --experts 8 --vocab 300 --batch 2 --seq 32 \
        --validate-every 50 --checkpoint-every 3 --window 2 --beta 0.4 --min-experts 2 \
        --learning-rate 1e-2 --device flex,flex --groups 2";
    command.args(options.split_whitespace());
    command
}

#[test]
fn a_rank_that_is_killed_ends_all_and_the_run_goes_on_from_its_checkpoint() {
    let directory = tempdir().unwrap();
    let (data, whole) = (directory.path().join("data"), directory.path().join("whole"));
    write_corpus(&data);
    let on_ranks = |run: &Path| {
        let mut command = long(&data, run, "150");
        command.args(["--prune-at", "12"]);
        command
    };
    succeed(&mut on_ranks(&whole));
    // In a step, while experts move, and while a checkpoint is written, as nearly as that can be met.
    let is_writing = |run: &Path| {
        let names = fs::read_dir(run).into_iter().flatten().flatten().map(|file| file.file_name());
        names.into_iter().any(|name| name.to_string_lossy().ends_with(".unfinished"))
    };
    type Moment<'a> = (usize, &'a dyn Fn(&Path) -> bool);
    let moments: [Moment<'_>; 3] = [
        (0, &|run| run.join("checkpoint-00000006").exists()),
        (1, &|run| run.join("plan.json").exists()),
        (1, &|run| run.join("checkpoint-00000003").exists() && is_writing(run)),
    ];
    for (number, (victim, is_time)) in moments.into_iter().enumerate() {
        let run = directory.path().join(format!("killed-{number}"));
        let process = on_ranks(&run).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut looks = 0..60_000;
        assert!(looks.any(|_| is_time(&run) || (thread::sleep(Duration::from_millis(1)), false).1));
        let ranks = children(process.id());
        assert_eq!(ranks.len(), 2);
        signal("-9", ranks[victim]);
        let ended = process.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("rank {victim} failed (signal: 9")), "{said}");
        assert!(said.contains(&format!("rank {victim} is gone")), "the other one says so: {said}");
        succeed(yuan("pretrain").args(["--resume", "--run"]).arg(&run));
        assert_same_run(&run, &whole);
    }
}

#[test]
fn ranks_end_with_the_process_that_started_them_and_pause_on_its_signal() {
    let directory = tempdir().unwrap();
    let data = directory.path().join("data");
    write_corpus(&data);
    let start = |run: &Path| {
        let mut command = long(&data, run, "100000");
        command.arg("--no-laep").process_group(0);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let run = directory.path().join("killed");
    let mut process = start(&run);
    assert!(is_there(&run.join("checkpoint-00000003")));
    let ranks = children(process.id());
    signal("-9", process.id());
    process.wait().unwrap();
    let is_gone = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.is_empty() || status.contains("State:\tZ")
    };
    let all_gone = (0..200).any(|_| {
        thread::sleep(Duration::from_millis(50));
        ranks.iter().all(is_gone)
    });
    assert!(all_gone, "{ranks:?}");

    // A scheduler's signal goes to one process, a terminal's to all of its group.
    for (name, is_to_group, status) in [("-TERM", false, 143), ("-INT", true, 130)] {
        let run = directory.path().join(format!("paused{name}"));
        let process = start(&run);
        assert!(is_there(&run.join("checkpoint-00000003")));
        let pid = process.id().to_string();
        let to = if is_to_group { format!("-{pid}") } else { pid };
        assert!(Command::new("kill").args([name, "--", &to]).status().unwrap().success());
        let ended = process.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(status), "{said}");
        assert!(said.contains("Interrupted after step"), "{said}");
        let steps = losses(&run).0.len() + 2;
        let mut resume = yuan("pretrain");
        resume.args(["--resume", "--steps", &steps.to_string(), "--run"]).arg(&run);
        succeed(&mut resume);
        assert_eq!(losses(&run).0.len(), steps);
    }
}

#[test]
fn a_run_that_cannot_be_spread_is_refused_before_it_begins() {
    let directory = tempdir().unwrap();
    let data = directory.path().join("data");
    write_corpus(&data);
    let mut command = tiny_plain(&data, &directory.path().join("run"));
    let error = fail(command.args(["--device", "flex,flex,flex", "--no-laep"]));
    assert!(error.contains("a batch of 2 rows is too small for 3 ranks"), "{error}");
    let error = fail(yuan("rank").args(["--run", "nowhere", "--device", "flex"]));
    assert!(error.contains("yuan rank is started by yuan pretrain"), "{error}");
}

#[test]
fn a_rank_that_hangs_is_named_and_ends_the_run() {
    let directory = tempdir().unwrap();
    let (data, run) = (directory.path().join("data"), directory.path().join("run"));
    write_corpus(&data);
    let mut command = long(&data, &run, "100000");
    command.args(["--no-laep", "--patience", "8"]);
    let process = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(is_there(&run.join("checkpoint-00000003")));
    signal("-STOP", children(process.id())[1]);
    let ended = process.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("rank 1 said nothing for 8 s"), "{said}");
}
