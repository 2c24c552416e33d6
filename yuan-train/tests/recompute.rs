//! Differentiating layer by layer, and recomputing layers for it, changes memory and time, and nothing
//! else.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{Device, Int, Tensor, TensorData},
};
use yuan_model::{
    BalanceLosses, BatchImages, RouterType, YuanConfig, YuanModel, named,
    vision::{ImageConfig, VisionConfig},
};
use yuan_train::{Batch, LanguageModel, LossOptions, LossOutput, Precision};

const VOCAB: usize = 50;

/// Burn has one random state per process and device: tests that draw from it take turns.
static RANDOM_STATE: Mutex<()> = Mutex::new(());

fn take_turns() -> MutexGuard<'static, ()> {
    RANDOM_STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn batch(device: &Device) -> Batch {
    let tensor =
        |values: Vec<i64>| Tensor::<2, Int>::from_data(TensorData::new(values, [3, 12]), device);
    let tokens =
        |shift: i64| tensor((0..36).map(|i| (i * i + 3 * i + shift) % VOCAB as i64).collect());
    // A document ends in the middle of each row.
    let position_ids = tensor((0..36).map(|i| (i % 12) % 7).collect());
    Batch::new(tokens(0), tokens(1), position_ids)
}

/// The same rows, each with nine tiles of a row of the model: more than go through the tower at once.
fn batch_with_images(device: &Device) -> Batch {
    let values: Vec<f32> = (0..27 * 3 * 8 * 8).map(|i| (i * i % 97) as f32 / 30.0 - 1.5).collect();
    let tiles = Tensor::from_data(TensorData::new(values, [27, 3, 8, 8]), device);
    let places = (0..3).flat_map(|row| (1..10).map(move |at| row * 12 + at)).collect();
    batch(device).with_images(BatchImages { tiles, places })
}

fn images() -> ImageConfig {
    let tiny = ImageConfig::tiny(0);
    ImageConfig { tower: VisionConfig { image_size: 8, patch_size: 4, ..tiny.tower }, ..tiny }
}

/// Gradients of all parameters, in order.
fn gradients(model: &YuanModel, gradients: &GradientsParams) -> Vec<Vec<f32>> {
    struct Collect<'a>(&'a GradientsParams, Vec<Vec<f32>>);
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = self.0.get::<D>(param.id).expect("every parameter has a gradient");
            self.1.push(gradient.into_data().convert::<f32>().iter::<f32>().collect());
        }
    }
    let mut visitor = Collect(gradients, Vec::new());
    model.visit(&mut visitor);
    visitor.1
}

fn numbers(output: &LossOutput) -> (f32, Option<f32>, Vec<Vec<u64>>) {
    let float = |tensor: &Tensor<1>| tensor.clone().into_scalar::<f32>();
    let counts = |counts: &Tensor<1, Int>| {
        let data = counts.clone().into_data().convert::<i64>();
        data.iter::<i64>().map(|count| count as u64).collect()
    };
    let loads = output.tokens_per_expert.iter().map(counts);
    (float(&output.loss), output.balance_loss.as_ref().map(float), loads.collect())
}

