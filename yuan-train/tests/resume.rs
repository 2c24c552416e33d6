//! A resumed run is the uninterrupted one, to the last bit, before and after the prune.

use std::{
    cell::RefCell,
    fs,
    path::Path,
    rc::Rc,
    sync::{Mutex, MutexGuard, PoisonError},
};

use burn::{module::Module, tensor::Device};
use tempfile::tempdir;
use yuan_laep::{PruneLimits, StabilityTest};
use yuan_model::{YuanConfig, YuanModel};
use yuan_train::{
    Callback, Context, LaepConfig, PruneExperts, TrainConfig, TrainError, Trainer,
    callback::{CheckpointEvery, Event, MetricsFile, StepMetrics, Trigger, ValidateEvery},
    checkpoint::Checkpoint,
    data::RowStream,
    report::History,
};

/// Burn has one random state per process and device: runs that draw from it take turns.
static RANDOM_STATE: Mutex<()> = Mutex::new(());

fn take_turns() -> MutexGuard<'static, ()> {
    // A test that failed says so itself; the next one may go on.
    RANDOM_STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

const VOCAB: usize = 32;
const STEPS: u64 = 14;

fn config(trigger: Trigger) -> TrainConfig {
    TrainConfig {
        steps: STEPS,
        batch_size: 2,
        seq_len: 16,
        accumulation: 2,
        learning_rate: 1e-2,
        min_learning_rate: 1e-3,
        warmup_steps: 3,
        validate_every: 4,
        validation_batches: 2,
        checkpoint_every: 3,
        keep_checkpoints: 2,
        seed: 11,
        laep: LaepConfig {
            window_steps: 2,
            trigger,
            stability: StabilityTest { windows: 2, max_change: 0.9, min_rank_correlation: -0.9 },
            limits: PruneLimits { beta: 0.3, multiple_of: 2, ..PruneLimits::default() },
            groups: 2,
        },
        ..TrainConfig::default()
    }
}

fn streams() -> [RowStream; 2] {
    let token = |i: u32| (i * i / 3 + i * 5) % VOCAB as u32;
    let rows =
        |range: std::ops::Range<u32>, seed| RowStream::new(range.map(token).collect(), 0, 16, seed).unwrap();
    [rows(0..800, Some(11)), rows(800..1100, None)]
}

/// Opens the run in `run_dir` where it stands, with dropout, which draws random numbers.
fn open(config: &TrainConfig, run_dir: &Path) -> Trainer<YuanModel> {
    let device = Device::flex().autodiff();
    let trainer = match Checkpoint::latest(run_dir).unwrap() {
        Some(checkpoint) => {
            Trainer::resume(config.clone(), run_dir, &device, &checkpoint, streams()).unwrap()
        }
        None => {
            device.seed(config.seed);
            let model = YuanConfig { hidden_dropout: 0.1, initializer_range: 0.1, ..YuanConfig::tiny(VOCAB) };
            let model = YuanModel::new(&model, &device).unwrap().materialize();
            Trainer::new(config.clone(), run_dir, &device, model, streams()).unwrap()
        }
    };
    let laep = PruneExperts::new(config.laep.clone()).unwrap();
    let trainer =
        trainer.with_callback(laep).unwrap().with_callback(ValidateEvery(config.validate_every)).unwrap();
    let trainer = trainer.with_callback(CheckpointEvery(config.checkpoint_every)).unwrap();
    trainer.with_callback(MetricsFile::default()).unwrap()
}

/// Everything of a run but how long its steps took and where it was interrupted.
fn story(run_dir: &Path) -> Vec<Event> {
    let history = History::read(run_dir).unwrap();
    let timeless = |event: &Event| match event {
        Event::Start { .. } => None,
        Event::Step(metrics) => Some(Event::Step(StepMetrics { seconds: 0.0, ..metrics.clone() })),
        other => Some(other.clone()),
    };
    history.events().iter().filter_map(timeless).collect()
}

/// Ends a run at a step as a crash would: with an error, in the middle of everything.
struct CrashAt(u64);

