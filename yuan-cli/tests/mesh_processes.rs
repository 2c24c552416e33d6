//! A mesh whose devices are processes of their own, on loopback: the wires, and what happens when
//! one is cut.
#![cfg(feature = "remote")]

#[path = "../../yuan-train/tests/support/mesh.rs"]
mod runs;
mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use burn::tensor::{
    Device,
    remote::{ConnectError, RemoteHost},
};
use runs::{
    STEPS, Story, TOLERANCE, assert_close, assert_same_story, fresh_mesh_model, fresh_model,
    gradients, model_config, open_on_mesh, open_on_one, state, story, train_config,
};
use support::{fail, succeed, tiny_pretrain, write_corpus, yuan};
use tempfile::tempdir;
use yuan::{
    model::{DeviceMesh, MeshModel},
    train::{
        Callback, Checkpoint, Context, LossOptions, StepMetrics, TrainConfig, TrainError, Watch,
    },
};

/// A process that serves one device; it ends with the test.
struct Worker {
    process: Child,
    url: String,
}

impl Worker {
    fn start() -> Self {
        Self::start_with("")
    }

    /// With a secret, if it is not empty.
    fn start_with(token: &str) -> Self {
        let mut process = yuan("worker")
            .arg("--until-stdin-ends")
            .env(yuan::model::TOKEN, token)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().rsplit(' ').next().unwrap().to_owned();
        assert!(url.starts_with("ws://127.0.0.1:"), "{line}");
        Self { process, url }
    }

    fn device(&self) -> Device {
        yuan::device(&self.url).unwrap()
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn workers(count: usize) -> Vec<Worker> {
    (0..count).map(|_| Worker::start()).collect()
}

/// A process that does not answer any more must fail a test, not hang all of them.
fn in_time(test: impl FnOnce() + Send + 'static) {
    let test = std::thread::spawn(test);
    let begin = Instant::now();
    while !test.is_finished() {
        assert!(begin.elapsed() < Duration::from_secs(300), "hangs");
        std::thread::sleep(Duration::from_millis(50));
    }
    test.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn mesh(workers: &[Worker], data: usize) -> DeviceMesh {
    DeviceMesh::new(workers.iter().map(Worker::device).collect(), data).unwrap().autodiff()
}

#[test]
fn a_mesh_of_processes_has_the_losses_and_gradients_of_one_device() {
    in_time(compare_with_one_device);
}

fn compare_with_one_device() {
    let home = Device::flex().autodiff();
    let expected = gradients(&fresh_model(&model_config(), &home), &home, LossOptions::default());
    // A remote operation is a message: accumulation is tested where devices are near (`mesh.rs`).
    let config = TrainConfig { accumulation: 1, ..train_config() };
    let one = tempdir().unwrap();
    let mut trainer = open_on_one(&config, one.path());
    trainer.run().unwrap();
    let (expected_story, expected_state) =
        (story(one.path()), state(trainer.model(), trainer.optimizer()));

    let workers = workers(4);
    for [data, expert] in [[1, 1], [1, 2], [2, 1], [2, 2], [1, 4]] {
        let mesh = mesh(&workers[..data * expert], data);
        let found = gradients(
            &fresh_mesh_model(&model_config(), &mesh),
            mesh.home(),
            LossOptions::default(),
        );
        assert!((found.loss - expected.loss).abs() <= TOLERANCE * expected.loss);
        assert_close(&found.by_path, &expected.by_path, TOLERANCE);
        // Before and after a prune with rearrangement in the middle, and another rearrangement.
        let run = tempdir().unwrap();
        let mut trainer = open_on_mesh(&config, run.path(), &mesh);
        trainer.run().unwrap();
        assert_same_story(&story(run.path()), &expected_story);
        assert_close(
            &state(trainer.model(), trainer.optimizer()),
            &expected_state,
            100.0 * TOLERANCE,
        );
    }
}

/// Kills a worker: after a step, or in the middle of the prune, when experts are about to move.
struct KillAt {
    step: u64,
    worker: Arc<Mutex<Worker>>,
    while_moving: bool,
}

impl Callback<MeshModel> for KillAt {
    fn name(&self) -> &'static str {
        "kill"
    }

    fn on_step(
        &mut self,
        _: &mut Context<'_, MeshModel>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        if metrics.step == self.step && !self.while_moving {
            // In the middle of the next step.
            let worker = self.worker.clone();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                worker.lock().unwrap().kill();
            });
        }
        Ok(())
    }

    fn on_step_end(&mut self, context: &mut Context<'_, MeshModel>) -> Result<(), TrainError> {
        if context.step() != self.step || !self.while_moving {
            return Ok(());
        }
        let moved = context.cut(|model| {
            // The first half of the experts is on its way when the worker dies.
            let swapped = vec![vec![vec![4, 5, 6, 7], vec![0, 1, 2, 3]]; 2];
            let result = model.place_experts(&swapped);
            self.worker.lock().unwrap().kill();
            result
        });
        moved.map(drop)
    }
}

