//! Balancing losses against a plain calculation in f64, their gradients against finite differences
//! of it.

mod support;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use proptest::prelude::*;
use support::{devices, values};
use yuan_model::moe::{
    BalanceLosses, RoutedTokens,
    balance::{auxiliary_loss, router_z_loss, sequence_loss},
};

/// Tokens of a small layer on the host.
#[derive(Debug, Clone)]
struct Layer {
    batch: usize,
    seq: usize,
    experts: usize,
    top_k: usize,
    logits: Vec<f64>,
    padding: Vec<bool>,
}

impl Layer {
    fn row(&self, token: usize) -> &[f64] {
        &self.logits[token * self.experts..][..self.experts]
    }

    fn chosen(&self, token: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.experts).collect();
        order.sort_by(|&a, &b| self.row(token)[b].total_cmp(&self.row(token)[a]));
        order.truncate(self.top_k);
        order
    }

    fn probability(&self, token: usize, expert: usize) -> f64 {
        let sum: f64 = self.row(token).iter().map(|x| x.exp()).sum();
        self.row(token)[expert].exp() / sum
    }

    /// Tokens that are no padding, of the whole batch or of one row.
    fn tokens(&self, row: Option<usize>) -> Vec<usize> {
        let of_row = |&t: &usize| row.is_none_or(|row| t / self.seq == row);
        (0..self.batch * self.seq).filter(|&t| !self.padding[t]).filter(of_row).collect()
    }

    /// Σ over experts of (visits of the tokens) · (sum of probabilities); `choices` fixes who
    /// visits whom.
    fn products(&self, tokens: &[usize], choices: &[Vec<usize>]) -> f64 {
        let product = |expert: usize| {
            let visits = tokens.iter().filter(|&&t| choices[t].contains(&expert)).count() as f64;
            visits * tokens.iter().map(|&t| self.probability(t, expert)).sum::<f64>()
        };
        (0..self.experts).map(product).sum()
    }

    fn losses(&self, choices: &[Vec<usize>]) -> [f64; 3] {
        let all = self.tokens(None);
        let n = all.len() as f64;
        let auxiliary = self.experts as f64 * self.products(&all, choices) / (n * n);
        let rows: Vec<Vec<usize>> = (0..self.batch)
            .map(|row| self.tokens(Some(row)))
            .filter(|tokens| !tokens.is_empty())
            .collect();
        let of_row = |tokens: &Vec<usize>| {
            let t = tokens.len() as f64;
            self.experts as f64 / self.top_k as f64 * self.products(tokens, choices) / (t * t)
        };
        let sequence = rows.iter().map(of_row).sum::<f64>() / rows.len() as f64;
        let log_sum = |t: &usize| self.row(*t).iter().map(|x| x.exp()).sum::<f64>().ln();
        let z = all.iter().map(|t| log_sum(t).powi(2)).sum::<f64>() / n;
        [auxiliary, sequence, z]
    }
}

fn layers() -> impl Strategy<Value = Layer> {
    (1..4_usize, 1..5_usize, 2..7_usize).prop_flat_map(|(batch, seq, experts)| {
        let tokens = batch * seq;
        let logits = prop::collection::vec(-3.0..3.0_f64, tokens * experts);
        let padding = prop::collection::vec(prop::bool::weighted(0.3), tokens);
        (1..=experts.min(3), logits, padding)
            .prop_filter("some token", |(_, _, padding)| padding.iter().any(|&padding| !padding))
            .prop_map(move |(top_k, logits, padding)| Layer {
                batch,
                seq,
                experts,
                top_k,
                logits,
                padding,
            })
    })
}

type Loss = fn(&RoutedTokens<'_>) -> Tensor<1>;
const LOSSES: [(&str, Loss); 3] =
    [("auxiliary", auxiliary_loss), ("sequence", sequence_loss), ("router z", router_z_loss)];

/// Value and gradient for the logits of one loss on a device.
fn on_device(layer: &Layer, loss: Loss, device: &Device) -> (f64, Vec<f32>) {
    let tokens = layer.batch * layer.seq;
    let logits: Vec<f32> = layer.logits.iter().map(|&x| x as f32).collect();
    let logits = Tensor::<2>::from_data(TensorData::new(logits, [tokens, layer.experts]), device)
        .require_grad();
    let chosen: Vec<i64> = (0..tokens).flat_map(|t| layer.chosen(t)).map(|e| e as i64).collect();
    let experts =
        Tensor::<2, Int>::from_data(TensorData::new(chosen, [tokens, layer.top_k]), device);
    let padding = TensorData::new(layer.padding.clone(), [layer.batch, layer.seq]);
    let padding = Tensor::<2, Bool>::from_data(padding, device);
    let routed = RoutedTokens {
        logits: &logits,
        experts: &experts,
        batch: layer.batch,
        padding: Some(&padding),
    };
    let loss = loss(&routed);
    let gradient = logits.grad(&loss.backward()).expect("a gradient");
    (f64::from(loss.into_scalar::<f32>()), values(&gradient.into_data()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn values_and_gradients_agree(layer in layers()) {
        let choices: Vec<Vec<usize>> = (0..layer.batch * layer.seq).map(|t| layer.chosen(t)).collect();
        for (name, device) in devices() {
            for (i, (what, loss)) in LOSSES.into_iter().enumerate() {
                let (value, gradient) = on_device(&layer, loss, &device.clone().autodiff());
                let expected = layer.losses(&choices)[i];
                prop_assert!((value - expected).abs() < 1e-4 * expected.max(1.0), "{name} {what}: {value} {expected}");
                for (at, &gradient) in gradient.iter().enumerate() {
                    let nudged = |by: f64| {
                        let mut layer = layer.clone();
                        layer.logits[at] += by;
                        layer.losses(&choices)[i]
                    };
                    let slope = (nudged(1e-5) - nudged(-1e-5)) / 2e-5;
                    prop_assert!(
                        (f64::from(gradient) - slope).abs() < 1e-4 * slope.abs().max(1.0),
                        "{name} {what}: gradient {at} is {gradient}, the slope {slope}"
                    );
                }
            }
        }
    }
}

#[test]
fn equal_loads_and_scores_give_the_values_of_the_definitions() {
    // Four tokens, four experts, two each in turn; equal logits make every probability a quarter.
    let device = Device::flex();
    let logits = Tensor::<2>::zeros([4, 4], &device);
    let experts = Tensor::<2, Int>::from_data([[0, 1], [2, 3], [0, 1], [2, 3]], &device);
    let routed = RoutedTokens { logits: &logits, experts: &experts, batch: 1, padding: None };
    let value = |loss: Tensor<1>| loss.into_scalar::<f32>();
    assert!((value(auxiliary_loss(&routed)) - 2.0).abs() < 1e-6, "top_k");
    assert!((value(sequence_loss(&routed)) - 1.0).abs() < 1e-6);
    assert!((value(router_z_loss(&routed)) - 4_f32.ln().powi(2)).abs() < 1e-6);
    // A coefficient of zero is off, the others are weighted and added.
    assert!(BalanceLosses::default().of(&routed).is_none());
    let both = BalanceLosses { auxiliary: 0.5, sequence: 0.0, router_z: 2.0 };
    let expected = 0.5 * 2.0 + 2.0 * 4_f32.ln().powi(2);
    assert!((value(both.of(&routed).unwrap()) - expected).abs() < 1e-5);
}