impl<M> Callback<M> for CrashAt {
    fn name(&self) -> &'static str {
        "crash"
    }

    fn on_step(&mut self, _: &mut Context<'_, M>, metrics: &StepMetrics) -> Result<(), TrainError> {
        if metrics.step == self.0 {
            return Err(TrainError::Callback { name: "crash", source: "as planned".into() });
        }
        Ok(())
    }
}

fn check(trigger: Trigger) {
    let config = config(trigger);
    let whole = tempdir().unwrap();
    open(&config, whole.path()).run().unwrap();
    let expected = story(whole.path());
    assert!(expected.iter().any(|event| matches!(event, Event::Prune { .. })), "the run prunes");
    for crash in 1..STEPS {
        let run = tempdir().unwrap();
        let error = open(&config, run.path()).with_callback(CrashAt(crash)).unwrap().run().unwrap_err();
        assert_eq!(error.to_string(), "callback crash: as planned");
        open(&config, run.path()).run().unwrap();
        assert_eq!(story(run.path()), expected, "interrupted at step {crash}");
    }
}

#[test]
fn a_run_goes_on_exactly_wherever_it_was_interrupted() {
    let _turn = take_turns();
    check(Trigger::Step(7));
}

#[test]
fn the_watch_for_stable_loads_goes_on_exactly_too() {
    let _turn = take_turns();
    check(Trigger::Stable);
}

#[test]
fn checkpoints_hold_nothing_of_dead_experts_and_old_ones_go() {
    let _turn = take_turns();
    let config = config(Trigger::Step(7));
    let run = tempdir().unwrap();
    let mut trainer = open(&config, run.path());
    trainer.run().unwrap();
    let checkpoints = Checkpoint::list(run.path()).unwrap();
    assert_eq!(checkpoints.iter().map(|c| c.step).collect::<Vec<_>>(), [12, 14]);
    let experts = &trainer.model().config().experts_per_layer;
    assert!(experts.iter().sum::<usize>() < 16, "{experts:?}");
    let parameters = trainer.model().num_params() as u64;
    assert_eq!(parameters, trainer.model().config().parameter_count().total());
    for (file, copies) in [("model.safetensors", 1), ("optimizer.safetensors", 2)] {
        let bytes = fs::metadata(checkpoints[1].path.join(file)).unwrap().len();
        let data = copies * 4 * parameters;
        assert!((data..data + 30_000).contains(&bytes), "{file} has {bytes} bytes for {data}");
    }
}

#[test]
fn a_damaged_checkpoint_is_named_and_refused() {
    let _turn = take_turns();
    let config = config(Trigger::Never);
    let run = tempdir().unwrap();
    open(&config, run.path()).run().unwrap();
    let checkpoint = Checkpoint::latest(run.path()).unwrap().unwrap();
    let load = || {
        checkpoint.load::<YuanModel>(&config, &Device::flex().autodiff()).map(drop).unwrap_err().to_string()
    };
    let with_file = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let path = checkpoint.path.join(name);
        let original = fs::read(&path).unwrap();
        fs::write(&path, change(original.clone())).unwrap();
        let message = load();
        fs::write(&path, original).unwrap();
        message
    };
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    for file in ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"] {
        let message = with_file(file, &half);
        assert!(message.contains(file) && message.contains("checkpoint-00000014"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
    let other_model = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).unwrap();
        text.replace("\"hidden_size\": 32", "\"hidden_size\": 48").into_bytes()
    };
    let message = with_file("config.json", &other_model);
    assert!(message.contains("`embedding.weight` is [32, 32], expected [32, 48]"), "{message}");
    fs::remove_file(checkpoint.path.join("optimizer.safetensors")).unwrap();
    assert!(load().starts_with("cannot read "), "{}", load());
}

/// A user's own callback sees every step and may read, ask and speak.
#[derive(Clone, Default)]
struct Watcher(Rc<RefCell<Vec<u64>>>);

