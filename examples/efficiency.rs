//! What pruning and rearranging should do to the speed of training, calculated.
//!
//!     cargo run --release --example efficiency
//!
//! With a run of `pretrain`: its prediction beside what it measured.
//!
//!     cargo run --release --example efficiency -- --run runs/pretrain

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use yuan::{
    laep::{
        LayerLoad, LayerPlan, PruneLimits, PrunePlan,
        efficiency::{Cluster, DeviceSpeed, PlacedLayer},
    },
    model::YuanConfig,
    train::{callback::Event, efficiency::model_shape, report::History},
};

/// Throughput of Yuan3.0 Ultra before and after its prune from a calculation, beside the paper's.
#[derive(Parser)]
struct Arguments {
    /// Instead: the prediction of a run of `pretrain` beside its measured steps
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Matrix products that a device sustains, in TFLOP/s
    #[arg(long, default_value_t = 400.0)]
    tflops: f64,
    /// Memory bandwidth of a device, in GB/s
    #[arg(long, default_value_t = 2500.0)]
    memory: f64,
    /// Bandwidth of a device's link, in GB/s
    #[arg(long, default_value_t = 40.0)]
    link: f64,
    /// Tokens of a device in a micro-batch
    #[arg(long, default_value_t = 4096.0)]
    tokens: f64,
    /// Micro-batches of an optimizer step
    #[arg(long, default_value_t = 16.0)]
    micro_batches: f64,
    /// Copies of every expert over which gradients are reduced
    #[arg(long, default_value_t = 4.0)]
    copies: f64,
    /// Device groups of a layer
    #[arg(long, default_value_t = 8)]
    groups: usize,
    /// Load of the busiest expert over that of the idlest
    #[arg(long, default_value_t = 500.0)]
    spread: f64,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 4096)]
    seq: usize,
    /// Passes over the products: 3, or 4 with recomputation
    #[arg(long, default_value_t = 4.0)]
    passes: f64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    yuan::exit(match &arguments.run {
        Some(run) => compare(run),
        None => calculate(&arguments),
    })
}

/// Loads from busiest to idlest in equal ratios, in an order of their own for every layer.
fn loads(experts: usize, layers: usize, spread: f64) -> Vec<LayerLoad> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let load = |rank: usize| (1e7 * spread.powf(-(rank as f64) / (experts - 1) as f64)) as u64;
    let layer = |_| {
        let mut tokens: Vec<u64> = (0..experts).map(load).collect();
        (1..experts).rev().for_each(|i| tokens.swap(i, next(i + 1)));
        LayerLoad::new(tokens)
    };
    (0..layers).map(layer).collect()
}

/// A plan that keeps so many experts, whatever load that leaves out: beta would allow all to go.
fn plan_keeping(load: &LayerLoad, kept: usize, groups: usize) -> anyhow::Result<LayerPlan> {
    let limits = PruneLimits {
        beta: 1.0.into(),
        multiple_of: groups,
        min_experts: kept,
        ..PruneLimits::default()
    };
    let plan = PrunePlan::new(std::slice::from_ref(load), &limits, groups)?.layers.remove(0);
    anyhow::ensure!(
        plan.kept.len() == kept,
        "--groups {groups} does not divide the released count of {kept} experts"
    );
    Ok(plan)
}

