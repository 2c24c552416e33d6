//! Whatever ends a run, and however many are started at once: nothing is lost, nothing is mixed,
//! and a resumed run has the losses of the uninterrupted one to the last bit. One harness serves
//! all of it, which is why it is one file.
//!
//! Moments are drawn from a seed over the whole time of a run, preparation included. Here they are
//! few; `YUAN_INTERRUPTIONS=25` makes it so many for each scenario and signal
//! (`scripts/endure.sh`).

#![cfg(unix)]

mod support;

use std::{
    collections::HashSet,
    env, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use support::{fail, succeed, tiny_plain, tiny_pretrain, write_corpus, yuan};
use tempfile::{TempDir, tempdir};
use yuan::{report::History, train::Event};

/// A kind of run that is interrupted.
struct Scenario {
    options: &'static [&'static str],
    /// What must have happened in it, so that it is what its name says.
    words: &'static [&'static str],
}

const ONE_PRUNE: Scenario = Scenario { options: &[], words: &["Prune { step: 12,"] };
const PLAIN: Scenario = Scenario { options: &["--no-laep"], words: &[] };
const ROUNDS: Scenario = Scenario {
    options: &["--prune-at", "18", "--guard", "1.0", "--guard-steps", "3", BESIDE, "on"],
    words: &["Prune { step: 12,", "satisfied: true", "Prune { step: 18,"],
};
const ROLL_BACK: Scenario = Scenario {
    options: &["--guard", "0.0", "--guard-steps", "1", BESIDE, "on"],
    words: &["Prune { step: 12,", "RollBack { step: 13, to_step: 12 }"],
};
const REARRANGE: Scenario =
    Scenario { options: &["--rearrange-every", "2"], words: &["Rearrange { step: 4,"] };
const RANKS: Scenario =
    Scenario { options: &["--device", "flex,flex", BESIDE, "on"], words: &["Prune { step: 12,"] };

/// Checkpoints are written while training goes on.
const BESIDE: &str = "--async-checkpoint";

