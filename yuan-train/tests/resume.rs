//! A resumed run is the uninterrupted one, to the last bit, before and after the prune. All tests
//! share one small model and the ways to interrupt it, which is why they share a file.

use std::{
    cell::RefCell,
    fs,
    path::Path,
    rc::Rc,
    sync::{Mutex, MutexGuard, PoisonError},
};

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use tempfile::tempdir;
use yuan_laep::{ExpertLayout, PruneLimits, PrunePlan, StabilityTest};
use yuan_model::{YuanConfig, YuanModel, named};
use yuan_report::History;
use yuan_train::{
    Callback, Checkpoint, Context, Event, Guard, LaepConfig, MetricsFile, NotFinite, PruneExperts,
    StepMetrics, StepOutcome, TrainConfig, TrainError, Trainer, Trigger, data::RowStream,
};

/// Burn has one random state per process and device: runs that draw from it take turns.
static RANDOM_STATE: Mutex<()> = Mutex::new(());

fn take_turns() -> MutexGuard<'static, ()> {
    // A test that failed says so itself; the next one may go on.
    RANDOM_STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

const VOCAB: usize = 32;
const STEPS: u64 = 14;
const LAYOUT: ExpertLayout = ExpertLayout { top_k: 2, groups: 2 };

fn config(trigger: Trigger) -> TrainConfig {
    TrainConfig {
        steps: STEPS,
        batch_size: 2,
        seq_len: 16,
        accumulation: 2,
        learning_rate: 1e-2,
        min_learning_rate: 1e-3,
        warmup_steps: 3,
        validate_every: Some(4),
        validation_batches: 2,
        checkpoint_every: Some(3),
        keep_checkpoints: 2,
        seed: 11,
        laep: LaepConfig {
            window_steps: 2,
            trigger,
            stability: StabilityTest { windows: 2, max_change: 0.9, min_rank_correlation: -0.9 },
            limits: PruneLimits { beta: 0.3.into(), multiple_of: 2, ..PruneLimits::default() },
            groups: 2,
            ..LaepConfig::default()
        },
        ..TrainConfig::default()
    }
}

fn streams() -> [RowStream; 2] {
    let token = |i: u32| (i * i / 3 + i * 5) % VOCAB as u32;
    let rows = |range: std::ops::Range<u32>, seed| {
        RowStream::new(range.map(token).collect(), 0, 16, seed).unwrap()
    };
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
            let model =
                YuanConfig { hidden_dropout: 0.1, init_std: 0.1, ..YuanConfig::tiny(VOCAB) };
            let model = named::initialized(YuanModel::new(&model, &device).unwrap());
            Trainer::new(config.clone(), run_dir, &device, model, streams()).unwrap()
        }
    };
    trainer.with_callback(MetricsFile::default()).unwrap()
}

fn story(run_dir: &Path) -> Vec<Event> {
    History::read(run_dir).unwrap().story()
}

/// Ends a run at a step as a crash would: with an error, in the middle of everything.
struct CrashAt {
    step: u64,
    /// How often the step must have been taken before: after a roll-back, steps come again.
    visits: usize,
}

impl CrashAt {
    fn first(step: u64) -> Self {
        Self { step, visits: 0 }
    }
}

impl<M> Callback<M> for CrashAt {
    fn name(&self) -> &'static str {
        "crash"
    }

    fn on_step(&mut self, _: &mut Context<'_, M>, metrics: &StepMetrics) -> Result<(), TrainError> {
        if metrics.step == self.step && self.visits > 0 {
            self.visits -= 1;
        } else if metrics.step == self.step {
            return Err(TrainError::Callback { name: "crash", cause: "as planned".into() });
        }
        Ok(())
    }
}

