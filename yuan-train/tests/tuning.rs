//! Instruction tuning: what is learnt, what only fills rows up, and which parameters change.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Device;
use serde_json::json;
use tempfile::tempdir;
use yuan_data::{DataError, Document, NoProgress, PrepareOptions, prepare, tokenizer};
use yuan_laep::PruneLimits;
use yuan_model::{
    YuanConfig, YuanModel, named,
    ranks::{Ranks, on_threads},
    text::Tokenizer,
};
use yuan_train::{
    AdamWConfig, Checkpoint, LaepConfig, LanguageModel, Learns, MetricsFile, ModelDirectory,
    NewRun, Recovery, Run, RunData, StepMetrics, StepOutcome, TrainConfig, TrainError, Trainer,
    Trigger,
    data::{ChatFiles, Row, RowSource, RowStream, Streams},
};

/// Burn keeps one random state for a device, so one test at a time draws from it.
fn take_turns() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

const VOCAB: usize = 61;
const ROW: usize = 12;

/// Rows whose answers are of very unequal lengths, the rest of some filled up.
#[derive(Debug)]
struct Unequal;

impl RowSource for Unequal {
    fn row_len(&self) -> usize {
        ROW
    }

    fn row(&self, place: u64) -> Result<Row, TrainError> {
        let token = |i: usize| ((place as usize * 17 + i * i * 5 + i) % VOCAB) as u32;
        let answer = [1, 11, 2, 1, 9, 1, 3, 5][place as usize % 8];
        let padding_from = ROW - [0, 0, 7, 3][place as usize % 4];
        Ok(Row {
            input_ids: (0..ROW).map(token).collect(),
            labels: (1..=ROW).map(token).collect(),
            position_ids: (0..ROW as u32).collect(),
            learnt: Some(
                (0..ROW).map(|at| at + answer >= padding_from && at < padding_from).collect(),
            ),
            padding_from,
            ..Row::default()
        })
    }
}

fn streams() -> Streams {
    let rows = || RowStream::of(Arc::new(Unequal));
    [rows(), rows()].into()
}

fn config(batch_size: usize, accumulation: usize) -> TrainConfig {
    TrainConfig {
        steps: 4,
        batch_size,
        accumulation,
        seq_len: ROW,
        warmup_steps: 0,
        learning_rate: 0.1,
        // So large that an update is a multiple of the gradient, small differences included.
        optimizer: AdamWConfig { epsilon: 1.0, ..AdamWConfig::default() },
        laep: LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() },
        ..TrainConfig::default()
    }
}

fn model_config() -> YuanConfig {
    YuanConfig { attention_dropout: 0.0, ..YuanConfig::tiny(VOCAB) }
}

fn fresh(device: &Device) -> YuanModel {
    device.seed(5);
    named::initialized(YuanModel::new(&model_config(), device).unwrap())
}

fn on_one(config: TrainConfig) -> Trainer<YuanModel> {
    let (device, run) = (Device::flex().autodiff(), tempdir().unwrap());
    Trainer::new(config, run.path(), &device, fresh(&device), streams()).unwrap()
}

fn steps<M: LanguageModel>(mut trainer: Trainer<M>) -> Vec<StepMetrics> {
    let step = |_| match trainer.train_step().unwrap() {
        StepOutcome::Taken(metrics) => metrics,
        StepOutcome::NotFinite(found) => panic!("{found:?}"),
    };
    (0..3).map(step).collect()
}

fn assert_same(found: &[StepMetrics], expected: &[StepMetrics]) {
    for (found, expected) in found.iter().zip(expected) {
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
        assert!(close(found.loss, expected.loss), "{} {}", found.loss, expected.loss);
        let (a, b) = (found.gradient_norm, expected.gradient_norm);
        assert!(close(a, b), "gradient norm {a} {b}");
        assert_eq!(found.loads, expected.loads);
    }
}

