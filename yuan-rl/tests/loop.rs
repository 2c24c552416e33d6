//! The loop from a model to one that earns more: what is drawn, what is learnt, and how a run goes on.

use std::{fs, path::Path, sync::Arc};

use burn::tensor::Device;
use tempfile::{TempDir, tempdir};
use yuan_data::Document;
use yuan_model::{
    YuanConfig, YuanModel,
    ranks::{Ranks, on_threads},
    text::Tokenizer,
};
use yuan_report::History;
use yuan_rl::{
    Arithmetic, HeldOut, PromptTokenizer, Question, RapoLoss, Response, Reward, RewardRule,
    RlConfig, RlSettings, Rollouts, Scheme, Task, TaskError, TaskKind, trainer, trainer_on_rank,
};
use yuan_train::{
    Callback, Checkpoint, Claim, Context, Event, LaepConfig, ModelDirectory, NewRun, Run, RunData,
    Schedule, StepMetrics, TrainConfig, TrainError, Trigger, data::RunRows,
};

/// A model of random weights that writes bytes, and its tokenizer.
fn base(directory: &Path) -> ModelDirectory {
    let document = |(number, [prompt, answer]): (usize, [String; 2])| Document {
        name: format!("{number}"),
        text: prompt + &answer,
    };
    let documents: Vec<Document> =
        Arithmetic::examples(300, 0).into_iter().enumerate().map(document).collect();
    let config = TrainConfig { steps: 1, batch_size: 2, seq_len: 32, ..training(1) };
    let model = YuanConfig { init_std: 0.1, ..YuanConfig::tiny(257) };
    let run = Run::create(directory, NewRun::new(config, model, documents)).unwrap();
    run.trainer(&Device::flex().autodiff()).unwrap().run().unwrap();
    ModelDirectory::open(directory).unwrap()
}

fn training(steps: u64) -> TrainConfig {
    TrainConfig {
        steps,
        batch_size: 4,
        accumulation: 2,
        seq_len: 48,
        learning_rate: 2e-3,
        min_learning_rate: 2e-3,
        schedule: Schedule::Constant,
        warmup_steps: 0,
        validate_every: None,
        checkpoint_every: None,
        laep: LaepConfig { trigger: Trigger::Never, window_steps: 2, ..LaepConfig::default() },
        ..TrainConfig::default()
    }
}

fn rollouts() -> RlConfig {
    RlConfig {
        prompts: 6,
        answers: 4,
        mini_batch: 2,
        max_new_tokens: 12,
        at_once: 8,
        measure_every: Some(4),
        // Random weights hardly ever end an answer.
        filter_cut_off: false,
        loss: RapoLoss { share: 0.5, ..RapoLoss::default() },
        ..RlConfig::default()
    }
}

/// Pays for every byte below `p`, so that any two answers earn differently.
struct LowBytes;

impl Task for LowBytes {
    fn question(&self, number: u64) -> Question {
        Question { prompt: format!("{}=", number % 7), answer: String::new() }
    }

    fn held_out(&self) -> Vec<Question> {
        (0..40).map(|number| self.question(number)).collect()
    }

    fn rewards(&self, _: &Question, responses: &[Response<'_>]) -> Result<Vec<Reward>, TaskError> {
        let reward = |response: &Response<'_>| {
            let low = response.tokens.iter().filter(|&&token| token < 128).count();
            let value = low as f32 / response.tokens.len() as f32;
            Reward {
                value,
                is_right: value > 0.7,
                parts: [("low".into(), f64::from(value))].into(),
            }
        };
        Ok(responses.iter().map(reward).collect())
    }
}

/// A run on a task of its own.
struct OwnRun {
    run: Run,
    config: RlConfig,
}

impl OwnRun {
    fn create(directory: &Path, base: &Path, training: TrainConfig) -> Self {
        let model = ModelDirectory::open(base).unwrap();
        let new = NewRun::from_model(training, model, RunData::Prompts(Vec::new()));
        Self { run: Run::create(directory, new).unwrap(), config: rollouts() }
    }

    fn train(&self, task: Arc<dyn Task>, crash: Option<CrashAt>) -> Result<(), TrainError> {
        let tokenizer = Tokenizer::load(self.run.directory())?;
        let stop_tokens = tokenizer.stop_tokens(self.run.model());
        let words = PromptTokenizer::new(tokenizer, stop_tokens, false)?;
        let rows = Rollouts::new(task.clone(), words.clone(), self.config.clone());
        let device = Device::flex().autodiff();
        let trainer = self.run.trainer_with(&device, |_| Ok(RunRows::of(rows)))?;
        let trainer = trainer.with_callback(HeldOut::new(task, words, self.config.clone()))?;
        match crash {
            Some(crash) => trainer.with_callback(crash)?.run(),
            None => { trainer }.run(),
        }
    }

    fn history(&self) -> History {
        History::read(self.run.directory()).unwrap()
    }
}

/// Ends a run in the middle of everything.
struct CrashAt(u64);

impl Callback<YuanModel> for CrashAt {
    fn name(&self) -> &'static str {
        "crash"
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, YuanModel>,
        _: &StepMetrics,
    ) -> Result<(), TrainError> {
        match context.step() == self.0 {
            true => Err(TrainError::Device("crashed".into())),
            false => Ok(()),
        }
    }
}

fn based() -> (TempDir, std::path::PathBuf) {
    let home = tempdir().unwrap();
    let path = home.path().join("base");
    base(&path);
    (home, path)
}