/// Interrupts the run at every step and expects the story of the uninterrupted one, which is
/// returned.
fn check(config: &TrainConfig) -> Vec<Event> {
    let whole = tempdir().unwrap();
    open(config, whole.path()).run().unwrap();
    let expected = story(whole.path());
    assert!(expected.iter().any(|event| matches!(event, Event::Prune { .. })), "the run prunes");
    let steps =
        |event: &Event| if let Event::Step(metrics) = event { Some(metrics.step) } else { None };
    let steps: Vec<u64> = expected.iter().filter_map(steps).collect();
    for (at, &step) in steps[..steps.len() - 1].iter().enumerate() {
        let visits = steps[..at].iter().filter(|&&earlier| earlier == step).count();
        let run = tempdir().unwrap();
        let crash = CrashAt { step, visits };
        let error = open(config, run.path()).with_callback(crash).unwrap().run().unwrap_err();
        assert_eq!(error.to_string(), "callback crash: as planned");
        open(config, run.path()).run().unwrap();
        let found = story(run.path());
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found, expected, "interrupted at step {step}, visit {}", visits + 1);
        }
        assert_eq!(found.len(), expected.len(), "interrupted at step {step}, visit {}", visits + 1);
    }
    expected
}

#[test]
fn a_run_goes_on_exactly_wherever_it_was_interrupted() {
    let _turn = take_turns();
    check(&config(Trigger::Steps(vec![7])));
}

#[test]
fn the_watch_for_stable_loads_goes_on_exactly_too() {
    let _turn = take_turns();
    check(&config(Trigger::Stable { rounds: 1 }));
}

fn with_guard(trigger: Trigger, guard: Guard) -> TrainConfig {
    let mut config = config(trigger);
    config.laep.guard = Some(guard);
    config
}

#[test]
fn two_rounds_under_a_guard_go_on_exactly() {
    let _turn = take_turns();
    let story = check(&with_guard(Trigger::Steps(vec![4, 9]), Guard { margin: 10.0, steps: 3 }));
    let told: Vec<String> = story
        .iter()
        .filter_map(|event| match event {
            Event::Prune { step, round, .. } => Some(format!("{step} prune {round}")),
            Event::Guard { step, satisfied, .. } => Some(format!("{step} guard {satisfied}")),
            Event::RollBack { .. } => Some("back".into()),
            _ => None,
        })
        .collect();
    // A validation every 4 steps is the first to see the loss in time, or the guard's own after 3.
    assert_eq!(told, ["4 prune 1", "7 guard true", "9 prune 2", "12 guard true"]);
}

#[test]
fn a_prune_that_hurts_is_undone_and_the_run_is_as_if_it_had_never_been() {
    let _turn = take_turns();
    // Nothing gets back to nearly the loss of before in one step when three quarters of the experts
    // are gone.
    let mut config = with_guard(Trigger::Steps(vec![7]), Guard { margin: 0.0, steps: 1 });
    config.laep.limits.beta = 0.9.into();
    let story = check(&config);
    let back =
        story.iter().position(|event| matches!(event, Event::RollBack { step: 8, to_step: 7 }));
    assert!(back.is_some(), "{story:?}");
    // From there on it is the run that never pruned.
    let never = tempdir().unwrap();
    open(&self::config(Trigger::Never), never.path()).run().unwrap();
    let losses = |events: &[Event]| -> Vec<(u64, f64)> {
        let loss = |event: &Event| match event {
            Event::Step(metrics) => Some((metrics.step, metrics.loss)),
            Event::Validation { step, loss, .. } if *step == STEPS => Some((*step, *loss)),
            _ => None,
        };
        events.iter().filter_map(loss).collect()
    };
    let unpruned = losses(History::read(never.path()).unwrap().events());
    assert_eq!(losses(&story[back.unwrap()..]), unpruned[7..]);
    // And the report counts the undone stretch for nothing.
    let history = History::new(story);
    assert_eq!(
        history.steps().map(|metrics| metrics.step).collect::<Vec<_>>(),
        (1..=STEPS).collect::<Vec<_>>()
    );
    assert_eq!((history.prunes().count(), history.undone().count()), (0, 1));
}

