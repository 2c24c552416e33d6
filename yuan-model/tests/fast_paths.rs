//! Every fast version against the portable form of the same operation in f32 on the CPU, forward
//! and gradients, in every type that the device's fast versions know. Shapes are such that the fast
//! versions take them; `ops.rs` has the odd ones.

mod support;

use std::sync::Mutex;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use proptest::prelude::*;
use support::{Kind, devices, ints, largest_difference, tolerance, values};
use yuan_model::{device, ops};

/// Results of one operation: output and gradients, flat.
type Results = Vec<Vec<f32>>;

/// Where an operation runs, and in which type.
struct Place {
    device: Device,
    /// The type of its tensors.
    dtype: FloatDType,
    /// What their numbers are rounded to first, so that all places see the same.
    rounded: FloatDType,
}

/// The switch is the whole process's.
static SWITCH: Mutex<()> = Mutex::new(());

/// Runs `operation` with fast versions on every device, and without in f32 on the CPU.
fn agree(what: &str, operation: impl Fn(&Place) -> Results) {
    let _guard = SWITCH.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (name, on) in devices() {
        let narrow = name.starts_with("cuda").then_some(FloatDType::BF16);
        for dtype in [Some(FloatDType::F32), narrow].into_iter().flatten() {
            let fast = operation(&Place { device: on.clone().autodiff(), dtype, rounded: dtype });
            ops::set_fast_paths(false);
            let cpu = device("flex").unwrap().autodiff();
            let portable =
                operation(&Place { device: cpu, dtype: FloatDType::F32, rounded: dtype });
            ops::set_fast_paths(true);
            let tolerance = tolerance(Kind::Operation, &on, DType::from(dtype));
            for (i, (a, b)) in fast.iter().zip(&portable).enumerate() {
                let scale = b.iter().fold(1.0_f32, |max, x| max.max(x.abs()));
                let worst = largest_difference(a, b) / scale;
                assert!(
                    worst <= tolerance,
                    "{what} on {name} in {dtype:?}: result {i} differs by {worst:e}"
                );
            }
        }
    }
}

/// Numbers that look random but are the same everywhere, in the place's type.
fn numbers<const D: usize>(shape: [usize; D], seed: u64, place: &Place) -> Tensor<D> {
    support::numbers::<D>(shape, seed, &place.device).cast(place.rounded).cast(place.dtype)
}

/// The same times a factor, which is rounded once.
fn scaled<const D: usize>(shape: [usize; D], seed: u64, factor: f64, place: &Place) -> Tensor<D> {
    let numbers = support::numbers::<D>(shape, seed, &place.device).mul_scalar(factor);
    numbers.cast(place.rounded).cast(place.dtype)
}

/// The same, in f32 whatever the place.
fn full<const D: usize>(shape: [usize; D], seed: u64, place: &Place) -> Tensor<D> {
    support::numbers(shape, seed, &place.device)
}

