//! A run over ranks is the run on one device: losses, loads, prunes, checkpoints and updates, of
//! which every rank makes its part. The ranks are threads here.

mod support {
    pub mod ranks;
}

use std::{collections::HashMap, fs, path::Path};

use burn::tensor::Device;
use support::ranks::{
    TOLERANCE, assert_close, assert_same_story, device_of, fresh_model, home, model_config,
    open_on_one, state, story, streams, train_config, two_epochs_around_a_rearrangement,
};
use tempfile::tempdir;
use yuan_model::{
    YuanModel,
    ranks::{RankError, Ranks, on_threads},
};
use yuan_report::History;
use yuan_train::{
    Callback, Checkpoint, Context, Event, MetricsFile, PruneExperts, StepMetrics, TrainConfig,
    TrainError, Trainer,
};

/// Rows of the grid and ranks of a row.
const SHAPES: [[usize; 2]; 6] = [[1, 1], [1, 2], [2, 1], [2, 2], [1, 4], [4, 1]];

/// Trains on ranks from where the run in `run_dir` stands; what each of them returned.
fn train(
    config: &TrainConfig,
    run_dir: &Path,
    shape: [usize; 2],
    more: impl Fn(Trainer<YuanModel>, &Ranks) -> Trainer<YuanModel> + Sync,
) -> Vec<Result<u64, TrainError>> {
    let [data, expert] = shape;
    let whole = fresh_model(&model_config(), &Device::flex());
    on_threads(data * expert, |world| {
        let ranks = Ranks::new(world, data)?;
        let device = device_of(ranks.world().rank());
        let (config, streams) = (config.clone(), streams(config.seq_len));
        let trainer = match Checkpoint::latest(run_dir)? {
            Some(saved) => {
                Trainer::resume_on_rank(config, run_dir, &device, &ranks, &saved, streams)?
            }
            None => {
                let part = YuanModel::part_of(&whole, &ranks, &device)?;
                Trainer::new(config, run_dir, &device, part, streams)?
            }
        };
        let trainer = match ranks.world().is_first() {
            true => trainer.with_callback(MetricsFile::default())?,
            false => trainer,
        };
        let mut trainer = more(trainer, &ranks);
        trainer.run()?;
        Ok(trainer.step())
    })
}

fn train_all(config: &TrainConfig, run_dir: &Path, shape: [usize; 2]) {
    for result in train(config, run_dir, shape, |trainer, _| trainer) {
        result.unwrap();
    }
}

/// Parameters and moments of a checkpoint.
fn state_of(checkpoint: &Checkpoint, config: &TrainConfig) -> HashMap<String, Vec<f32>> {
    let (model, optimizer, _) = checkpoint.load::<YuanModel>(&config.optimizer, &home()).unwrap();
    state(&model, &optimizer)
}

#[test]
fn a_run_over_ranks_is_the_run_on_one_device_through_prune_and_rearrangement() {
    let config = train_config();
    let one = tempdir().unwrap();
    let mut trainer = open_on_one(&config, one.path());
    trainer.run().unwrap();
    let expected = state(trainer.model(), trainer.optimizer());
    let pruned = trainer.model().config().experts_per_layer.iter().any(|&experts| experts < 8);
    assert!(pruned);
    for shape in SHAPES {
        let run = tempdir().unwrap();
        train_all(&config, run.path(), shape);
        assert_same_story(&story(run.path()), &story(one.path()));
        let last = Checkpoint::latest(run.path()).unwrap().unwrap();
        // Ten steps of AdamW carry rounding on: its updates do not grow with the gradient.
        assert_close(&state_of(&last, &config), &expected, 100.0 * TOLERANCE);
    }
}

#[test]
fn a_run_over_ranks_repeats_to_the_last_bit() {
    let config = train_config();
    let runs = [tempdir().unwrap(), tempdir().unwrap()];
    let saved = runs.each_ref().map(|run| {
        train_all(&config, run.path(), [2, 2]);
        let last = Checkpoint::latest(run.path()).unwrap().unwrap();
        let mut files: Vec<_> =
            fs::read_dir(&last.path).unwrap().map(|file| file.unwrap().path()).collect();
        files.retain(|file| file.extension().is_some_and(|kind| kind == "safetensors"));
        files.sort();
        assert_eq!(files.len(), 8, "two of every rank");
        files.into_iter().map(|file| fs::read(file).unwrap()).collect::<Vec<_>>()
    });
    assert!(saved[0] == saved[1]);
}

