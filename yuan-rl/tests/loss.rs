//! RAPO's loss and advantages against upstream's own functions.

use std::{fs, path::PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::SafeTensors;
use serde_json::Value;
use yuan_rl::{EntropyScope, RapoLoss, Tokens, group_advantages};

/// What upstream made; `YUAN_REFERENCE` names another directory of the same layout.
fn reference() -> PathBuf {
    let own = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::env::var_os("YUAN_REFERENCE").map_or_else(own, PathBuf::from).join("rapo")
}

fn values(tensors: &SafeTensors, name: &str) -> (Vec<f32>, Vec<usize>) {
    let tensor = tensors.tensor(name).unwrap();
    let values = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    (values.collect(), tensor.shape().to_vec())
}

fn on_host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let apart = (found - expected).abs();
        assert!(apart <= 1e-5 * expected.abs().max(1.0), "{what}: {found}, expected {expected}");
    }
}

#[test]
fn reference_losses_advantages_and_gradients_are_upstreams() {
    let bytes = fs::read(reference().join("policy_loss.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let cases: Value =
        serde_json::from_slice(&fs::read(reference().join("policy_loss.json")).unwrap()).unwrap();
    let device = Device::flex().autodiff();
    for (name, case) in cases.as_object().unwrap() {
        let read = |what: &str| values(&tensors, &format!("{name}.{what}"));
        let tensor = |what: &str| {
            let (values, shape) = read(what);
            Tensor::<2>::from_data(TensorData::new(values, [shape[0], shape[1]]), &device)
        };
        let (mask, shape) = read("mask");
        let group = case["answers_per_prompt"].as_u64().unwrap() as usize;
        let of_answers = group_advantages(&read("rewards").0, group);
        let of_tokens = mask.iter().enumerate().map(|(at, m)| m * of_answers[at / shape[1]]);
        assert_close(&of_tokens.collect::<Vec<_>>(), &read("advantages").0, "advantages");

        let log_probs = tensor("log_prob").require_grad();
        let rapo = RapoLoss {
            clip_low: case["clip_low"].as_f64().unwrap(),
            clip_high: case["clip_high"].as_f64().unwrap(),
            share: 1.0 - case["entropy_quantile"].as_f64().unwrap(),
            scope: EntropyScope::Batch,
        };
        let found = rapo.of(Tokens {
            log_probs: log_probs.clone(),
            old_log_probs: tensor("old_log_prob"),
            advantages: tensor("advantages"),
            entropies: tensor("entropy"),
            mask: tensor("mask"),
        });
        let gradients = found.loss.clone().backward();
        assert_close(&on_host(found.loss), &read("loss").0, "loss");
        assert_close(&on_host(found.clip_fraction), &read("clip_fraction").0, "clip fraction");
        assert_close(&on_host(found.approx_kl), &read("approx_kl").0, "divergence");
        let gradient = on_host(log_probs.grad(&gradients).unwrap());
        assert_close(&gradient, &read("grad_log_prob").0, "gradient");
    }
}

/// A response of which every token is surer than another one's still has its own uncertain tokens.
#[test]
fn the_scope_of_the_uncertain_tokens_is_a_response_or_the_batch() {
    let device = Device::flex();
    let tensor = |values: [[f32; 5]; 2]| Tensor::<2>::from_floats(values, &device);
    let ones = tensor([[1.0; 5]; 2]);
    let loss_of = |scope, share| {
        let rapo = RapoLoss { scope, share, ..RapoLoss::default() };
        let loss = rapo.of(Tokens {
            log_probs: ones.clone(),
            old_log_probs: ones.clone(),
            // What counts of the second response is ten times as much.
            advantages: tensor([[1.0; 5], [10.0; 5]]),
            entropies: tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.4, 0.3, 0.2, 0.1, 0.0]]),
            mask: ones.clone(),
        });
        on_host(loss.loss)[0]
    };
    // The sum over ten tokens, of which one of each response counts, or two of the first.
    assert!((loss_of(EntropyScope::Response, 0.2) + 1.1).abs() < 1e-6);
    assert!((loss_of(EntropyScope::Batch, 0.2) + 0.2).abs() < 1e-6);
    assert!((loss_of(EntropyScope::Batch, 1.0) + 5.5).abs() < 1e-6);
}

#[test]
fn a_negative_advantage_is_not_pushed_without_bound() {
    let device = Device::flex().autodiff();
    let gradient_of = |ratio: f32, advantage: f32| {
        let tensor = |value: f32| Tensor::<2>::from_floats([[value]], &device);
        let log_probs = tensor(ratio.ln()).require_grad();
        let rapo = RapoLoss { share: 1.0, ..RapoLoss::default() };
        let found = rapo.of(Tokens {
            log_probs: log_probs.clone(),
            old_log_probs: tensor(0.0),
            advantages: tensor(advantage),
            entropies: tensor(1.0),
            mask: tensor(1.0),
        });
        on_host(log_probs.grad(&found.loss.backward()).unwrap())[0]
    };
    assert!((gradient_of(1.1, -1.0) - 1.1).abs() < 1e-6);
    // PPO would push with the ratio.
    assert_eq!(gradient_of(9.0, -1.0), 0.0);
    assert_eq!(gradient_of(9.0, 1.0), 0.0);
    assert_eq!(gradient_of(0.5, -1.0), 0.0);
    assert!((gradient_of(0.5, 1.0) + 0.5).abs() < 1e-6);
}