/// Dividing by the labels of each micro-batch would weigh short answers more than long ones.
#[test]
fn the_cut_into_micro_batches_and_devices_makes_no_difference() {
    let _turn = take_turns();
    let whole = steps(on_one(config(8, 1)));
    for (batch_size, accumulation) in [(4, 2), (2, 4), (1, 8)] {
        assert_same(&steps(on_one(config(batch_size, accumulation))), &whole);
    }
    let with_recomputation = TrainConfig { recompute: true, ..config(2, 4) };
    assert_same(&steps(on_one(with_recomputation)), &whole);
    // A rank may have no learnt label of its own, and most experts get nothing from some ranks.
    for ([data, expert], recompute) in
        [([1, 2], false), ([2, 1], false), ([2, 2], true), ([1, 4], false), ([4, 1], true)]
    {
        let whole_model = fresh(&Device::flex());
        let (run, device) = (tempdir().unwrap(), Device::flex().autodiff());
        let config = TrainConfig { recompute, ..config(4, 2) };
        for found in on_threads(data * expert, |world| {
            let ranks = Ranks::new(world, data).unwrap();
            let part = YuanModel::part_of(&whole_model, &ranks, &device).unwrap();
            steps(Trainer::new(config.clone(), run.path(), &device, part, streams()).unwrap())
        }) {
            assert_same(&found, &whole);
        }
    }
    // The loss is that of the labels that are learnt, counted by hand on the first step.
    let device = Device::flex();
    let model = fresh(&device.clone().autodiff());
    let (mut sum, mut count) = (0.0, 0);
    for place in 0..8 {
        let row = Unequal.row(place).unwrap();
        let mut stream = RowStream::of(Arc::new(Unequal));
        stream.seek(place);
        let batch = stream.next_batch(1, &device.clone().autodiff()).unwrap();
        let options = yuan_model::ForwardOptions::default();
        let logits = model.forward(batch.input_ids, options).logits;
        let losses = yuan_model::loss::token_losses(logits, batch.labels).into_data();
        let learnt = row.learnt.unwrap();
        for (loss, _) in losses.iter::<f32>().zip(&learnt).filter(|(_, learnt)| **learnt) {
            sum += f64::from(loss);
            count += 1;
        }
    }
    assert!((sum / f64::from(count) - whole[0].loss).abs() < 1e-5);
}

#[test]
fn padding_is_no_load() {
    let _turn = take_turns();
    let metrics = steps(on_one(config(8, 1)));
    let tokens: usize = (0..8).map(|place| Unequal.row(place).unwrap().padding_from).sum();
    for load in &metrics[0].loads {
        let counted: u64 = load.tokens_per_expert().iter().sum();
        assert_eq!(counted as usize, tokens * model_config().top_k);
    }
}

/// Names of the parameters that differ.
fn changed(one: &YuanModel, other: &YuanModel) -> Vec<String> {
    let values = |model: &YuanModel| {
        let mut values = Vec::new();
        let read = named::read_parameters(model, |path, data| {
            values.push((path.to_owned(), data.try_to_vec::<f32>().unwrap()));
            Ok::<_, std::convert::Infallible>(())
        });
        read.unwrap();
        values
    };
    let pairs = values(one).into_iter().zip(values(other));
    pairs.filter(|((_, one), (_, other))| one != other).map(|((path, _), _)| path).collect()
}

/// What does not learn has no moments, which is no damage.
#[test]
fn a_run_in_which_a_part_learns_goes_on_from_its_checkpoint() {
    let _turn = take_turns();
    let config = TrainConfig { learns: Learns::Routers, checkpoint_every: Some(2), ..config(4, 1) };
    let (device, run) = (Device::flex().autodiff(), tempdir().unwrap());
    let mut trainer =
        Trainer::new(config.clone(), run.path(), &device, fresh(&device), streams()).unwrap();
    trainer.run().unwrap();
    let saved = Checkpoint::list(run.path()).unwrap();
    let again = tempdir().unwrap();
    let resumed =
        Trainer::resume(config, again.path(), &device, &saved[0], streams()).map(|mut trainer| {
            trainer.run().unwrap();
            trainer
        });
    assert!(changed(resumed.unwrap().model(), trainer.model()).is_empty());
}