/// Makes the head's weights no numbers after a step, once.
struct PoisonAfter(Option<u64>);

impl Callback<YuanModel> for PoisonAfter {
    fn name(&self) -> &'static str {
        "poison"
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, YuanModel>,
        _: &StepMetrics,
    ) -> Result<(), TrainError> {
        if self.0 == Some(context.step()) {
            self.0 = None;
            context.update(|mut model| {
                let broken = |w: burn::tensor::Tensor<2>| {
                    w.inner().mul_scalar(f32::NAN).autodiff().require_grad()
                };
                model.head.weight = model.head.weight.map(broken);
                model
            });
        }
        Ok(())
    }
}

#[test]
fn a_loss_that_is_no_number_under_the_guard_undoes_the_prune() {
    let _turn = take_turns();
    let config = with_guard(Trigger::Steps(vec![7]), Guard { margin: 10.0, steps: 4 });
    let config = TrainConfig { validate_every: None, ..config };
    let run = tempdir().unwrap();
    let mut trainer = open(&config, run.path()).with_callback(PoisonAfter(Some(9))).unwrap();
    trainer.run().unwrap();
    assert_eq!(trainer.model().config().experts_per_layer, [8, 8]);
    let history = History::read(run.path()).unwrap();
    assert!(
        history
            .events()
            .iter()
            .any(|event| matches!(event, Event::Guard { loss: None, satisfied: false, .. }))
    );
    assert_eq!(history.steps().last().unwrap().step, STEPS);
    // Without a guard it ends the run.
    let config = TrainConfig { laep: LaepConfig { guard: None, ..config.laep.clone() }, ..config };
    let run = tempdir().unwrap();
    let error =
        open(&config, run.path()).with_callback(PoisonAfter(Some(9))).unwrap().run().unwrap_err();
    assert!(error.to_string().starts_with("step 10: the loss is NaN"), "{error}");
}

#[test]
fn a_guard_whose_run_ends_decides_at_its_end() {
    let _turn = take_turns();
    let mut config = with_guard(Trigger::Steps(vec![STEPS - 1]), Guard { margin: 0.0, steps: 40 });
    config.laep.limits.beta = 0.9.into();
    let run = tempdir().unwrap();
    let mut trainer = open(&config, run.path());
    trainer.run().unwrap();
    assert_eq!(trainer.model().config().experts_per_layer, [8, 8], "undone at the last step");
    assert!(!run.path().join("before-prune").exists());
}

#[test]
fn the_state_before_a_prune_is_kept_until_the_guard_is_satisfied() {
    let _turn = take_turns();
    let config = with_guard(Trigger::Steps(vec![7]), Guard { margin: 10.0, steps: 5 });
    let run = tempdir().unwrap();
    let snapshot = run.path().join("before-prune");
    // No validation comes before step 12.
    let config = TrainConfig { validate_every: None, ..config };
    open(&config, run.path()).with_callback(CrashAt::first(11)).unwrap().run().unwrap_err();
    assert!(snapshot.join("model.safetensors").exists());
    open(&config, run.path()).run().unwrap();
    assert!(!snapshot.exists(), "the guard was satisfied at step 12");
}

