//! Runs of a tiny model on one device and over ranks, made to be compared.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::{collections::HashMap, path::Path};

use burn::tensor::{Device, TensorData};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use yuan_laep::{PruneLimits, StabilityTest};
use yuan_model::{
    YuanConfig, YuanModel,
    named::{self, StoredParameter},
};
use yuan_report::History;
use yuan_train::{
    AdamW, Checkpoint, Event, LaepConfig, LanguageModel, MetricsFile, TrainConfig, Trainer,
    Trigger, data::RowStream,
};

pub const VOCAB: usize = 32;
pub const STEPS: u64 = 10;

/// Largest difference to one device, relative to the largest value: f32 sums in another order.
pub const TOLERANCE: f64 = 1e-5;

/// By `YUAN_DEVICE` (`cuda:0,cuda:1`), as often as it takes; one CPU does the work of all
/// otherwise.
pub fn devices() -> Vec<Device> {
    let wanted = std::env::var("YUAN_DEVICE").unwrap_or_else(|_| "flex".into());
    wanted.split(',').map(|name| yuan_model::device(name).unwrap()).collect()
}

pub fn home() -> Device {
    device_of(0)
}

/// Ranks take turns where there are fewer devices.
pub fn device_of(rank: usize) -> Device {
    let devices = devices();
    devices[rank % devices.len()].clone().autodiff()
}

pub fn model_config() -> YuanConfig {
    YuanConfig {
        init_std: 0.2,
        isolate_documents: true,
        experts_per_layer: vec![8, 8],
        ..YuanConfig::tiny(VOCAB)
    }
}

/// Prunes after step 5, and rearranges the experts four windows later.
pub fn train_config() -> TrainConfig {
    TrainConfig {
        steps: STEPS,
        batch_size: 4,
        seq_len: 16,
        accumulation: 2,
        learning_rate: 5e-3,
        min_learning_rate: 1e-3,
        warmup_steps: 2,
        validation_batches: 2,
        seed: 3,
        laep: LaepConfig {
            window_steps: 1,
            trigger: Trigger::Steps(vec![5]),
            stability: StabilityTest { windows: 2, ..StabilityTest::default() },
            limits: PruneLimits { beta: 0.4.into(), multiple_of: 4, ..PruneLimits::default() },
            groups: 4,
            rearrange_every: Some(4),
            ..LaepConfig::default()
        },
        ..TrainConfig::default()
    }
}

/// Tokens to train on.
pub const TOKENS: usize = 2000;

/// Two steps, each of one epoch, with a prune between them that keeps all experts and rearranges
/// them in two groups. Nothing is learned: the second step routes as the first did, which the plan
/// rests on.
pub fn two_epochs_around_a_rearrangement() -> TrainConfig {
    let rows = (TOKENS - 1) / 16;
    assert!(rows.is_multiple_of(4), "{rows} rows");
    let mut config =
        TrainConfig { learning_rate: 1e-30, min_learning_rate: 0.0, steps: 2, ..train_config() };
    config.laep.trigger = Trigger::Steps(vec![1]);
    config.laep.limits.beta = 0.0.into();
    config.laep.groups = 2;
    config.laep.limits.multiple_of = 2;
    config.batch_size = 4;
    config.accumulation = rows / 4;
    config
}

pub fn streams(seq_len: usize) -> [RowStream; 2] {
    let token = |i: u32| (i * i / 3 + i * 5) % VOCAB as u32;
    let rows = |range: std::ops::Range<u32>, seed| {
        RowStream::new(range.map(token).collect(), 0, seq_len, seed).unwrap()
    };
    [rows(0..TOKENS as u32, Some(3)), rows(2000..2600, None)]
}

/// The same initial weights wherever they go. They are not drawn by Burn, which has one random
/// state for all tests.
pub fn fresh_model(config: &YuanConfig, device: &Device) -> YuanModel {
    let model = YuanModel::new(config, device).unwrap();
    let stored = named::stored_parameters(&model);
    let mut random = StdRng::seed_from_u64(3);
    let draw = |parameter: &StoredParameter| {
        let count: usize = parameter.shape.iter().product();
        let (mean, spread) = if parameter.shape.len() == 1 { (1.0, 0.1) } else { (0.0, 0.35) };
        let values: Vec<f32> =
            (0..count).map(|_| mean + spread * random.random_range(-1.0..1.0)).collect();
        (parameter.path.clone(), TensorData::new(values, parameter.shape.clone()))
    };
    let drawn: HashMap<String, TensorData> = stored.iter().map(draw).collect();
    named::write_stored(model, &stored, |parameter| drawn.get(&parameter.path).cloned())
}