#[test]
fn only_what_learns_changes() {
    let _turn = take_turns();
    for (learns, part) in [
        (Learns::Routers, ".router."),
        (Learns::Experts, ".experts."),
        (Learns::Attention, ".attention."),
    ] {
        let mut trainer = on_one(TrainConfig { learns, ..config(4, 1) });
        let before = trainer.model().clone();
        trainer.train_step().unwrap();
        let changed = changed(&before, trainer.model());
        assert!(!changed.is_empty(), "{learns}");
        assert!(changed.iter().all(|path| path.contains(part)), "{learns}: {changed:?}");
    }
}

#[test]
fn routers_alone_recover_after_a_prune_and_a_resumed_run_does_the_same() {
    let _turn = take_turns();
    let recovering = || TrainConfig {
        steps: 6,
        checkpoint_every: Some(3),
        validate_every: None,
        laep: LaepConfig {
            trigger: Trigger::Steps(vec![2]),
            window_steps: 2,
            limits: PruneLimits { beta: 0.3.into(), ..PruneLimits::default() },
            recovery: Some(Recovery { learns: Learns::Routers, steps: 2 }),
            ..LaepConfig::default()
        },
        ..config(4, 1)
    };
    /// Notes the model after every step.
    struct Models(Arc<Mutex<Vec<YuanModel>>>);
    impl yuan_train::Callback<YuanModel> for Models {
        fn name(&self) -> &'static str {
            "models"
        }
        fn on_step(
            &mut self,
            context: &mut yuan_train::Context<'_, YuanModel>,
            _: &StepMetrics,
        ) -> Result<(), TrainError> {
            self.0.lock().unwrap().push(context.model().clone());
            Ok(())
        }
    }
    let (device, run) = (Device::flex().autodiff(), tempdir().unwrap());
    let models = Arc::default();
    let mut trainer =
        Trainer::new(recovering(), run.path(), &device, fresh(&device), streams()).unwrap();
    trainer = trainer.with_callback(Models(Arc::clone(&models))).unwrap();
    trainer = trainer.with_callback(MetricsFile::default()).unwrap();
    trainer.run().unwrap();
    let noted = models.lock().unwrap();
    // Step 3 is the first after the prune: between 3 and 4 the routers alone have moved.
    let routers = |path: &String| path.contains(".router.");
    assert!(changed(&noted[2], &noted[3]).iter().all(routers));
    let after = changed(&noted[3], &noted[4]);
    assert!(!after.iter().all(routers), "everything learns again: {after:?}");

    // Gone on with in the middle of the recovery.
    let checkpoint =
        yuan_train::Checkpoint { path: run.path().join("checkpoint-00000003"), step: 3 };
    let copy = tempdir().unwrap();
    fs::copy(run.path().join("metrics.jsonl"), copy.path().join("metrics.jsonl")).unwrap();
    let mut resumed: Trainer<YuanModel> =
        Trainer::resume(recovering(), copy.path(), &device, &checkpoint, streams()).unwrap();
    let first = resumed.model().clone();
    resumed = resumed.with_callback(Models(Arc::default())).unwrap();
    resumed.run().unwrap();
    assert_eq!(changed(&first, &noted[2]), Vec::<String>::new());
    assert_eq!(changed(resumed.model(), &noted[5]), Vec::<String>::new());
}

/// A small model that was trained on text.
fn trained(directory: &Path) -> Run {
    let text = "user assistant who has the key? Anna has it, and Ben has the lamp. ".repeat(30);
    let document = |i| Document { name: format!("{i}.txt"), text: text.clone() };
    let documents: Vec<Document> = (0..60).map(document).collect();
    let config = TrainConfig { steps: 1, seq_len: 32, batch_size: 2, ..config(2, 1) };
    let run =
        Run::create(directory, NewRun::new(config, YuanConfig::tiny(300), documents)).unwrap();
    run.trainer(&Device::flex().autodiff()).unwrap().run().unwrap();
    run
}

const TEMPLATE: &str = "{% for message in messages %}{% if message.role == 'assistant' %}\
    {% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}\
    {% else %}{{ message.role }}: {{ message.content }}\n{% endif %}{% endfor %}";