#[test]
fn a_plan_from_elsewhere_is_applied_or_refused() {
    let _turn = take_turns();
    let load = |tokens: Vec<u64>| yuan_laep::LayerLoad::new(tokens);
    let limits = PruneLimits { beta: 0.2.into(), multiple_of: 2, ..PruneLimits::default() };
    let plan = |layers: &[yuan_laep::LayerLoad]| PrunePlan::new(layers, &limits, LAYOUT).unwrap();
    let ramp = load((1..=8).collect());
    let run_with = |plan: PrunePlan| {
        let mut config = config(Trigger::Steps(vec![3]));
        config.laep.plan = Some(plan);
        let run = tempdir().unwrap();
        let mut trainer = open(&config, run.path());
        let outcome = trainer.run().map_err(|error| error.to_string());
        (outcome, trainer.model().config().experts_per_layer.clone(), trainer.step())
    };
    let good = plan(&[ramp.clone(), ramp.clone()]);
    assert_eq!(run_with(good.clone()), (Ok(()), vec![6, 6], STEPS));
    // Another model's, or an edited one: one sentence before the first step, and the model is as it
    // was.
    let refused = |plan: PrunePlan| {
        let (outcome, experts, step) = run_with(plan);
        assert_eq!((experts, step), (vec![8, 8], 0));
        outcome.unwrap_err()
    };
    assert_eq!(refused(plan(std::slice::from_ref(&ramp))), "expected 2 layers, found 1");
    let other = plan(&[ramp.clone(), load((1..=12).collect())]);
    assert_eq!(refused(other), "layer 1: expected 8 experts, found 12");
}

#[test]
fn an_edited_plan_that_makes_no_sense_is_refused_with_the_settings() {
    let ramp = yuan_laep::LayerLoad::new((1..=8).collect());
    let limits = PruneLimits { beta: 0.2.into(), multiple_of: 2, ..PruneLimits::default() };
    let good = PrunePlan::new(&[ramp], &limits, LAYOUT).unwrap();
    let refusal = |edit: &dyn Fn(&mut yuan_laep::LayerPlan)| {
        let mut plan = good.clone();
        edit(&mut plan.layers[0]);
        let laep = LaepConfig { plan: Some(plan), ..LaepConfig::default() };
        PruneExperts::new(laep).map(drop).unwrap_err().to_string()
    };
    assert_eq!(
        refusal(&|layer| layer.kept[1] = layer.kept[0]),
        "layer 0: expert 7 is listed twice"
    );
    assert_eq!(
        refusal(&|layer| layer.pruned.truncate(1)),
        "layer 0: expert 1 is neither kept nor pruned"
    );
    assert_eq!(refusal(&|layer| layer.kept[0] = 8), "layer 0: expert 8 does not exist among 8");
    let few = refusal(&|layer| {
        layer.pruned.extend(layer.kept.split_off(1));
        layer.groups = vec![layer.kept.clone()];
    });
    assert_eq!(few, "layer 0 keeps 1 experts, fewer than top_k = 2");
}

#[test]
fn the_selection_bias_follows_the_loads_and_is_cut_and_saved_with_the_model() {
    let _turn = take_turns();
    let config = TrainConfig { bias_update_rate: Some(0.01), ..config(Trigger::Steps(vec![7])) };
    let device = Device::flex().autodiff();
    device.seed(3);
    let model =
        YuanConfig { router_selection_bias: true, init_std: 0.1, ..YuanConfig::tiny(VOCAB) };
    let model = named::initialized(YuanModel::new(&model, &device).unwrap());
    let run = tempdir().unwrap();
    let loads = Loads::default();
    let mut trainer = Trainer::new(config.clone(), run.path(), &device, model, streams())
        .unwrap()
        .with_callback(loads.clone())
        .unwrap()
        .with_callback(MetricsFile::default())
        .unwrap();
    trainer.run().unwrap();
    // By hand: a step up below the mean, a step down above it; the prune selects among the sums.
    let mut expected = vec![vec![0.0_f32; 8]; 2];
    let history = History::read(run.path()).unwrap();
    let (pruned_at, plan) = history.prunes().next().unwrap();
    for (step, layers) in loads.0.borrow().iter().enumerate() {
        for (bias, load) in expected.iter_mut().zip(layers) {
            let tokens = load.tokens_per_expert();
            let mean = tokens.iter().sum::<u64>() as f64 / tokens.len() as f64;
            for (bias, &tokens) in bias.iter_mut().zip(tokens) {
                *bias += 0.01
                    * (mean - tokens as f64).signum() as f32
                    * f32::from(u8::from(mean != tokens as f64));
            }
        }
        if step as u64 + 1 == pruned_at {
            for (bias, layer) in expected.iter_mut().zip(&plan.layers) {
                *bias = layer.kept.iter().map(|&expert| bias[expert]).collect();
            }
        }
    }
    let bias = |model: &YuanModel| -> Vec<Vec<f32>> {
        let of = |block: &yuan_model::Block| {
            block
                .moe
                .router
                .selection_bias
                .as_ref()
                .unwrap()
                .val()
                .into_data()
                .iter::<f32>()
                .collect()
        };
        model.blocks.iter().map(of).collect()
    };
    let found = bias(trainer.model());
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
    let (loaded, ..) = Checkpoint::latest(run.path())
        .unwrap()
        .unwrap()
        .load::<YuanModel>(&config.optimizer, &device)
        .unwrap();
    assert_eq!(bias(&loaded), found);
}