/// A run on two workers, one of which dies, that must end in time with a sentence and go on alone.
fn check_death(while_moving: bool, expected: &Story) {
    let config = TrainConfig { checkpoint_every: Some(2), steps: STEPS, ..train_config() };
    let run = tempdir().unwrap();
    let [first, second]: [Worker; 2] = workers(2).try_into().ok().unwrap();
    let servers =
        [&first, &second].map(|worker| worker.url.strip_prefix("ws://").unwrap().to_owned());
    let mesh = DeviceMesh::new(vec![first.device(), second.device()], 1).unwrap().autodiff();
    let worker = Arc::new(Mutex::new(second));
    let patience = Duration::from_secs(60);
    let watch = Watch { servers: servers.to_vec(), ranks: None, patience };
    let (begin, directory, the_config) = (Instant::now(), run.path().to_owned(), config.clone());
    let killer = KillAt { step: 4, worker, while_moving };
    let error = watch
        .supervise(move |pulse| {
            let trainer = open_on_mesh(&the_config, &directory, &mesh);
            trainer.with_callback(pulse)?.with_callback(killer)?.run()
        })
        .unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(50), "no hang");
    let message = error.to_string();
    let gone = format!("the device served at {} does not answer any more", servers[1]);
    assert!(message.starts_with(&gone), "{message}");
    let latest = Checkpoint::latest(run.path()).unwrap().unwrap();
    assert!(latest.step == 4 || latest.step == 2, "{}", latest.step);

    // The lines of the steps that the checkpoint does not know are dropped when the run goes on.
    let mut resumed = open_on_one(&config, run.path());
    assert_eq!(resumed.step(), latest.step);
    resumed.run().unwrap();
    assert_same_story(&story(run.path()), expected);
}

#[test]
fn a_mesh_that_loses_a_process_ends_with_a_sentence_and_goes_on_on_fewer_devices() {
    let config = TrainConfig { checkpoint_every: Some(2), ..train_config() };
    let one = tempdir().unwrap();
    open_on_one(&config, one.path()).run().unwrap();
    let expected = story(one.path());
    check_death(false, &expected);
    check_death(true, &expected);
}

#[test]
fn pretrain_trains_on_a_mesh_of_workers_and_names_those_that_are_missing() {
    in_time(train_on_workers);
}

fn train_on_workers() {
    let data = tempdir().unwrap();
    write_corpus(data.path());
    let runs = tempdir().unwrap();
    let mut workers = workers(2);
    let devices = format!("{},{}", workers[0].url, workers[1].url);
    let (alone, together) = (runs.path().join("alone"), runs.path().join("together"));
    succeed(tiny_pretrain(data.path(), &alone).args(["--groups", "2"]));
    succeed(tiny_pretrain(data.path(), &together).args(["--device", &devices]));
    assert_same_story(&shortened(&together), &shortened(&alone));
    let events = fs::read_to_string(together.join("metrics.jsonl")).unwrap();
    assert!(!events.contains("\"bytes_moved\":0"), "experts moved between the processes");

    let small = ["--device", &devices, "--batch", "1"];
    let error = fail(tiny_pretrain(data.path(), &runs.path().join("small")).args(small));
    assert!(error.contains("a batch of 1 rows is too small for 2 devices"), "{error}");
    let shy = Worker::start_with("secret");
    let asked = |token: &str| {
        let run = runs.path().join(format!("asked {token}"));
        let mut pretrain = tiny_pretrain(data.path(), &run);
        pretrain.args(["--device", &shy.url, "--steps", "12"]).env(yuan::model::TOKEN, token);
        pretrain
    };
    succeed(&mut asked("secret"));
    let error = fail(&mut asked("guess"));
    let refused = format!("there is no device \"{}\": its YUAN_TOKEN is not the one", shy.url);
    assert!(error.contains(&refused), "{error}");
    // Who does not say of which version it is may be of another one.
    let host = RemoteHost::websocket(&workers[0].url);
    assert!(matches!(Device::remote_options(&host).init(), Err(ConnectError::Unauthorized)));

    workers[1].kill();
    let error =
        fail(tiny_pretrain(data.path(), &runs.path().join("dead")).args(["--device", &devices]));
    assert!(error.contains(&format!("there is no device \"{}\"", workers[1].url)), "{error}");
}

/// The first steps: later ones drift apart, since the learning rate is large.
fn shortened(run: &Path) -> Story {
    let mut story = story(run);
    story.numbers.retain(|number| number.0 <= 6);
    story
}