impl<M> Callback<M> for Watcher {
    fn name(&self) -> &'static str {
        "watcher"
    }

    fn on_step(&mut self, context: &mut Context<'_, M>, metrics: &StepMetrics) -> Result<(), TrainError> {
        assert_eq!(metrics.loads.len(), 2);
        let tokens = context.config().tokens_per_step() as u128;
        assert!(
            metrics.loads.iter().all(|load| load.total() == 2 * tokens),
            "top-2 of every token, all counted"
        );
        assert_eq!(context.optimizer().updates(), metrics.step);
        self.0.borrow_mut().push(metrics.step);
        if metrics.step == 5 {
            context.request_stop();
        }
        Ok(())
    }
}

#[test]
fn a_callback_from_outside_observes_and_stops_a_run() {
    let _turn = take_turns();
    let run = tempdir().unwrap();
    let watcher = Watcher::default();
    open(&config(Trigger::Never), run.path()).with_callback(watcher.clone()).unwrap().run().unwrap();
    assert_eq!(*watcher.0.borrow(), [1, 2, 3, 4, 5]);
    let history = History::read(run.path()).unwrap();
    assert_eq!(history.validations().last().unwrap().0, 5, "a stopped run is validated");
    assert_eq!(Checkpoint::latest(run.path()).unwrap().unwrap().step, 5, "and saved");
}

#[test]
fn accumulation_equals_one_large_batch() {
    let _turn = take_turns();
    let device = Device::flex().autodiff();
    let step = |batch_size, accumulation| {
        let run = tempdir().unwrap();
        let config = TrainConfig { batch_size, accumulation, ..config(Trigger::Never) };
        device.seed(1);
        let model = YuanModel::new(&YuanConfig::tiny(VOCAB), &device).unwrap().materialize();
        let mut trainer = Trainer::new(config, run.path(), &device, model, streams()).unwrap();
        trainer.train_step().unwrap()
    };
    let (whole, parts) = (step(4, 1), step(1, 4));
    assert!((whole.loss - parts.loss).abs() < 1e-6, "{} {}", whole.loss, parts.loss);
    assert!((whole.gradient_norm / parts.gradient_norm - 1.0).abs() < 1e-5);
    assert_eq!(whole.loads, parts.loads);
}

#[test]
fn a_loss_that_is_no_number_ends_the_run() {
    let _turn = take_turns();
    let run = tempdir().unwrap();
    let device = Device::flex().autodiff();
    let mut model = YuanModel::new(&YuanConfig::tiny(VOCAB), &device).unwrap().materialize();
    model.head.weight = model.head.weight.map(|w| w.inner().mul_scalar(f32::NAN).autodiff().require_grad());
    let mut trainer = Trainer::new(config(Trigger::Never), run.path(), &device, model, streams()).unwrap();
    let message = trainer.train_step().unwrap_err().to_string();
    assert!(message.starts_with("step 1: the loss is NaN"), "{message}");
}

#[test]
fn the_global_norm_is_clipped_not_each_parameter() {
    let _turn = take_turns();
    use yuan_train::optim::clip_factor;
    assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
    assert!((clip_factor(0.5, 1.0) - 1.0).abs() < 1e-12);
    // One norm over all parameters: the reported one equals the root of the sum of squares.
    let device = Device::flex().autodiff();
    let model = YuanModel::new(&YuanConfig::tiny(VOCAB), &device).unwrap().materialize();
    let [mut train, _] = streams();
    let loss = yuan_train::LanguageModel::loss(&model, train.next_batch(2, &device)).loss;
    let grads = burn::optim::GradientsParams::from_grads(loss.backward(), &model);
    let ours = yuan_train::optim::global_norm_squared(&model, &grads).unwrap().into_scalar::<f32>();
    let mut expected = 0.0;
    struct Sum<'a>(&'a burn::optim::GradientsParams, &'a mut f64);
    impl burn::module::ModuleVisitor for Sum<'_> {
        fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<burn::tensor::Tensor<D>>) {
            let grad = self.0.get::<D>(param.id).unwrap().into_data();
            *self.1 += grad.iter::<f32>().map(|g| f64::from(g) * f64::from(g)).sum::<f64>();
        }
    }
    model.visit(&mut Sum(&grads, &mut expected));
    assert!((f64::from(ours) / expected - 1.0).abs() < 1e-5);
}