#[test]
fn a_checkpoint_of_any_ranks_goes_on_on_any_others() {
    let config = TrainConfig { checkpoint_every: Some(6), keep_checkpoints: 9, ..train_config() };
    let saved = tempdir().unwrap();
    train_all(&config, saved.path(), [1, 4]);
    let whole = story(saved.path());
    let at_six =
        Checkpoint::list(saved.path()).unwrap().into_iter().find(|saved| saved.step == 6).unwrap();
    let expected = state_of(&Checkpoint::latest(saved.path()).unwrap().unwrap(), &config);
    for shape in SHAPES {
        let run = tempdir().unwrap();
        let copy = run.path().join("checkpoint-00000006");
        fs::create_dir(&copy).unwrap();
        for file in fs::read_dir(&at_six.path).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), copy.join(file.file_name())).unwrap();
        }
        train_all(&config, run.path(), shape);
        let mut rest = whole.clone();
        rest.numbers.retain(|number| number.0 > 6);
        rest.loads.retain(|load| load.0 > 6);
        assert_same_story(&story(run.path()), &rest);
        let last = Checkpoint::latest(run.path()).unwrap().unwrap();
        assert_eq!(last.step, config.steps);
        assert_close(&state_of(&last, &config), &expected, 100.0 * TOLERANCE);
    }
}

#[test]
fn after_a_rearrangement_ranks_are_loaded_as_the_plan_says() {
    let config = two_epochs_around_a_rearrangement();
    let run = tempdir().unwrap();
    train_all(&config, run.path(), [2, 2]);
    let (mut measured, mut planned) = (Vec::new(), Vec::new());
    for event in History::read(run.path()).unwrap().events() {
        match event {
            Event::Step(metrics) => measured.push(metrics.device_max_over_mean.clone()),
            Event::Prune { layers, bytes_moved, .. } => {
                planned.push(layers.iter().map(|layer| layer.groups_before).collect::<Vec<_>>());
                planned.push(layers.iter().map(|layer| layer.groups_after).collect());
                assert!(*bytes_moved > 0);
            }
            _ => {}
        }
    }
    assert_eq!(measured, planned, "before and after");
    assert!(run.path().join(PruneExperts::PLAN).exists());
}

/// What one rank asks for, all do.
struct StopOnLast(bool);

impl<M> Callback<M> for StopOnLast {
    fn name(&self) -> &'static str {
        "stop_on_last"
    }

    fn on_step(&mut self, context: &mut Context<'_, M>, _: &StepMetrics) -> Result<(), TrainError> {
        if self.0 && context.step() == 3 {
            context.request_stop();
        }
        Ok(())
    }
}

#[test]
fn a_wish_of_any_rank_is_heard_by_all() {
    let run = tempdir().unwrap();
    let ended = train(&train_config(), run.path(), [1, 3], |trainer, ranks| {
        trainer.with_callback(StopOnLast(ranks.world().rank() == 2)).unwrap()
    });
    assert!(ended.into_iter().all(|step| step.unwrap() == 3));
    assert_eq!(Checkpoint::latest(run.path()).unwrap().unwrap().step, 3);
}

/// Fails on one rank in the middle of a run.
struct Fail(bool);

impl<M> Callback<M> for Fail {
    fn name(&self) -> &'static str {
        "fail"
    }

    fn on_step(&mut self, context: &mut Context<'_, M>, _: &StepMetrics) -> Result<(), TrainError> {
        match self.0 && context.step() == 4 {
            true => Err(TrainError::Lost("rank 1 fails".into())),
            false => Ok(()),
        }
    }
}

#[test]
fn a_rank_that_fails_ends_the_run_of_all() {
    let run = tempdir().unwrap();
    let config = TrainConfig { checkpoint_every: Some(2), ..train_config() };
    let ended = train(&config, run.path(), [2, 1], |trainer, ranks| {
        trainer.with_callback(Fail(ranks.world().rank() == 1)).unwrap()
    });
    let [first, second] = <[_; 2]>::try_from(ended).unwrap();
    assert!(matches!(second, Err(TrainError::Lost(_))));
    assert!(matches!(first, Err(TrainError::Ranks(RankError::Gone { rank: 1 }))), "{first:?}");
    // It goes on from its last checkpoint, on one rank less.
    assert_eq!(Checkpoint::latest(run.path()).unwrap().unwrap().step, 2);
    train_all(&config, run.path(), [1, 1]);
    assert_eq!(Checkpoint::latest(run.path()).unwrap().unwrap().step, config.steps);
}