fn tensors(run: &Path) -> Vec<(String, Vec<u8>)> {
    let last = Checkpoint::latest(run).unwrap().unwrap();
    let files = fs::read_dir(&last.path).unwrap().map(|file| file.unwrap());
    let mut files: Vec<_> = files
        .filter(|file| file.path().extension().is_some_and(|kind| kind == "safetensors"))
        .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()))
        .collect();
    files.sort();
    files
}

fn steps(history: &History) -> Vec<StepMetrics> {
    history.steps().cloned().collect()
}

#[test]
fn what_earns_more_becomes_likelier() {
    let (home, base) = based();
    let quick = TrainConfig { learning_rate: 4e-2, min_learning_rate: 4e-2, ..training(60) };
    let run = OwnRun::create(&home.path().join("run"), &base, quick);
    // A model that earns all there is has nothing more to learn from.
    let ended = run.train(Arc::new(LowBytes), None);
    assert!(matches!(ended, Ok(()) | Err(TrainError::RewardedAlike { .. })), "{ended:?}");
    let history = run.history();
    let rewards: Vec<f64> = history.rollouts(true).map(|metrics| metrics.reward).collect();
    assert!(rewards.len() > 5, "at the beginning, and every four steps");
    let best = rewards.iter().copied().fold(0.0, f64::max);
    assert!(rewards[0] < 0.65 && best > rewards[0] + 0.25, "{rewards:?}");
    for metrics in history.rollouts(false) {
        assert_eq!((metrics.prompts, metrics.answers), (6, 24));
        assert!(metrics.learnt <= 6, "{}", metrics.learnt);
        assert_eq!(metrics.layers.len(), 2, "loads of every layer");
        assert!((metrics.parts["low"] - metrics.reward).abs() < 1e-6);
    }
    // Updates are loads as in any training.
    assert!(history.events().iter().any(|event| matches!(event, Event::Load { .. })));
    // The first update after each round has the model that was asked, and no other one has.
    let rounds: Vec<u64> = history.rollouts(false).map(|metrics| metrics.step).collect();
    assert!(rounds.len() > 5, "{rounds:?}");
    for metrics in steps(&history) {
        let measures = &metrics.measures;
        match rounds.contains(&(metrics.step - 1)) {
            true => {
                assert!(measures["approx_kl"].abs() < 1e-5, "{measures:?}");
                assert_eq!(measures["clip_fraction"], 0.0);
            }
            false => assert!(measures["approx_kl"] != 0.0, "{measures:?}"),
        }
        assert!(measures["entropy"] > 0.0 && measures["entropy"] < 257_f64.ln());
    }
}

#[test]
fn a_run_that_was_killed_goes_on_as_if_it_had_not_been() {
    let (home, base) = based();
    let settings = || TrainConfig { checkpoint_every: Some(2), ..training(9) };
    let whole = OwnRun::create(&home.path().join("whole"), &base, settings());
    whole.train(Arc::new(LowBytes), None).unwrap();
    // A checkpoint waits until all of the three updates of some rollouts are there.
    let told = |history: &History| -> Vec<u64> {
        let step = |event: &Event| match event {
            Event::Checkpoint { step } => Some(*step),
            _ => None,
        };
        history.events().iter().filter_map(step).collect()
    };
    assert_eq!(told(&whole.history()), [3, 6, 9]);
    for crash in [1, 4, 5, 8] {
        let run = OwnRun::create(&home.path().join(format!("{crash}")), &base, settings());
        run.train(Arc::new(LowBytes), Some(CrashAt(crash))).unwrap_err();
        run.train(Arc::new(LowBytes), None).unwrap();
        assert_eq!(run.history().story(), whole.history().story(), "killed after {crash}");
        assert!(tensors(run.run.directory()) == tensors(whole.run.directory()), "{crash}");
    }
}

#[test]
fn ranks_answer_and_learn_as_one_device_does() {
    let (home, base) = based();
    let settings = RlSettings {
        task: TaskKind::Arithmetic,
        // Random weights are never right: what is learnt is not to repeat oneself.
        reward: RewardRule { scheme: Scheme::Outcome, overlong: None, repetition: true },
        rollouts: RlConfig { prompts: 5, attempts: 1, ..rollouts() },
    };
    let learns = |shape: Option<[usize; 2]>| {
        let name = home.path().join(format!("{shape:?}"));
        let (claim, model) = (Claim::take(&name).unwrap(), ModelDirectory::open(&base).unwrap());
        let run = settings.create(claim, model, training(1), None).unwrap();
        let run = run.unlocked().unwrap();
        let ended = match shape {
            None => vec![trainer(&run, &Device::flex().autodiff()).and_then(|mut t| t.run())],
            Some([data, expert]) => on_threads(data * expert, |world| {
                let ranks = Ranks::new(world, data)?;
                trainer_on_rank(&run, &Device::flex().autodiff(), &ranks)?.run()
            }),
        };
        (History::read(run.directory()).unwrap(), ended)
    };
    let told = |history: &History| -> Vec<_> {
        let held_out = history.rollouts(true);
        held_out.map(|m| (m.prompts, m.answers, m.tokens, m.layers.clone())).collect()
    };
    let (one, ended) = learns(None);
    // All answers earn alike, so there is nothing to learn, and the run says so.
    let error = ended.into_iter().next().unwrap().unwrap_err().to_string();
    assert!(error.contains("rewarded alike"), "{error}");
    for shape in [[1, 2], [2, 1], [2, 2]] {
        let (history, ended) = learns(Some(shape));
        assert!(ended.into_iter().all(|ended| ended.is_err()), "{shape:?}");
        assert_eq!(told(&history), told(&one), "{shape:?}");
    }
}