#[test]
fn loss_gradients_and_loads_are_the_same() {
    let _turn = take_turns();
    let device = Device::flex().autodiff();
    let balance = BalanceLosses { auxiliary: 0.3, sequence: 0.2, router_z: 0.1 };
    for router_type in [RouterType::Linear, RouterType::Attention] {
        for (balance, precision, reset, sees) in [
            (BalanceLosses::default(), Precision::F32, false, false),
            (balance, Precision::F32, true, false),
            (balance, Precision::Bf16, false, false),
            (balance, Precision::F32, false, true),
            (balance, Precision::Bf16, false, true),
        ] {
            let config = YuanConfig {
                router_type,
                isolate_documents: reset,
                filter_bias: true,
                init_std: 0.2,
                experts_per_layer: vec![8, 5, 3],
                images: sees.then(images),
                ..YuanConfig::tiny(VOCAB)
            };
            let batch = if sees { batch_with_images } else { batch };
            device.seed(5);
            let model = named::initialized(YuanModel::new(&config, &device).unwrap());
            let run = |recompute| {
                let options =
                    LossOptions { balance, precision, recompute, ..LossOptions::default() };
                let (output, found) =
                    model.loss_and_gradients(batch(&device), options, 0.5).unwrap();
                (numbers(&output), gradients(&model, &found))
            };
            // One graph of all layers, which nothing cuts.
            let options = LossOptions { balance, precision, ..LossOptions::default() };
            let whole = LanguageModel::loss(&model, batch(&device), options).unwrap();
            let kept = numbers(&whole);
            let objective = match whole.balance_loss {
                Some(balance) => whole.loss + balance,
                None => whole.loss,
            };
            let grads = objective.mul_scalar(0.5).backward();
            let kept_gradients = gradients(&model, &GradientsParams::from_grads(grads, &model));
            for (again, again_gradients) in [run(None), run(Some(1))] {
                let what = format!("{router_type:?} {precision:?} {sees}");
                assert_eq!(again.2, kept.2, "{what}: tokens per expert, counted once");
                assert_eq!(again.0, kept.0, "{what}: loss");
                // Losses of layers are added up in another order.
                let close = |a: f32, b: f32, tolerance: f32| {
                    (a - b).abs() <= tolerance * a.abs().max(b.abs()).max(1e-3)
                };
                assert!(
                    again.1.zip(kept.1).is_none_or(|(a, b)| close(a, b, 1e-5)),
                    "{what}: {again:?} {kept:?}"
                );
                // In bf16 the gradient of a sum of rows is rounded in another order.
                let tolerance = if precision == Precision::F32 { 1e-5 } else { 2e-2 };
                for (index, (a, b)) in again_gradients.iter().zip(&kept_gradients).enumerate() {
                    let largest = b.iter().fold(1e-6_f32, |max, g| max.max(g.abs()));
                    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(
                        worst <= tolerance * largest,
                        "{what}: gradient {index} differs by {worst:e} of {largest:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn dropout_draws_alike_in_both_passes() {
    let _turn = take_turns();
    let device = Device::flex().autodiff();
    let config =
        YuanConfig { hidden_dropout: 0.3, attention_dropout: 0.2, ..YuanConfig::tiny(VOCAB) };
    device.seed(5);
    let model = named::initialized(YuanModel::new(&config, &device).unwrap());
    let run = |seed| {
        let options = LossOptions { recompute: Some(seed), ..LossOptions::default() };
        let (output, found) = model.loss_and_gradients(batch(&device), options, 1.0).unwrap();
        (numbers(&output).0, gradients(&model, &found))
    };
    let (loss, found) = run(7);
    let (second, again) = run(7);
    assert_eq!(loss, second, "the seed decides the loss");
    let differ: Vec<usize> = (0..found.len()).filter(|&i| found[i] != again[i]).collect();
    assert!(differ.is_empty(), "the seed decides the gradients: {differ:?} differ");
    assert_ne!(loss, run(8).0);
    // The gradient is that of the loss: along itself the loss falls by its squared length.
    let step = 1e-3;
    let squared: f64 = found.iter().flatten().map(|g| f64::from(*g).powi(2)).sum();
    let mut index = 0;
    let moved = named::write_parameters(model.clone(), |path, _| {
        let data = named::read_part(&model, path, None)?;
        let values: Vec<f32> =
            data.iter::<f32>().zip(&found[index]).map(|(w, g)| w - step * g).collect();
        index += 1;
        Some(TensorData::new(values, data.shape().clone()))
    });
    let options = LossOptions { recompute: Some(7), ..LossOptions::default() };
    let (output, _) = moved.loss_and_gradients(batch(&device), options, 1.0).unwrap();
    let fell = f64::from(loss - numbers(&output).0);
    let expected = f64::from(step) * squared;
    assert!((fell / expected - 1.0).abs() < 0.05, "fell by {fell:e}, expected {expected:e}");
}