/// Output, and the gradients of `Σ output ⊙ coefficients` for the inputs.
macro_rules! results {
    ($place:expr, $output:expr, $($input:expr),+) => {{
        let output = $output;
        let coefficients = numbers(output.dims(), 99, $place).cast(output.dtype());
        let grads = (output.clone() * coefficients).sum().backward();
        vec![values(&output.to_data()), $(values(&$input.grad(&grads).expect("a gradient").to_data())),+]
    }};
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn fast_products_are_the_portable_ones(
        rows in 1..300_usize,
        d_in in 1..90_usize,
        d_out in 1..90_usize,
        seed: u64,
    ) {
        agree("dense", |place| {
            let x = numbers([rows, d_in], seed, place).require_grad();
            let w = numbers([d_in, d_out], seed ^ 1, place).require_grad();
            results!(place, ops::dense(x.clone(), w.clone()), x, w)
        });
        // Stored the other way round.
        agree("dense, transposed", |place| {
            let x = numbers([d_in, rows], seed, place).require_grad();
            let w = numbers([d_out, d_in], seed ^ 1, place).require_grad();
            results!(place, ops::dense(x.clone().transpose(), w.clone().transpose()), x, w)
        });
    }

    #[test]
    fn fast_grouped_products_are_the_portable_ones(
        counts in prop::collection::vec(prop_oneof![Just(0_usize), 1..5_usize, 1..200_usize], 1..12),
        d_in in 1..8_usize,
        d_out in 1..8_usize,
        seed: u64,
    ) {
        let rows: usize = counts.iter().sum();
        prop_assume!(rows > 0);
        agree("grouped_matmul", |place| {
            let x = numbers([rows, 8 * d_in], seed, place).require_grad();
            let w = numbers([counts.len(), 8 * d_in, 8 * d_out], seed ^ 1, place).require_grad();
            results!(place, ops::grouped_matmul(x.clone(), w.clone(), &counts), x, w)
        });
    }

    #[test]
    fn fast_swiglu_shifted_sum_and_norm_are_the_portable_ones(
        batch in 1..4_usize,
        seq in 1..40_usize,
        eighths in 1..20_usize,
        seed: u64,
    ) {
        let (rows, half) = (batch * seq, 8 * eighths);
        agree("swiglu", |place| {
            let x = numbers([rows, 2 * half], seed, place).mul_scalar(6.0).require_grad();
            results!(place, ops::swiglu(x.clone()), x)
        });
        agree("add_previous", |place| {
            let x = numbers([batch, seq, 2 * half], seed, place).require_grad();
            results!(place, ops::add_previous(x.clone()), x)
        });
        agree("rms_norm", |place| {
            let x = numbers([rows, half], seed, place).require_grad();
            let w = full([half], seed ^ 1, place).require_grad();
            results!(place, ops::rms_norm(x.clone(), w.clone(), 1e-6), x, w)
        });
    }

    #[test]
    fn fast_rotations_of_a_part_of_every_head_are_the_portable_ones(
        batch in 1..4_usize,
        seq in 1..9_usize,
        heads in 1..4_usize,
        eighths in 1..5_usize,
        rest in 0..3_usize,
        shared: bool,
        seed: u64,
    ) {
        agree("rotate", |place| {
            // Queries and keys come side by side.
            let width = 8 * (2 * eighths + rest);
            let both = numbers([batch, seq, heads, 2 * width], seed, place).require_grad();
            let angles = full([if shared { 1 } else { batch }, seq, 1, 8 * eighths], seed ^ 1, place).mul_scalar(3.0);
            let (cos, sin) = (angles.clone().cos().cast(place.rounded).cast(place.dtype), angles.sin().cast(place.rounded).cast(place.dtype));
            let turned = ops::rotate(both.clone().slice_dim(3, width..2 * width), cos, sin);
            results!(place, turned.swap_dims(1, 2), both)
        });
    }

    #[test]
    fn fast_embeddings_are_the_portable_ones(
        vocab in prop_oneof![2..300_usize, 3000..3100_usize],
        rows in 1..900_usize,
        eighths in 1..9_usize,
        seed: u64,
    ) {
        let ids: Vec<usize> = (0..rows).map(|i| (i * i * 7 + seed as usize % 1000 * (i % 3)) % vocab).collect();
        agree("embed", |place| {
            let table = full([vocab, 8 * eighths], seed, place).require_grad();
            results!(place, ops::embed(table.clone(), ints(&ids, &place.device), place.dtype), table)
        });
    }

    #[test]
    fn fast_dispatch_and_combine_are_the_portable_ones(
        tokens in 1..900_usize,
        top_k in 1..5_usize,
        more in 0..60_usize,
        eighths in 1..9_usize,
        seed: u64,
    ) {
        let experts = top_k + more;
        let chosen: Vec<usize> = (0..tokens * top_k).map(|i| (i / top_k * (i / top_k) * 7 + i % top_k) % experts).collect();
        agree("dispatch", |place| {
            let list = ints(&chosen, &place.device).reshape([tokens, top_k]);
            let (row_of_pair, pair_of_row, counts) = ops::dispatch_order(list, experts);
            let x = numbers([tokens, 8 * eighths], seed, place).require_grad();
            let w = numbers([tokens, top_k], seed ^ 1, place).require_grad();
            let token_of_row = pair_of_row.clone().div_scalar(top_k as i64);
            let rows = ops::gather_rows(x.clone(), token_of_row, row_of_pair.clone(), top_k);
            let order = [&row_of_pair, &pair_of_row, &counts].map(|x| values(&x.to_data()));
            let combined = ops::combine_rows(rows, w.clone(), row_of_pair, pair_of_row);
            let mut all: Results = results!(place, combined, x, w);
            all.extend(order);
            all
        });
    }

    #[test]
    fn the_order_of_arrivals_sorts_them_by_expert_and_by_rank_within(
        counts in prop::collection::vec(prop::collection::vec(prop_oneof![Just(0), 0..40_usize], 6), 1..9),
        first in 0..6_usize,
        more in 1..6_usize,
    ) {
        let experts = first..(first + more).min(6);
        // Every row that arrives, by expert, then by rank, then as it comes.
        let mut rows = Vec::new();
        for (rank, counts) in counts.iter().enumerate() {
            for expert in experts.clone() {
                rows.extend((0..counts[expert]).map(|_| (expert, rank)));
            }
        }
        let mut sorted: Vec<usize> = (0..rows.len()).collect();
        sorted.sort_by_key(|&row| rows[row]);
        // One row stands for none.
        sorted.resize(sorted.len().max(1), 0);
        let arriving = sorted.len();
        agree("arrivals", |place| {
            let all = ints(&counts.concat(), &place.device);
            let (places, at_place) = ops::arrival_order(all, 6, experts.clone(), arriving);
            let [places, at_place] = [places, at_place].map(|x| values(&x.to_data()));
            let found: Vec<usize> = at_place.iter().map(|&row| row as usize).collect();
            assert_eq!(found, sorted);
            assert!((0..arriving).all(|row| found[places[row] as usize] == row));
            vec![places, at_place]
        });
    }

    #[test]
    fn fast_causal_attention_is_the_portable_one(
        batch in 1..3_usize, heads in 1..4_usize, seq in prop_oneof![1..40_usize, 60..140_usize, 500..600_usize],
        // The last two have kernels of their own on some cards.
        width in prop_oneof![(1..9_usize).prop_map(|eighths| 8 * eighths), Just(128), Just(256)],
        document in prop_oneof![Just(None), (1..200_usize).prop_map(Some)], seed: u64,
    ) {
        // Documents of one length after a shorter first one, which differs from row to row.
        let starts = |length: usize| -> Vec<usize> {
            (0..batch * seq).map(|i| (i % seq + i / seq * 7) / length * length).zip(0..batch * seq)
                .map(|(shifted, i)| shifted.saturating_sub(i / seq * 7)).collect()
        };
        agree("causal_attention", |place| {
            let input = |i| numbers([batch, seq, heads, width], seed ^ i, place).require_grad();
            let [q, k, v] = [input(0), input(1), input(2)];
            let first_keys = document.map(|length| ints(&starts(length), &place.device).reshape([batch, seq]));
            let [a, b, c] = [&q, &k, &v].map(|x| x.clone().swap_dims(1, 2));
            results!(place, ops::causal_attention(a, b, c, first_keys), q, k, v)
        });
    }

    #[test]
    fn fast_rotary_attention_is_the_portable_one(
        batch in 1..3_usize, heads in 1..4_usize, seq in prop_oneof![1..40_usize, 60..140_usize],
        width in prop_oneof![(2..9_usize).prop_map(|eighths| 16 * eighths), Just(128)], shared: bool, seed: u64,
    ) {
        agree("rotary_attention", |place| {
            let query_key = numbers([batch, seq, heads, 2 * width], seed, place).require_grad();
            let value = numbers([batch, seq, heads, width], seed ^ 1, place).require_grad();
            let angles = full([if shared { 1 } else { batch }, seq, 1, width / 2], seed ^ 2, place).mul_scalar(3.0);
            let [cos, sin] = [angles.clone().cos(), angles.sin()].map(|x| x.cast(place.rounded).cast(place.dtype));
            results!(place, ops::rotary_attention(query_key.clone(), value.clone(), cos, sin, None), query_key, value)
        });
    }

    #[test]
    fn fast_operations_of_the_tower_are_the_portable_ones(
        rows in prop_oneof![1..200_usize, Just(1500)],
        eighths in 1..40_usize,
        seed: u64,
    ) {
        let width = 8 * eighths;
        agree("layer_norm", |place| {
            let x = scaled([rows, width], seed, 3.0, place).require_grad();
            let [weight, bias] = [1, 2].map(|i| full([width], seed ^ i, place).require_grad());
            results!(place, ops::layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-2), x, weight, bias)
        });
        agree("gelu", |place| {
            let x = scaled([rows, width], seed, 5.0, place).require_grad();
            results!(place, ops::gelu(x.clone()), x)
        });
        agree("add_bias", |place| {
            let x = numbers([rows, width], seed, place).require_grad();
            let bias = numbers([width], seed ^ 1, place).require_grad();
            results!(place, ops::add_bias(x.clone(), bias.clone()), x, bias)
        });
        agree("add_scaled", |place| {
            let [x, branch] = [0, 1].map(|i| numbers([rows, width], seed ^ i, place).require_grad());
            let scale = numbers([width], seed ^ 2, place).require_grad();
            results!(place, ops::add_scaled(x.clone(), branch.clone(), scale.clone()), x, branch, scale)
        });
    }

    // Wide heads and narrow ones, rows that fill a block of queries or keys and that do not.
    #[test]
    fn fast_attention_without_a_mask_is_the_portable_one(
        batch in 1..3_usize, heads in 1..4_usize, seq in prop_oneof![1..40_usize, 60..140_usize, 250..300_usize],
        width in prop_oneof![(1..9_usize).prop_map(|eighths| 8 * eighths), Just(64), Just(128)], seed: u64,
    ) {
        agree("full_attention", |place| {
            let qkv = scaled([batch, seq, 3 * heads * width], seed, 2.0, place).require_grad();
            results!(place, ops::full_attention(qkv.clone(), heads), qkv)
        });
    }

    #[test]
    fn fast_cross_entropies_are_the_portable_ones(
        rows in 1..70_usize,
        width in 1..9_usize,
        classes in 2..900_usize,
        at_once in 1..80_usize,
        seed: u64,
    ) {
        let labels: Vec<usize> = (0..rows).map(|i| (i * 7 + seed as usize % 11) % classes).collect();
        agree("cross_entropy", |place| {
            let logits = full([rows, classes], seed, place).mul_scalar(9.0).require_grad();
            results!(place, ops::cross_entropy(logits.clone(), ints(&labels, &place.device)), logits)
        });
        agree("linear_cross_entropy", |place| {
            let x = numbers([rows, 8 * width], seed, place).require_grad();
            let w = numbers([8 * width, classes], seed ^ 1, place).require_grad();
            results!(place, ops::linear_cross_entropy(x.clone(), w.clone(), ints(&labels, &place.device), 0.5, at_once), x, w)
        });
    }

    #[test]
    fn a_fast_optimizer_makes_the_portable_updates(
        size in 1..5000_usize,
        step in 1..200_u64,
        decay in 0.0..0.5,
        seed: u64,
    ) {
        agree("adamw_update", |place| {
            let place = &Place { device: place.device.clone().inner(), ..*place };
            let input = |i| full([size], seed ^ i, place);
            let step = ops::AdamWStep {
                learning_rate: 0.01, beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: decay, step, gradient_scale: 0.7,
            };
            let squares = values(&ops::sum_of_squares(input(0)).into_data());
            let (value, [first, second]) = ops::adamw_update(input(0), input(1), [input(2), input(3).abs()], step);
            let mut all: Results = [value, first, second].map(|x| values(&x.into_data())).to_vec();
            all.push(squares);
            all
        });
    }
}
