//! Fast operations against the portable ones, forward and gradients, on random shapes.
//!
//! `ndarray` runs the portable forms, `flex` the fast ones: their agreement is the test.

mod support;

use burn::tensor::{DType, Device, Distribution, Tensor};
use proptest::prelude::*;
use support::{Kind, devices, ints, largest_difference, numbers, tolerance, values};
use yuan_model::{moe::Dispatch, ops};

/// Results of one operation on one device: output and gradients, flat.
type Results = Vec<Vec<f32>>;

/// Runs `operation` on every device and demands the same results of all.
fn agree(what: &str, operation: impl Fn(&Device) -> Results) {
    let devices = devices();
    let all: Vec<(&str, Results)> = devices
        .iter()
        .map(|(name, device)| (name.as_str(), operation(&device.clone().autodiff())))
        .collect();
    for ((name, results), (_, device)) in all.iter().zip(&devices).skip(1) {
        let tolerance = tolerance(Kind::Operation, device, DType::F32);
        for (i, (a, b)) in all[0].1.iter().zip(results).enumerate() {
            let scale = a.iter().fold(1.0_f32, |max, x| max.max(x.abs()));
            let worst = largest_difference(a, b) / scale;
            assert!(
                worst <= tolerance,
                "{what}: result {i} of {name} differs from {} by {worst:e}",
                all[0].0
            );
        }
    }
}

/// Output, and the gradients of `Σ output ⊙ coefficients` for the inputs.
macro_rules! results {
    ($output:expr, $($input:expr),+) => {{
        let output = $output;
        let coefficients = numbers(output.dims(), 99, &output.device());
        let grads = (output.clone() * coefficients).sum().backward();
        vec![values(&output.to_data()), $(values(&$input.grad(&grads).expect("a gradient").to_data())),+]
    }};
}

fn groups() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![Just(0_usize), 1..5_usize, 1..40_usize], 1..9)
}

