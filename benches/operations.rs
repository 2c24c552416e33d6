//! The operations of a step, one by one, in the shapes of one configuration: milliseconds, one line
//! of JSON each.
//!
//!     cargo bench --bench operations                                  # `flex`, shapes of the toy
//!     cargo bench --bench operations --features cuda -- --device cuda --precision bf16 --large
//!
//! `scripts/torch_operations.py` times the same in PyTorch, and `scripts/compare_operations.py`
//! puts them side by side.

use std::time::Instant;

use anyhow::anyhow;
use burn::tensor::{Device, Distribution, Int, Tensor};
use clap::Parser;
use serde_json::json;
use yuan::{model::ops, train::Precision};

/// Time the operations of a training step.
#[derive(Parser)]
struct Arguments {
    /// Where to compute
    #[arg(long, default_value = "flex")]
    device: String,
    /// f32 or bf16
    #[arg(long, default_value = "f32")]
    precision: String,
    /// The shapes of `gpu-2b.json` and 8 × 2048 tokens instead of the toy's
    #[arg(long)]
    large: bool,
    /// No fast versions: every operation as Burn computes it
    #[arg(long)]
    portable: bool,
    /// Only operations whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// Sizes of one layer and its batch.
struct Shapes {
    batch: usize,
    seq: usize,
    hidden: usize,
    heads: usize,
    head_dim: usize,
    ffn: usize,
    experts: usize,
    vocab: usize,
}

fn main() -> anyhow::Result<()> {
    run(&Arguments::parse())
}

struct Bench<'a> {
    arguments: &'a Arguments,
    device: Device,
}