#[test]
fn a_batch_that_is_too_small_for_the_ranks_is_refused() {
    let config = TrainConfig { batch_size: 1, ..train_config() };
    let run = tempdir().unwrap();
    for ended in train(&config, run.path(), [2, 1], |trainer, _| trainer) {
        assert_eq!(ended.unwrap_err().to_string(), "a batch of 1 rows is too small for 2 ranks");
    }
}

/// Files with tensors of all checkpoints of a run.
fn tensors_of(run: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for checkpoint in Checkpoint::list(run).unwrap() {
        checkpoint.verify().unwrap();
        for file in fs::read_dir(&checkpoint.path).unwrap() {
            let file = file.unwrap().path();
            if file.extension().is_some_and(|kind| kind == "safetensors") {
                let name = file.strip_prefix(run).unwrap().to_string_lossy().into_owned();
                files.push((name, fs::read(file).unwrap()));
            }
        }
    }
    files.sort();
    files
}

/// Steps, and the steps of which checkpoints are told, as the metrics list them.
fn told(run: &Path) -> (Vec<u64>, Vec<u64>) {
    let (mut steps, mut checkpoints) = (Vec::new(), Vec::new());
    for event in History::read(run).unwrap().events() {
        match event {
            Event::Step(metrics) => steps.push(metrics.step),
            Event::Checkpoint { step } => checkpoints.push(*step),
            _ => {}
        }
    }
    (steps, checkpoints)
}

#[test]
fn checkpoints_of_ranks_that_are_written_beside_the_training_are_those_that_stop_it() {
    let config = TrainConfig { checkpoint_every: Some(2), keep_checkpoints: 9, ..train_config() };
    for shape in [[1, 1], [2, 2]] {
        let runs = [false, true].map(|async_checkpoint| {
            let run = tempdir().unwrap();
            train_all(&TrainConfig { async_checkpoint, ..config.clone() }, run.path(), shape);
            run
        });
        let [stopping, beside] = [&runs[0], &runs[1]].map(tempfile::TempDir::path);
        assert!(tensors_of(stopping) == tensors_of(beside), "{shape:?}");
        assert_eq!(told(stopping), told(beside));
        // Whatever the metrics told after it, a run goes on from each of them as if it never stopped.
        for at in [4, 8] {
            let again = tempdir().unwrap();
            fs::copy(beside.join("metrics.jsonl"), again.path().join("metrics.jsonl")).unwrap();
            let name = format!("checkpoint-{at:08}");
            fs::create_dir(again.path().join(&name)).unwrap();
            for file in fs::read_dir(beside.join(&name)).unwrap() {
                let file = file.unwrap();
                let to = again.path().join(&name).join(file.file_name());
                fs::copy(file.path(), to).unwrap();
            }
            train_all(
                &TrainConfig { async_checkpoint: true, ..config.clone() },
                again.path(),
                shape,
            );
            assert_eq!(told(again.path()), told(beside), "{shape:?} from {at}");
            let last = |run: &Path| {
                let mut files = tensors_of(run);
                files.retain(|(name, _)| name.starts_with("checkpoint-00000010"));
                files
            };
            assert!(last(again.path()) == last(beside), "{shape:?} from {at}");
        }
    }
}

#[test]
fn a_checkpoint_of_ranks_that_cannot_be_written_is_named_by_all_and_leaves_nothing() {
    let run = tempdir().unwrap();
    let config = TrainConfig { checkpoint_every: Some(2), ..train_config() };
    // A file stands where the directory is to be.
    fs::write(run.path().join("checkpoint-00000002"), "taken").unwrap();
    for async_checkpoint in [false, true] {
        let config = TrainConfig { async_checkpoint, ..config.clone() };
        for ended in train(&config, run.path(), [1, 2], |trainer, _| trainer) {
            let error = ended.unwrap_err().to_string();
            assert!(error.contains("checkpoint-00000002"), "{error}");
        }
        let left: Vec<_> =
            fs::read_dir(run.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().contains("unfinished")), "{left:?}");
    }
}