/// Every shape is compiled anew for a GPU, on Mesa's software one in seconds.
fn cases() -> u32 {
    if std::env::var("YUAN_DEVICE").is_ok_and(|devices| devices.contains("wgpu")) { 6 } else { 24 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn grouped_products_agree_for_ragged_and_empty_groups(counts in groups(), d_in in 1..20_usize, d_out in 1..20_usize, seed: u64) {
        let rows: usize = counts.iter().sum();
        prop_assume!(rows > 0);
        agree("grouped_matmul", |device| {
            let x = numbers([rows, d_in], seed, device).require_grad();
            let w = numbers([counts.len(), d_in, d_out], seed ^ 1, device).require_grad();
            results!(ops::grouped_matmul(x.clone(), w.clone(), &counts), x, w)
        });
    }

    #[test]
    fn swiglu_agrees(rows in 1..30_usize, half in 1..40_usize, seed: u64) {
        agree("swiglu", |device| {
            let x = numbers([rows, 2 * half], seed, device).mul_scalar(6.0).require_grad();
            results!(ops::swiglu(x.clone()), x)
        });
    }

    #[test]
    fn dispatch_and_combine_agree_and_are_inverse(tokens in 1..40_usize, top_k in 1..4_usize, more in 0..6_usize, width in 1..20_usize, seed: u64) {
        let experts = top_k + more;
        // Token t visits experts t·7, t·7 + 1, …: distinct, and uneven over the experts.
        let chosen: Vec<usize> = (0..tokens * top_k).map(|i| (i / top_k * i / top_k * 7 + i % top_k) % experts).collect();
        agree("dispatch", |device| {
            let order = Dispatch::new(ints(&chosen, device).reshape([tokens, top_k]), experts);
            let x = numbers([tokens, width], seed, device).require_grad();
            let w = numbers([tokens, top_k], seed ^ 1, device).require_grad();
            let rows = order.scatter(x.clone());
            // Sorted rows hold the tokens of expert 0, then of expert 1, …, in token order.
            let sorted: Vec<usize> = (0..experts).flat_map(|e| (0..tokens * top_k).filter(|&p| chosen[p] == e).map(|p| p / top_k).collect::<Vec<_>>()).collect();
            let expected = x.clone().select(0, ints(&sorted, device));
            assert_eq!(values(&rows.to_data()), values(&expected.to_data()));
            let counts: Vec<usize> = (0..experts).map(|e| chosen.iter().filter(|&&c| c == e).count()).collect();
            assert_eq!(order.rows_per_expert().unwrap(), counts);
            results!(order.combine(rows, w.clone()), x, w)
        });
    }

    #[test]
    fn rms_norm_agrees(rows in 1..150_usize, width in 1..40_usize, seed: u64) {
        agree("rms_norm", |device| {
            let x = numbers([rows, width], seed, device).require_grad();
            let w = numbers([width], seed ^ 1, device).require_grad();
            results!(ops::rms_norm(x.clone(), w.clone(), 1e-6), x, w)
        });
    }

    #[test]
    fn the_shifted_sum_agrees(batch in 1..4_usize, seq in 1..12_usize, half in 1..12_usize, seed: u64) {
        agree("add_previous", |device| {
            let x = numbers([batch, seq, 2 * half], seed, device).require_grad();
            results!(ops::add_previous(x.clone()), x)
        });
    }

    #[test]
    fn rotations_agree(batch in 1..4_usize, seq in 1..9_usize, heads in 1..4_usize, pairs in 1..6_usize, rest in 0..5_usize, shared: bool, seed: u64) {
        agree("rotate", |device| {
            let x = numbers([batch, seq, heads, 2 * pairs + rest], seed, device).require_grad();
            let angles = numbers([if shared { 1 } else { batch }, seq, 1, pairs], seed ^ 1, device).mul_scalar(3.0);
            results!(ops::rotate(x.clone(), angles.clone().cos(), angles.sin()), x)
        });
    }

    #[test]
    fn causal_attention_agrees(batch in 1..3_usize, heads in 1..4_usize, seq in prop_oneof![1..40_usize, 60..140_usize], width in 1..12_usize, seed: u64) {
        agree("causal_attention", |device| {
            let input = |i| numbers([batch, heads, seq, width], seed ^ i, device).mul_scalar(2.0).require_grad();
            let [q, k, v] = [input(0), input(1), input(2)];
            results!(ops::causal_attention(q.clone(), k.clone(), v.clone(), None), q, k, v)
        });
    }

    #[test]
    fn operations_of_the_tower_agree(rows in 1..140_usize, width in 1..40_usize, seed: u64) {
        agree("layer_norm", |device| {
            let x = numbers([rows, width], seed, device).mul_scalar(3.0).add_scalar(0.5).require_grad();
            let [weight, bias] = [1, 2].map(|i| numbers([width], seed ^ i, device).require_grad());
            results!(ops::layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-2), x, weight, bias)
        });
        agree("gelu", |device| {
            let x = numbers([rows, width], seed, device).mul_scalar(5.0).require_grad();
            results!(ops::gelu(x.clone()), x)
        });
        agree("add_bias", |device| {
            let x = numbers([rows, width], seed, device).require_grad();
            let bias = numbers([width], seed ^ 1, device).require_grad();
            results!(ops::add_bias(x.clone(), bias.clone()), x, bias)
        });
        agree("add_scaled", |device| {
            let [x, branch] = [0, 1].map(|i| numbers([rows, width], seed ^ i, device).require_grad());
            let scale = numbers([width], seed ^ 2, device).require_grad();
            results!(ops::add_scaled(x.clone(), branch.clone(), scale.clone()), x, branch, scale)
        });
    }

    #[test]
    fn full_attention_agrees(batch in 1..3_usize, heads in 1..4_usize, seq in prop_oneof![1..40_usize, 60..140_usize], width in 1..12_usize, seed: u64) {
        agree("full_attention", |device| {
            let qkv = numbers([batch, seq, 3 * heads * width], seed, device).mul_scalar(2.0);
            let qkv = qkv.require_grad();
            results!(ops::full_attention(qkv.clone(), heads), qkv)
        });
    }

    #[test]
    fn cached_attention_is_the_end_of_causal_attention(
        batch in 1..4_usize,
        heads in 1..4_usize,
        past in prop_oneof![Just(0), 1..40_usize, 60..140_usize],
        queries in prop_oneof![Just(1), 2..20_usize, 60..80_usize],
        room in 0..9_usize,
        width in 1..12_usize,
        padding in prop::collection::vec(0..30_usize, 3),
        seed: u64,
    ) {
        let length = past + queries;
        let first: Vec<usize> = padding[..batch].iter().map(|p| (*p).min(length - 1)).collect();
        let input = |i, device: &Device| numbers([batch, heads, length, width], seed ^ i, device).mul_scalar(2.0);
        agree("cached_attention", |device| {
            let device = &device.clone().inner();
            let [q, k, v] = [0, 1, 2].map(|i| input(i, device));
            // What is beyond the filled part must not be looked at.
            let cache = |x: Tensor<4>| Tensor::cat(vec![x, Tensor::full([batch, heads, room + 1, width], f32::NAN, device)], 2);
            let newest = q.clone().slice_dim(2, past..length);
            let output = ops::cached_attention(newest, cache(k.clone()), cache(v.clone()), length, &first);
            // Each row by itself, without its padding.
            for (row, &first) in first.iter().enumerate() {
                let of = |x: &Tensor<4>| x.clone().slice([row..row + 1, 0..heads, first..length, 0..width]);
                let alone = ops::causal_attention(of(&q), of(&k), of(&v), None);
                let from = first.max(past);
                let expected = values(&alone.slice_dim(2, from - first..length - first).into_data());
                let ours = output.clone().slice([row..row + 1, 0..heads, from - past..queries, 0..width]);
                let worst = largest_difference(&values(&ours.into_data()), &expected);
                assert!(worst <= tolerance(Kind::Operation, device, DType::F32), "row {row} differs by {worst:e}");
            }
            vec![values(&output.into_data())]
        });
    }

    #[test]
    fn cross_entropy_agrees(rows in 1..30_usize, classes in 1..60_usize, seed: u64) {
        agree("cross_entropy", |device| {
            let logits = numbers([rows, classes], seed, device).mul_scalar(9.0).require_grad();
            let labels: Vec<usize> = (0..rows).map(|i| (i * 7 + seed as usize % 11) % classes).collect();
            results!(ops::cross_entropy(logits.clone(), ints(&labels, device)), logits)
        });
    }

    #[test]
    fn linear_cross_entropy_is_cross_entropy_of_the_product(
        rows in 1..40_usize, width in 1..20_usize, classes in 2..50_usize, at_once in 1..50_usize,
        scaled in any::<bool>(), seed: u64,
    ) {
        let scale = if scaled { 0.5 } else { 1.0 };
        let labels: Vec<usize> = (0..rows).map(|i| (i * 7 + seed as usize % 11) % classes).collect();
        agree("linear_cross_entropy", |device| {
            let input = || [
                numbers([rows, width], seed, device).require_grad(),
                numbers([width, classes], seed ^ 1, device).mul_scalar(3.0).require_grad(),
            ];
            let [x, w] = input();
            let ours = results!(
                ops::linear_cross_entropy(x.clone(), w.clone(), ints(&labels, device), scale, at_once), x, w
            );
            // The same by a product and a loss of all its rows.
            let [x, w] = input();
            let logits = ops::dense(x.clone(), w.clone()).mul_scalar(scale);
            let whole: Results = results!(ops::cross_entropy(logits, ints(&labels, device)), x, w);
            for (ours, whole) in ours.iter().zip(&whole) {
                let largest = whole.iter().fold(1.0_f32, |max, x| max.max(x.abs()));
                let tolerance = tolerance(Kind::Operation, device, DType::F32);
                let worst = largest_difference(ours, whole) / largest;
                assert!(worst <= tolerance, "differs by {worst:e}");
            }
            ours
        });
    }

    #[test]
    fn an_adamw_update_agrees(size in 1..50_usize, step in 1..200_u64, decay in 0.0..0.5, seed: u64) {
        agree("adamw_update", |device| {
            let device = &device.clone().inner();
            let input = |i| numbers([size], seed ^ i, device);
            let step = ops::AdamWStep {
                learning_rate: 0.01, beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: decay, step, gradient_scale: 0.7,
            };
            let moments = [input(2), input(3).abs()];
            let (value, [first, second]) = ops::adamw_update(input(0), input(1), moments, step);
            [value, first, second].map(|x| values(&x.into_data())).to_vec()
        });
    }
}