fn calculate(arguments: &Arguments) -> anyhow::Result<()> {
    let (before, after) = (YuanConfig::ultra_unpruned(), YuanConfig::ultra());
    let layers = loads(64, before.num_hidden_layers(), arguments.spread);
    let keeping = |kept: &[usize]| -> anyhow::Result<Vec<LayerPlan>> {
        layers
            .iter()
            .zip(kept)
            .map(|(load, &kept)| plan_keeping(load, kept, arguments.groups))
            .collect()
    };
    let plans = keeping(&after.experts_per_layer)?;
    let rearranged_only = keeping(&before.experts_per_layer)?;
    let cluster = Cluster {
        device: DeviceSpeed {
            flops: arguments.tflops * 1e12,
            memory_bandwidth: arguments.memory * 1e9,
            link_bandwidth: arguments.link * 1e9,
        },
        tokens_per_device: arguments.tokens,
        micro_batches: arguments.micro_batches,
        data_parallel: arguments.copies,
        passes: arguments.passes,
        weight_bytes: 2.0,
        optimizer_bytes: 28.0,
    };
    let place = |plans: &[LayerPlan], how: fn(&LayerPlan) -> PlacedLayer| {
        plans.iter().map(how).collect::<Vec<_>>()
    };
    let rearranged = place(&plans, PlacedLayer::rearranged);
    let cases = [
        ("base", place(&plans, PlacedLayer::before), Some(62.14)),
        ("rearranged only", place(&rearranged_only, PlacedLayer::rearranged), None),
        ("pruned only", place(&plans, PlacedLayer::pruned), None),
        ("pruned and rearranged", rearranged.clone(), Some(92.60)),
        ("pruned, perfect balance", rearranged.iter().map(PlacedLayer::balanced).collect(), None),
    ];
    let shape = model_shape(&before, arguments.seq, 2.0);
    let mut out = std::io::stdout();
    writeln!(
        out,
        "Yuan3.0 Ultra, 103 layers of 64 experts, loads {}x apart in equal ratios, pruned to the released counts\n\
         {} device groups of {} TFLOP/s, {} GB/s memory, {} GB/s link; {} tokens a device and micro-batch,\n\
         {} micro-batches a step, {} copies, {} passes; nothing overlaps\n",
        arguments.spread,
        arguments.groups,
        arguments.tflops,
        arguments.memory,
        arguments.link,
        arguments.tokens,
        arguments.micro_batches,
        arguments.copies,
        arguments.passes
    )?;
    writeln!(
        out,
        "{:<24}  {:>8}  {:>7}  {:>7}  {:>8}  {:>9}  {:>9}  {:>6}",
        "", "TFLOPS", "gain", "dense", "experts", "exchange", "optimizer", "paper"
    )?;
    let base = cluster.step(&shape, &cases[0].1).flops_per_second();
    for (name, layers, paper) in &cases {
        let step = cluster.step(&shape, layers);
        let share = |seconds: f64| format!("{:.1} %", 100.0 * seconds / step.seconds());
        writeln!(
            out,
            "{name:<24}  {:>8.2}  {:>6.1}%  {:>7}  {:>8}  {:>9}  {:>9}  {:>6}",
            step.flops_per_second() / 1e12,
            100.0 * (step.flops_per_second() / base - 1.0),
            share(step.dense),
            share(step.experts),
            share(step.exchange),
            share(step.optimizer + step.reduction),
            paper.map_or_else(String::new, |tflops: f64| format!("{tflops:.2}"))
        )?;
    }
    writeln!(
        out,
        "\nThe paper: 62.14 to 92.60 TFLOPS, +49.0 %; its first version splits 48.3 % into 32.4 % from pruning and\n\
         15.9 % from rearranging. docs/laep.md says what this calculation leaves out."
    )?;
    Ok(())
}

/// The prediction of a run beside what it measured.
fn compare(run: &std::path::Path) -> anyhow::Result<()> {
    let history = History::read(run)?;
    let phases = history.phases();
    let prunes = history.lasting().filter_map(|(_, event)| match event {
        Event::Prune { step, predicted_gain, .. } => Some((*step, *predicted_gain)),
        _ => None,
    });
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{:>5}  {:>14}  {:>13}  {:>9}  {:>9}",
        "prune", "tokens/s before", "after", "measured", "predicted"
    )?;
    let mut any = false;
    for ((step, predicted), pair) in prunes.zip(phases.windows(2)) {
        let (Some(before), Some(after)) = (pair[0].tokens_per_second, pair[1].tokens_per_second)
        else {
            continue;
        };
        let predicted = predicted.context("the run was made without a device description")?;
        writeln!(
            out,
            "{step:>5}  {before:>15.0}  {after:>13.0}  {:>8.1}%  {:>8.1}%",
            100.0 * (after / before - 1.0),
            100.0 * (predicted - 1.0)
        )?;
        any = true;
    }
    anyhow::ensure!(any, "{} holds no run with a prune and steps after it", run.display());
    Ok(())
}