/// Loads of every step.
#[derive(Clone, Default)]
struct Loads(Rc<RefCell<Vec<Vec<yuan_laep::LayerLoad>>>>);

impl<M> Callback<M> for Loads {
    fn name(&self) -> &'static str {
        "loads"
    }

    fn on_step(&mut self, _: &mut Context<'_, M>, metrics: &StepMetrics) -> Result<(), TrainError> {
        self.0.borrow_mut().push(metrics.loads.clone());
        Ok(())
    }
}

#[test]
fn checkpoints_hold_nothing_of_dead_experts_and_old_ones_go() {
    let _turn = take_turns();
    let config = config(Trigger::Steps(vec![7]));
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
        checkpoint
            .load::<YuanModel>(&config.optimizer, &Device::flex().autodiff())
            .map(drop)
            .unwrap_err()
            .to_string()
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
    assert!(message.contains("config.json is damaged: its checksum"), "{message}");
    fs::remove_file(checkpoint.path.join("optimizer.safetensors")).unwrap();
    assert!(load().contains("cannot read "), "{}", load());
}

/// A user's own callback sees every step and may read, ask and speak.
#[derive(Clone, Default)]
struct Watcher(Rc<RefCell<Vec<u64>>>);

impl<M> Callback<M> for Watcher {
    fn name(&self) -> &'static str {
        "watcher"
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
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
    open(&config(Trigger::Never), run.path())
        .with_callback(watcher.clone())
        .unwrap()
        .run()
        .unwrap();
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
        let model = named::initialized(YuanModel::new(&YuanConfig::tiny(VOCAB), &device).unwrap());
        let mut trainer = Trainer::new(config, run.path(), &device, model, streams()).unwrap();
        match trainer.train_step().unwrap() {
            StepOutcome::Taken(metrics) => metrics,
            StepOutcome::NotFinite(found) => panic!("{found:?}"),
        }
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
    let mut model = named::initialized(YuanModel::new(&YuanConfig::tiny(VOCAB), &device).unwrap());
    model.head.weight =
        model.head.weight.map(|w| w.inner().mul_scalar(f32::NAN).autodiff().require_grad());
    let mut trainer =
        Trainer::new(config(Trigger::Never), run.path(), &device, model, streams()).unwrap();
    let outcome = trainer.train_step().unwrap();
    assert!(
        matches!(outcome, StepOutcome::NotFinite(NotFinite { what: "loss", value }) if value.is_nan())
    );
    let message = trainer.run().unwrap_err().to_string();
    assert!(message.starts_with("step 1: the loss is NaN"), "{message}");
}