#[test]
fn an_adamw_update_is_the_formula() {
    let step = ops::AdamWStep {
        learning_rate: 0.1,
        beta_1: 0.9,
        beta_2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 3,
        gradient_scale: 0.5,
    };
    let (p, g, m, v) = (2.0_f64, 4.0_f64 * 0.5, 0.3_f64, 0.2_f64);
    let (m, v) = (0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g);
    let (m_hat, v_hat) = (m / (1.0 - 0.9_f64.powi(3)), v / (1.0 - 0.95_f64.powi(3)));
    let expected = p - 0.1 * 0.1 * p - 0.1 * m_hat / (v_hat.sqrt() + 1e-8);
    for (name, device) in devices() {
        let one = |x: f32| Tensor::<1>::from_floats([x], &device);
        let (p, [m1, m2]) = ops::adamw_update(one(2.0), one(4.0), [one(0.3), one(0.2)], step);
        for (ours, expected) in [(p, expected), (m1, m), (m2, v)] {
            assert!((f64::from(ours.into_scalar::<f32>()) - expected).abs() < 1e-6, "{name}");
        }
    }
}

#[test]
fn the_sum_of_squares_does_not_depend_on_the_layout() {
    for (name, device) in devices() {
        let x = Tensor::<2>::random([300, 70], Distribution::Default, &device);
        let expected: f64 = values(&x.to_data()).iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        for x in [x.clone(), x.transpose()] {
            let ours = f64::from(ops::sum_of_squares(x).into_scalar::<f32>());
            assert!((ours / expected - 1.0).abs() < 1e-5, "{name}: {ours} is not {expected}");
        }
    }
}