#[test]
fn conversations_become_rows_of_which_the_answers_are_learnt() {
    let _turn = take_turns();
    let temp = tempdir().unwrap();
    trained(&temp.path().join("base"));
    let lines = (0..60).map(|i| {
        let question = format!("who has {}? ", ["the key", "it", "the lamp"][i % 3]);
        let answer = ["Anna", "Ben"][i % 2];
        let question = question.repeat(1 + i % 4);
        let turns = json!([
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "and who has it?"},
            {"role": "assistant", "content": "Ben has it, and Anna has the lamp."},
        ]);
        json!({"messages": turns}).to_string() + "\n"
    });
    let file = temp.path().join("chat.jsonl");
    let bad = "{\"text\": \"no conversation\"}\n";
    fs::write(&file, lines.collect::<String>() + bad).unwrap();
    let chat = || ChatFiles { files: vec![file.clone()], validation: 0.2, separator: None };
    let base = || ModelDirectory::open(&temp.path().join("base")).unwrap();
    let config = || TrainConfig { steps: 3, seq_len: 96, ..config(2, 2) };
    let new = NewRun::from_model(config(), base(), chat())
        .with_chat_template(TEMPLATE.into())
        .with_isolated_documents();
    let run = Run::create(&temp.path().join("tuned"), new).unwrap();
    assert!(run.model().isolate_documents);
    let tokenizer = Tokenizer::load(run.directory()).unwrap();
    let eod = run.model().tokens.eod.unwrap();

    // What is learnt, read back: answers and what ends them, in every row.
    let streams =
        run.data().streams(run.directory(), &config(), eod, run.model().vocab_size).unwrap();
    let mut train = streams.train;
    let mut conversations = 0;
    for row in train.next_rows(6).unwrap() {
        let learnt = row.learnt.as_ref().unwrap();
        let answers: Vec<u32> = row
            .labels
            .iter()
            .zip(learnt)
            .filter(|(_, learnt)| **learnt)
            .map(|(id, _)| *id)
            .collect();
        for answer in answers.split_inclusive(|&token| token == eod) {
            let text = tokenizer.decode(answer).unwrap();
            assert_eq!(answer.last(), Some(&eod));
            assert!(
                [" Anna", " Ben", " Ben has it, and Anna has the lamp."].contains(&text.as_str()),
                "{text}"
            );
        }
        assert!(learnt[row.padding_from..].iter().all(|learnt| !learnt));
        let starts = row.position_ids[..row.padding_from].iter().filter(|&&at| at == 0).count();
        conversations += starts;
        // None is cut: each has two answers.
        assert_eq!(answers.iter().filter(|&&token| token == eod).count(), 2 * starts);
    }
    assert!(conversations > 6, "several in a row: {conversations}");

    // It trains, goes on exactly, and LAEP sees loads without padding.
    let mut trainer = run.trainer(&Device::flex().autodiff()).unwrap();
    trainer.run().unwrap();
    assert_eq!(
        Run::open(run.directory()).unwrap().trainer(&Device::flex().autodiff()).unwrap().step(),
        3
    );

    // What cannot be tuned on is refused in a sentence.
    let refused = |chat: ChatFiles, template: &str| {
        let new = NewRun::from_model(config(), base(), chat).with_chat_template(template.into());
        let error = Run::create(&temp.path().join("refused"), new).unwrap_err().to_string();
        assert!(!temp.path().join("refused").exists());
        error
    };
    let error = refused(
        chat(),
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}",
    );
    assert!(error.contains("nobody can tell what the assistant says"), "{error}");
    let separator = ChatFiles { separator: Some("<sep>".into()), ..chat() };
    let error = refused(separator, TEMPLATE);
    assert_eq!(error, "tokenizer: it has no <sep> token to find answers by");
    fs::write(&file, bad).unwrap();
    let error = refused(chat(), TEMPLATE);
    let expected = "0 conversations to train on and 0 to validate with are too few: bring more, or \
                    keep a larger share to validate with (--validation); left out 1 record: \
                    chat.jsonl (lines without `messages`, or `prompt` and `response`; the first is line 1)";
    assert_eq!(error, expected);
    fs::write(&file, "{").unwrap();
    assert!(refused(chat(), TEMPLATE).contains("chat.jsonl: line 1 is no JSON"), "{error}");
}