pub fn open_on_one(config: &TrainConfig, run_dir: &Path) -> Trainer<YuanModel> {
    let (device, streams, config) = (home(), streams(config.seq_len), config.clone());
    let trainer = match Checkpoint::latest(run_dir).unwrap() {
        Some(checkpoint) => Trainer::resume(config, run_dir, &device, &checkpoint, streams),
        None => {
            let model = fresh_model(&model_config(), &device);
            Trainer::new(config, run_dir, &device, model, streams)
        }
    };
    trainer.unwrap().with_callback(MetricsFile::default()).unwrap()
}

/// What must not depend on the devices: losses, gradient norms, loads, validations, prunes and
/// rearrangements.
#[derive(Debug, Clone, PartialEq)]
pub struct Story {
    pub numbers: Vec<(u64, &'static str, f64)>,
    pub loads: Vec<(u64, Vec<usize>)>,
}

pub fn story(run_dir: &Path) -> Story {
    let (mut numbers, mut loads) = (Vec::new(), Vec::new());
    for event in History::read(run_dir).unwrap().events() {
        match event {
            Event::Step(metrics) => {
                numbers.push((metrics.step, "loss", metrics.loss));
                numbers.push((metrics.step, "gradient norm", metrics.gradient_norm));
                numbers.extend(
                    metrics.max_over_mean.iter().map(|&x| (metrics.step, "max over mean", x)),
                );
                numbers.extend(metrics.balance_loss.map(|x| (metrics.step, "balance", x)));
            }
            Event::Validation { step, loss, .. } => numbers.push((*step, "validation", *loss)),
            Event::Prune { step, experts_after, .. } => loads.push((*step, experts_after.clone())),
            Event::Rearrange { step, groups_after, .. } => {
                numbers.extend(groups_after.iter().map(|&x| (*step, "groups", x)));
            }
            _ => {}
        }
    }
    Story { numbers, loads }
}

#[track_caller]
pub fn assert_same_story(found: &Story, expected: &Story) {
    assert_eq!(found.loads, expected.loads);
    assert_eq!(found.numbers.len(), expected.numbers.len());
    for (found, expected) in found.numbers.iter().zip(&expected.numbers) {
        assert_eq!((found.0, found.1), (expected.0, expected.1));
        let difference = (found.2 - expected.2).abs() / expected.2.abs().max(1e-3);
        // Every update carries the differences before it on.
        assert!(
            difference <= TOLERANCE * found.0.max(1) as f64,
            "step {}: {} {} is not {}",
            found.0,
            found.1,
            found.2,
            expected.2
        );
    }
}

#[track_caller]
pub fn assert_close(
    found: &HashMap<String, Vec<f32>>,
    expected: &HashMap<String, Vec<f32>>,
    tolerance: f64,
) {
    let paths = |values: &HashMap<String, Vec<f32>>| {
        let mut paths: Vec<_> = values.keys().cloned().collect();
        paths.sort();
        paths
    };
    assert_eq!(paths(found), paths(expected));
    for (path, expected) in expected {
        let found = &found[path];
        assert_eq!(found.len(), expected.len(), "{path}");
        let scale = f64::from(expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()))).max(1e-6);
        let worst =
            found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        assert!(worst / scale <= tolerance, "{path}: {worst:e} of {scale:e}");
    }
}

/// Parameters and moments of a model on one device.
pub fn state<M: LanguageModel>(model: &M, optimizer: &AdamW) -> HashMap<String, Vec<f32>> {
    let mut state = HashMap::new();
    let values = |data: TensorData| data.convert::<f32>().iter::<f32>().collect();
    named::read_parameters(model, |path, data| {
        state.insert(path.to_owned(), values(data));
        Ok::<_, ()>(())
    })
    .unwrap();
    optimizer
        .save(&model.stored_parameters(), |name, data| {
            state.insert(name, values(data));
            Ok(())
        })
        .unwrap();
    state
}