/// A token of which the model's embedding is no number spoils the batches that it is in, and no
/// others.
#[test]
fn a_batch_that_spoils_the_loss_is_left_out_and_many_in_a_row_end_the_run() {
    let _turn = take_turns();
    let device = Device::flex().autodiff();
    let bad = VOCAB as i64 - 1;
    let open = |run: &std::path::Path, rate: usize| {
        device.seed(3);
        let mut model =
            named::initialized(YuanModel::new(&YuanConfig::tiny(VOCAB), &device).unwrap());
        model.embedding.weight = model.embedding.weight.map(|w| {
            let row = Tensor::full([1, w.dims()[1]], f32::NAN, &w.device().inner());
            w.inner()
                .slice_assign([bad as usize..VOCAB, 0..row.dims()[1]], row)
                .autodiff()
                .require_grad()
        });
        // The token ends every `rate`-th row of 16; nothing else does, nor what validates.
        let plain = |i: u32| i * 5 % (VOCAB as u32 - 1);
        let token =
            |i: u32| if i as usize % (16 * rate) == 16 * rate - 1 { bad as u32 } else { plain(i) };
        let rows = |tokens, seed| RowStream::new(tokens, u32::MAX, 16, seed).unwrap();
        let streams = [
            rows((0..1600).map(token).collect(), Some(11)),
            rows((0..400).map(plain).collect(), None),
        ];
        let config = TrainConfig {
            laep: LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() },
            accumulation: 1,
            validation_batches: 1,
            ..config(Trigger::Never)
        };
        let trainer = Trainer::new(config, run, &device, model, streams).unwrap();
        trainer.with_callback(MetricsFile::default()).unwrap()
    };
    let run = tempdir().unwrap();
    let mut trainer = open(run.path(), 10);
    trainer.run().unwrap();
    let history = History::read(run.path()).unwrap();
    let steps: Vec<u64> = history.steps().map(|metrics| metrics.step).collect();
    assert_eq!(
        steps,
        (1..=STEPS).collect::<Vec<_>>(),
        "every step is taken, if with another batch"
    );
    let skips = history.events().iter().filter(|event| matches!(event, Event::Skip { .. })).count();
    assert!(skips > 0, "some batch had the token");
    assert_eq!(trainer.optimizer().updates(), STEPS, "and none of them moved the model");
    // In every row: no batch is left.
    let run = tempdir().unwrap();
    let message = open(run.path(), 1).run().unwrap_err().to_string();
    assert!(message.starts_with("step 1: the loss is NaN for 6 batches in a row; "), "{message}");
}

#[test]
fn the_global_norm_is_clipped_not_each_parameter() {
    let _turn = take_turns();
    use yuan_train::clip_factor;
    assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
    assert!((clip_factor(0.5, 1.0) - 1.0).abs() < 1e-12);
    // One norm over all parameters: the reported one equals the root of the sum of squares.
    let device = Device::flex().autodiff();
    let model = named::initialized(YuanModel::new(&YuanConfig::tiny(VOCAB), &device).unwrap());
    let [mut train, _] = streams();
    let loss = yuan_train::LanguageModel::loss(
        &model,
        train.next_batch(2, &device).unwrap(),
        Default::default(),
    )
    .unwrap()
    .loss;
    let grads = burn::optim::GradientsParams::from_grads(loss.backward(), &model);
    let ours = yuan_train::global_norm_squared(&model, &grads).unwrap().into_scalar::<f32>();
    let mut expected = 0.0;
    struct Sum<'a>(&'a burn::optim::GradientsParams, &'a mut f64);
    impl burn::module::ModuleVisitor for Sum<'_> {
        fn visit_float<const D: usize>(
            &mut self,
            param: &burn::module::Param<burn::tensor::Tensor<D>>,
        ) {
            let grad = self.0.get::<D>(param.id).unwrap().into_data();
            *self.1 += grad.iter::<f32>().map(|g| f64::from(g) * f64::from(g)).sum::<f64>();
        }
    }
    model.visit(&mut Sum(&grads, &mut expected));
    assert!((f64::from(ours) / expected - 1.0).abs() < 1e-5);
}