#[test]
fn data_sets_are_mixed_and_validated_each_and_a_run_goes_on_exactly() {
    let _turn = take_turns();
    let temp = tempdir().unwrap();
    let prepared = |name: &str, word: &str, tokenizer: Option<&Path>| {
        let sources = temp.path().join(format!("{name}-text"));
        fs::create_dir(&sources).unwrap();
        for i in 0..80 {
            let text: String = (0..60).map(|j| format!("{word}{} ", (i + j * j) % 23)).collect();
            fs::write(sources.join(format!("{i}.txt")), text).unwrap();
        }
        let options = match tokenizer {
            Some(path) => PrepareOptions::with_tokenizer(vec![sources], path.into()),
            None => PrepareOptions::train_tokenizer(vec![sources], 300),
        };
        let out = temp.path().join(name);
        prepare(&out, &options, &NoProgress).unwrap();
        out
    };
    let web = prepared("web", "web", None);
    let code = prepared("code", "code", Some(&web));
    let other = prepared("other", "other", None);
    let set = |name: &str, weight: f64, path: &Path| {
        format!("{name}={weight}:{}", path.display()).parse().unwrap()
    };
    let config = |steps| TrainConfig {
        steps,
        checkpoint_every: Some(4),
        validation_batches: 1,
        ..config(2, 1)
    };
    let model = || YuanConfig::tiny(300);
    let new = |steps, sets| NewRun::new(config(steps), model(), RunData::Prepared(sets));
    let mixed = || vec![set("web", 3.0, &web), set("code", 1.0, &code)];
    let device = Device::flex().autodiff();

    let run = Run::create(&temp.path().join("whole"), new(8, mixed())).unwrap();
    let mut trainer = run.trainer(&device).unwrap();
    trainer.run().unwrap();
    let whole = trainer.model().clone();
    drop((trainer, Run::open(run.directory())));
    let metrics = fs::read_to_string(run.directory().join("metrics.jsonl")).unwrap();
    let validation = metrics.lines().find(|line| line.contains("\"web\":")).unwrap();
    let validation: serde_json::Value = serde_json::from_str(validation).unwrap();
    let [loss, web_loss, code_loss] = ["/loss", "/sets/web", "/sets/code"]
        .map(|path| validation.pointer(path).unwrap().as_f64().unwrap());
    assert!((0.75 * web_loss + 0.25 * code_loss - loss).abs() < 1e-12);

    // The same from a checkpoint in the middle, in a directory that was moved.
    drop(run);
    let again = temp.path().join("moved");
    fs::rename(temp.path().join("whole"), &again).unwrap();
    fs::remove_dir_all(again.join("checkpoint-00000008")).unwrap();
    let mut resumed = Run::open(&again).unwrap().trainer(&device).unwrap();
    assert_eq!(resumed.step(), 4);
    resumed.run().unwrap();
    assert_eq!(changed(resumed.model(), &whole), Vec::<String>::new());

    let refused =
        |sets| Run::create(&temp.path().join("refused"), new(8, sets)).unwrap_err().to_string();
    let error = refused(vec![set("web", 1.0, &web), set("other", 1.0, &other)]);
    assert!(
        error.ends_with("were prepared with different tokenizers, or other ends of documents"),
        "{error}"
    );
    let error = refused(vec![set("web", 1.0, &web), set("web", 1.0, &code)]);
    assert!(error.contains("two data sets are called `web`"), "{error}");
    // A set that is gone is named.
    fs::rename(&code, temp.path().join("elsewhere")).unwrap();
    let error = Run::open(&again).unwrap().trainer(&device).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("code/dataset.json"), "{error}");
}

#[test]
fn tokens_of_another_vocabulary_are_refused_where_they_are_read() {
    let _turn = take_turns();
    let temp = tempdir().unwrap();
    let run = trained(&temp.path().join("run"));
    let streams = run.data().streams(run.directory(), &config(2, 1), 0, 20);
    let mut train = streams.unwrap().train;
    let error = train.next_rows(4).unwrap_err();
    assert!(matches!(error, TrainError::Data(DataError::Damaged { .. })));
    let error = error.to_string();
    assert!(
        error.contains("but the model has only 20: it was made with another tokenizer"),
        "{error}"
    );
    let tokenizer = tokenizer::read(run.directory()).unwrap();
    assert!(tokenizer.get_vocab_size(true) > 20);
}