impl Bench<'_> {
    /// Median time of `work`, the device idle before and after.
    fn time<T>(&self, name: &str, mut work: impl FnMut() -> T) -> anyhow::Result<()> {
        if !name.contains(&self.arguments.only) {
            return Ok(());
        }
        for _ in 0..3 {
            drop(work());
        }
        self.device.sync()?;
        let mut times = Vec::new();
        let begun = Instant::now();
        while times.len() < 5 || (times.len() < 20 && begun.elapsed().as_secs_f64() < 2.0) {
            let started = Instant::now();
            // Several at a time: a launch must not be what is measured.
            const REPEAT: u32 = 4;
            for _ in 0..REPEAT {
                drop(work());
            }
            self.device.sync()?;
            times.push(started.elapsed().as_secs_f64() / f64::from(REPEAT));
        }
        times.sort_by(f64::total_cmp);
        println!("{}", json!({ "operation": name, "ms": times[times.len() / 2] * 1e3 }));
        Ok(())
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ops::set_fast_paths(!arguments.portable);
    let precision: Precision =
        arguments.precision.parse().map_err(|what| anyhow!("--precision is {what}"))?;
    let dtype = precision.dtype();
    let plain = yuan::device(&arguments.device)?;
    let device = plain.clone().autodiff();
    let s = match arguments.large {
        true => Shapes {
            batch: 8,
            seq: 2048,
            hidden: 1024,
            heads: 8,
            head_dim: 256,
            ffn: 2048,
            experts: 32,
            vocab: 32768,
        },
        false => Shapes {
            batch: 8,
            seq: 256,
            hidden: 256,
            heads: 4,
            head_dim: 128,
            ffn: 512,
            experts: 16,
            vocab: 4096,
        },
    };
    let bench = Bench { arguments, device: plain.clone() };
    let (tokens, top_k) = (s.batch * s.seq, 2);
    let random = |shape: Vec<usize>, device: &Device| -> Tensor<2> {
        let (rows, width) =
            (shape[..shape.len() - 1].iter().product::<usize>(), shape[shape.len() - 1]);
        Tensor::<2>::random([rows, width], Distribution::Normal(0.0, 1.0), device).cast(dtype)
    };
    let two = |rows: usize, width: usize| random(vec![rows, width], &plain);
    let leaf = |rows: usize, width: usize| random(vec![rows, width], &device).require_grad();

    let (x, w) = (two(tokens, s.hidden), two(s.hidden, 4 * s.hidden));
    bench.time("linear", || ops::dense(x.clone(), w.clone()))?;
    let (x, w) = (leaf(tokens, s.hidden), leaf(s.hidden, 4 * s.hidden));
    bench.time("linear, forward and backward", || {
        ops::dense(x.clone(), w.clone()).sum().backward()
    })?;

    let pairs = tokens * top_k;
    let even = vec![pairs / s.experts; s.experts];
    let uneven = skewed(pairs, s.experts);
    let stack =
        |d_in: usize, d_out: usize| two(s.experts * d_in, d_out).reshape([s.experts, d_in, d_out]);
    let (rows, up, down) =
        (two(pairs, s.hidden), stack(s.hidden, 2 * s.ffn), stack(s.ffn, s.hidden));
    for (name, counts) in [("equal loads", &even), ("unequal loads", &uneven)] {
        bench.time(&format!("experts, {name}"), || {
            let hidden = ops::swiglu(ops::grouped_matmul(rows.clone(), up.clone(), counts));
            ops::grouped_matmul(hidden, down.clone(), counts)
        })?;
        let [rows, up, down] = [rows.clone().unsqueeze::<3>(), up.clone(), down.clone()]
            .map(|x| Tensor::<3>::from_inner(x).require_grad());
        bench.time(&format!("experts, {name}, forward and backward"), || {
            let rows = rows.clone().squeeze_dim::<2>(0);
            let hidden = ops::swiglu(ops::grouped_matmul(rows, up.clone(), counts));
            ops::grouped_matmul(hidden, down.clone(), counts).sum().backward()
        })?;
    }

    let heads = |device: &Device| {
        let width = s.heads * s.head_dim;
        random(vec![tokens, width], device).reshape([s.batch, s.seq, s.heads, s.head_dim])
    };
    let [q, k, v] = [(); 3].map(|()| heads(&plain).swap_dims(1, 2));
    bench.time("attention", || ops::causal_attention(q.clone(), k.clone(), v.clone(), None))?;
    let [q, k, v] = [(); 3].map(|()| heads(&device).require_grad());
    bench.time("attention, forward and backward", || {
        let [q, k, v] = [&q, &k, &v].map(|x| x.clone().swap_dims(1, 2));
        ops::causal_attention(q, k, v, None).sum().backward()
    })?;

    let angles = Tensor::<4>::random([1, s.seq, 1, s.head_dim / 2], Distribution::Default, &plain);
    let (cos, sin) = (angles.clone().cos().cast(dtype), angles.sin().cast(dtype));
    let x = heads(&plain);
    bench.time("rotary", || ops::rotate(x.clone(), cos.clone(), sin.clone()))?;

    let (x, w) = (two(tokens, s.hidden), Tensor::<1>::ones([s.hidden], &plain));
    bench.time("rms_norm", || ops::rms_norm(x.clone(), w.clone(), 1e-6))?;
    let (x, w) = (leaf(tokens, s.hidden), Tensor::<1>::ones([s.hidden], &device).require_grad());
    bench.time("rms_norm, forward and backward", || {
        ops::rms_norm(x.clone(), w.clone(), 1e-6).sum().backward()
    })?;
    let x = two(pairs, 2 * s.ffn);
    bench.time("swiglu", || ops::swiglu(x.clone()))?;

    let experts = Tensor::<1, Int>::from_data(
        (0..pairs as i64).map(|i| i * 7919 % s.experts as i64).collect::<Vec<_>>().as_slice(),
        &plain,
    )
    .reshape([tokens, top_k]);
    bench.time("dispatch order", || ops::dispatch_order(experts.clone(), s.experts))?;
    let (row_of_pair, pair_of_row, _) = ops::dispatch_order(experts.clone(), s.experts);
    let token_of_row = pair_of_row.clone().div_scalar(top_k as i64);
    let (x, weights) = (two(tokens, s.hidden), two(tokens, top_k));
    bench.time("dispatch and combine", || {
        let rows = ops::gather_rows(x.clone(), token_of_row.clone(), row_of_pair.clone(), top_k);
        ops::combine_rows(rows, weights.clone(), row_of_pair.clone(), pair_of_row.clone())
    })?;

    let labels: Vec<i64> = (0..tokens as i64).map(|i| i * 7919 % s.vocab as i64).collect();
    let labels = Tensor::<1, Int>::from_data(labels.as_slice(), &plain);
    let (x, w) = (leaf(tokens, s.hidden), leaf(s.hidden, s.vocab));
    bench.time("head and cross-entropy, forward and backward", || {
        ops::linear_cross_entropy(x.clone(), w.clone(), labels.clone(), 1.0, 2048).mean().backward()
    })?;

    let size = s.experts * s.hidden * 2 * s.ffn;
    let numbers = || Tensor::<1>::random([size], Distribution::Default, &plain);
    let step = ops::AdamWStep {
        learning_rate: 3e-4,
        beta_1: 0.9,
        beta_2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 10,
        gradient_scale: 1.0,
    };
    let gradient = numbers();
    let mut state = Some((numbers(), [numbers(), numbers()]));
    bench.time("adamw, one layer's gate and up", || {
        let (param, moments) = state.take().expect("put back below");
        state = Some(ops::adamw_update(param, gradient.clone(), moments, step));
    })?;
    bench.time("sum of squares, the same", || ops::sum_of_squares(gradient.clone()))
}

/// Row counts that fall by the same factor from the first expert to the last, a hundredfold in all.
fn skewed(rows: usize, experts: usize) -> Vec<usize> {
    let weight = |e: usize| 100_f64.powf(-(e as f64) / (experts - 1) as f64);
    let total: f64 = (0..experts).map(weight).sum();
    let mut counts: Vec<usize> =
        (0..experts).map(|e| (rows as f64 * weight(e) / total) as usize).collect();
    counts[0] += rows - counts.iter().sum::<usize>();
    counts
}