/// Interruptions of a scenario by one signal.
fn interruptions() -> usize {
    env::var("YUAN_INTERRUPTIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(3)
}

/// Decides the moments; `YUAN_SEED` gives others.
fn seed(what: &str) -> u64 {
    let other: u64 = env::var("YUAN_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    println!("YUAN_SEED={other}");
    let mut hash = DefaultHasher::new();
    (what, other).hash(&mut hash);
    hash.finish()
}

/// Interruptions of one run; then it may end.
const IN_ONE_RUN: usize = 5;

/// What happened in a run, whenever it was interrupted: checkpoints are written then, too.
fn story(run: &Path) -> Vec<Event> {
    let mut story = History::read(run).unwrap().story();
    story.retain(|event| !matches!(event, Event::Checkpoint { .. }));
    story
}

/// A corpus, and a run that nothing interrupts.
struct Reference {
    directory: TempDir,
    story: Vec<Event>,
    took: Duration,
}

impl Reference {
    fn new(scenario: &Scenario) -> Self {
        let directory = tempdir().unwrap();
        write_corpus(&directory.path().join("data"));
        let begun = Instant::now();
        let run = directory.path().join("whole");
        let reference = Self { directory, story: Vec::new(), took: Duration::ZERO };
        succeed(&mut reference.pretrain(&run, scenario));
        let story = story(&run);
        for words in scenario.words {
            let told = |event: &Event| format!("{event:?}").contains(words);
            assert!(story.iter().any(told), "{words}: {story:?}");
        }
        Self { story, took: begun.elapsed(), ..reference }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn pretrain(&self, run: &Path, scenario: &Scenario) -> Command {
        let data = self.path("data");
        let mut command = match scenario.options {
            ["--no-laep"] => tiny_plain(&data, run),
            _ => tiny_pretrain(&data, run),
        };
        command.args(scenario.options).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// The run is complete, is that of the reference, and nothing is left of interruptions.
    fn assert_whole(&self, run: &Path) {
        let found = story(run);
        for (found, expected) in found.iter().zip(&self.story) {
            assert_eq!(found, expected);
        }
        assert_eq!(found.len(), self.story.len());
        for entry in fs::read_dir(run).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let is_left = name.ends_with(".unfinished") || name == "before-prune";
            assert!(!is_left && name != "run.lock", "{name} is left in {}", run.display());
        }
    }
}

fn send(signal: &str, process: &Child) {
    let sent = Command::new("kill").args([signal, &process.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

/// How a process ended, or nothing if it goes on for as long.
fn wait(child: &mut Child, at_most: Duration) -> Option<ExitStatus> {
    let begun = Instant::now();
    while begun.elapsed() < at_most {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(2));
    }
    None
}

/// Starts a run, or goes on with it, and interrupts it after a while; whether it was.
fn interrupt(command: &mut Command, run: &Path, signal: &str, after: Duration) -> bool {
    if run.join("run.json").exists() {
        command.arg("--resume");
    }
    let mut child = command.spawn().unwrap();
    let ended = wait(&mut child, after);
    if ended.is_none() {
        send(signal, &child);
    }
    let output = child.wait_with_output().unwrap();
    let (status, said) = (output.status, String::from_utf8_lossy(&output.stderr).into_owned());
    let is_prepared = run.join("run.json").exists();
    match (ended, signal) {
        (Some(_), _) => assert!(status.success(), "{said}"),
        (None, "-KILL") => {}
        // In its preparation it ends at once; in its last step it is done.
        (None, _) if !is_prepared => assert_eq!(status.signal(), Some(15), "{said}"),
        (None, _) => {
            let interrupted = status.code() == Some(143) || status.signal() == Some(15);
            assert!(interrupted || status.success(), "{status}: {said}");
            if status.code() == Some(143) {
                assert!(said.contains("Go on with:\n  yuan pretrain --resume --run "), "{said}");
                assert!(run.join("report.html").exists());
            }
        }
    }
    ended.is_none()
}

fn endure(scenario: &Scenario, signal: &str) {
    let reference = Reference::new(scenario);
    let (mut left, mut number) = (interruptions(), 0);
    let mut random = StdRng::seed_from_u64(seed(&format!("{signal} {:?}", scenario.options)));
    while left > 0 {
        number += 1;
        let run = reference.path(&format!("interrupted-{number}"));
        for _ in 0..IN_ONE_RUN.min(left) {
            let after = reference.took.mul_f64(random.random_range(0.0..0.9));
            let mut command = reference.pretrain(&run, scenario);
            if !interrupt(&mut command, &run, signal, after) {
                // It was done; the next one is another run.
                break;
            }
            left -= 1;
        }
        interrupt(&mut reference.pretrain(&run, scenario), &run, signal, Duration::from_secs(600));
        reference.assert_whole(&run);
    }
}

macro_rules! scenarios {
    ($($killed:ident, $terminated:ident: $scenario:ident;)*) => {
        $(
            #[test]
            fn $killed() {
                endure(&$scenario, "-KILL");
            }

            #[test]
            fn $terminated() {
                endure(&$scenario, "-TERM");
            }
        )*
    };
}

scenarios! {
    a_plain_run_survives_kills, a_plain_run_survives_warnings: PLAIN;
    a_prune_survives_kills, a_prune_survives_warnings: ONE_PRUNE;
    rounds_under_a_guard_survive_kills, rounds_under_a_guard_survive_warnings: ROUNDS;
    a_roll_back_survives_kills, a_roll_back_survives_warnings: ROLL_BACK;
    rearrangements_survive_kills, rearrangements_survive_warnings: REARRANGE;
    ranks_survive_kills, ranks_survive_warnings: RANKS;
}

#[test]
fn runs_that_start_together_do_not_meet() {
    let reference = Reference::new(&PLAIN);
    let place = reference.path("place");
    fs::create_dir(&place).unwrap();
    for _ in 0..interruptions().div_ceil(5) {
        let start = || {
            let mut command = yuan("pretrain");
            let own = reference.pretrain(Path::new("unused"), &PLAIN);
            let own: Vec<_> = own.get_args().map(ToOwned::to_owned).collect();
            // All but the name of the run.
            let named = own.iter().position(|word| word == "--run").unwrap();
            command.args(&own[1..named]).args(&own[named + 2..]).current_dir(&place);
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let together: Vec<Child> = (0..6).map(|_| start()).collect();
        for child in together {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
    let runs: Vec<PathBuf> =
        fs::read_dir(place.join("runs")).unwrap().map(|run| run.unwrap().path()).collect();
    assert_eq!(runs.len(), 6 * interruptions().div_ceil(5));
    runs.iter().for_each(|run| reference.assert_whole(run));
}

#[test]
fn of_runs_in_one_directory_one_is_made_and_the_others_say_why_not() {
    let reference = Reference::new(&PLAIN);
    for number in 0..interruptions().div_ceil(5) {
        let run = reference.path(&format!("wanted-{number}"));
        let start = || reference.pretrain(&run, &PLAIN).spawn().unwrap();
        let together: Vec<Child> = (0..4).map(|_| start()).collect();
        let mut said = Vec::new();
        for child in together {
            let output = child.wait_with_output().unwrap();
            if !output.status.success() {
                said.push(String::from_utf8_lossy(&output.stderr).into_owned());
            }
        }
        assert_eq!(said.len(), 3, "{said:?}");
        let is_reason = |text: &&String| {
            text.contains("is in use by process") || text.contains("holds a run already")
        };
        assert_eq!(said.iter().filter(is_reason).count(), 3, "{said:?}");
        reference.assert_whole(&run);
    }
}

#[test]
fn a_run_that_goes_on_is_not_resumed_beside() {
    let reference = Reference::new(&ONE_PRUNE);
    let run = reference.path("run");
    let mut live = reference.pretrain(&run, &ONE_PRUNE).spawn().unwrap();
    let begun = Instant::now();
    while !run.join("metrics.jsonl").exists() && begun.elapsed() < Duration::from_secs(120) {
        thread::sleep(Duration::from_millis(2));
    }
    // Stopped, so that it is there for as long as this takes.
    send("-STOP", &live);
    let holder = format!("is in use by process {}", live.id());
    let error = fail(yuan("pretrain").args(["--resume", "--run"]).arg(&run));
    assert!(error.contains(&holder), "{error}");
    let error = fail(&mut reference.pretrain(&run, &ONE_PRUNE));
    assert!(error.contains("holds a run already"), "{error}");
    // Its report can be drawn meanwhile.
    succeed(yuan("report").arg(&run));
    let error =
        fail(yuan("convert").arg(reference.path("whole")).arg(&run).args(["--run", "--overwrite"]));
    assert!(error.contains(&holder), "{error}");
    send("-CONT", &live);
    assert!(live.wait().unwrap().success());
    reference.assert_whole(&run);
}

#[test]
fn a_run_that_is_removed_ends_at_once_and_is_not_made_again() {
    let reference = Reference::new(&PLAIN);
    let run = reference.path("run");
    let live = reference.pretrain(&run, &PLAIN).args(["--steps", "100000"]).spawn().unwrap();
    let begun = Instant::now();
    while !run.join("metrics.jsonl").exists() && begun.elapsed() < Duration::from_secs(120) {
        thread::sleep(Duration::from_millis(2));
    }
    fs::rename(&run, reference.path("moved")).unwrap();
    let output = live.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("was removed or replaced"), "{said}");
    assert!(!run.exists());
}

#[test]
fn a_model_that_is_replaced_is_there_at_any_moment() {
    let reference = Reference::new(&PLAIN);
    let (run, model) = (reference.path("whole"), reference.path("model"));
    let weights = |directory: &Path| fs::read(directory.join("model.safetensors")).unwrap();
    let convert = |to: &Path, dtype: &str| {
        let mut command = yuan("convert");
        command.arg(&run).arg(to).args(["--dtype", dtype, "--overwrite"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let mut allowed = HashSet::new();
    let mut took = Duration::ZERO;
    for dtype in ["f32", "bf16"] {
        let begun = Instant::now();
        assert!(convert(&model, dtype).status().unwrap().success());
        took = begun.elapsed();
        allowed.insert(weights(&model));
    }
    let mut random = StdRng::seed_from_u64(seed("replaced"));
    for number in 0..4 * interruptions() {
        let mut child = convert(&model, ["f32", "bf16"][number % 2]).spawn().unwrap();
        // Mostly towards the end, where one takes the place of the other.
        let after = took.mul_f64(random.random_range(0.5..1.1));
        if wait(&mut child, after).is_none() {
            child.kill().unwrap();
        }
        child.wait().unwrap();
        assert!(allowed.contains(&weights(&model)), "after kill {number}");
    }
    // The next one removes what the killed ones left.
    succeed(convert(&model, "f32").stderr(Stdio::piped()));
    let left = fs::read_dir(reference.path(".")).unwrap().flatten();
    let left = left.filter(|entry| entry.file_name().to_string_lossy().ends_with(".unfinished"));
    assert_eq!(left.count(), 0);
}
