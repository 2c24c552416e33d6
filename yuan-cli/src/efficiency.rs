//! `yuan efficiency`: what pruning and rearranging should do to the speed of training, calculated
//! for Yuan3.0 Ultra, or as a run predicted it beside what it measured.

use std::path::PathBuf;

use clap::Args;
use yuan::{
    laep::{
        ExpertLayout, LayerLoad, LayerPlan, PruneLimits, PrunePlan,
        efficiency::{Cluster, DeviceSpeed, PlacedLayer},
    },
    model::YuanConfig,
    train::model_shape,
};

use crate::{
    console::Console,
    numbers::{at_least_one, positive, ratio},
};

mod compare;
mod memory;

/// Options of `yuan efficiency`.
#[derive(Args)]
pub struct Options {
    /// Show what this run predicted of its speed beside what it measured, instead of a calculation
    /// for Yuan3.0 Ultra
    #[arg(long, value_name = "RUN")]
    run: Option<PathBuf>,
    /// Matrix products that a device sustains, in TFLOP/s
    #[arg(long, value_parser = positive, value_name = "TFLOP_PER_S", default_value_t = 400.0)]
    #[arg(help_heading = "Devices")]
    tflops: f64,
    /// Memory bandwidth of a device, in GB/s
    #[arg(long, value_parser = positive, value_name = "GB_PER_S", default_value_t = 2500.0)]
    #[arg(help_heading = "Devices")]
    memory: f64,
    /// Bandwidth of a device's link, in GB/s
    #[arg(long, value_parser = positive, value_name = "GB_PER_S", default_value_t = 40.0)]
    #[arg(help_heading = "Devices")]
    link: f64,
    /// Tokens of a device in a micro-batch
    #[arg(long, value_parser = positive, value_name = "TOKENS", default_value_t = 4096.0)]
    #[arg(help_heading = "Optimisation")]
    tokens: f64,
    /// Micro-batches of an optimizer step
    #[arg(long, value_parser = positive, value_name = "MICRO_BATCHES", default_value_t = 16.0)]
    #[arg(help_heading = "Optimisation")]
    micro_batches: f64,
    /// Copies of every expert over which gradients are reduced
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "COPIES", default_value_t = 4)]
    #[arg(help_heading = "Devices")]
    copies: usize,
    /// Device groups of a layer, over which its experts are spread
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "GROUPS", default_value_t = 8)]
    #[arg(help_heading = "Devices")]
    groups: usize,
    /// Memory of a device, in GB
    #[arg(long, value_parser = positive, value_name = "GB", default_value_t = 80.0)]
    #[arg(help_heading = "Devices")]
    capacity: f64,
    /// Parts of neighbouring layers, one after the other (pipeline); default: the fewest with which
    /// the model fits
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "STAGES")]
    #[arg(help_heading = "Devices")]
    stages: Option<usize>,
    /// Say what a rank would hold of this model, a config.json, instead of Ultra
    #[arg(long, value_name = "FILE", conflicts_with = "run")]
    model: Option<PathBuf>,
    /// Load of the busiest expert over that of the idlest
    #[arg(long, value_parser = ratio, value_name = "RATIO", default_value_t = 500.0)]
    #[arg(help_heading = "LAEP")]
    spread: f64,
    /// Tokens of a sequence
    #[arg(long, value_parser = at_least_one::<usize>, value_name = "TOKENS")]
    #[arg(default_value_t = 4096, help_heading = "Optimisation")]
    seq: usize,
    /// Passes over the products: 3, or 4 with recomputation
    #[arg(long, value_parser = positive, value_name = "PASSES", default_value_t = 4.0)]
    #[arg(help_heading = "Optimisation")]
    passes: f64,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    match (&options.run, &options.model) {
        (Some(run), _) => compare::compare(run, console),
        (None, Some(model)) => {
            let model = YuanConfig::load(model)?;
            memory::show(options, &[("the model", model)], console)
        }
        (None, None) => {
            calculate(options, console)?;
            let (before, after) = (YuanConfig::ultra_unpruned(), YuanConfig::ultra());
            memory::show(options, &[("before", before), ("pruned", after)], console)
        }
    }
}

impl Options {
    fn cluster(&self) -> Cluster {
        Cluster {
            device: DeviceSpeed {
                flops: self.tflops * 1e12,
                memory_bandwidth: self.memory * 1e9,
                link_bandwidth: self.link * 1e9,
            },
            tokens_per_device: self.tokens,
            micro_batches: self.micro_batches,
            data_parallel: self.copies as f64,
            passes: self.passes,
            weight_bytes: 2.0,
            optimizer_bytes: 28.0,
        }
    }
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
    let layout = ExpertLayout { top_k: 2, groups };
    let plan = PrunePlan::new(std::slice::from_ref(load), &limits, layout)?.layers.remove(0);
    anyhow::ensure!(
        plan.kept.len() == kept,
        "--groups {groups} does not divide the released count of {kept} experts"
    );
    Ok(plan)
}

fn calculate(options: &Options, console: &Console) -> anyhow::Result<()> {
    let (before, after) = (YuanConfig::ultra_unpruned(), YuanConfig::ultra());
    let layers = loads(64, before.num_layers(), options.spread);
    let keeping = |kept: &[usize]| -> anyhow::Result<Vec<LayerPlan>> {
        layers
            .iter()
            .zip(kept)
            .map(|(load, &kept)| plan_keeping(load, kept, options.groups))
            .collect()
    };
    let plans = keeping(&after.experts_per_layer)?;
    let rearranged_only = keeping(&before.experts_per_layer)?;
    let cluster = options.cluster();
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
    let shape = model_shape(&before, options.seq, 2.0);
    console.say(format_args!(
        "Yuan3.0 Ultra, 103 layers of 64 experts, loads {}x apart in equal ratios, pruned to the released counts\n\
         {} device groups of {} TFLOP/s, {} GB/s memory, {} GB/s link; {} tokens a device and micro-batch,\n\
         {} micro-batches a step, {} copies, {} passes; nothing overlaps\n",
        options.spread,
        options.groups,
        options.tflops,
        options.memory,
        options.link,
        options.tokens,
        options.micro_batches,
        options.copies,
        options.passes
    ))?;
    console.say(format_args!(
        "{:<24}  {:>8}  {:>7}  {:>7}  {:>8}  {:>9}  {:>9}  {:>6}",
        "", "TFLOPS", "gain", "dense", "experts", "exchange", "optimizer", "paper"
    ))?;
    let base = cluster.step(&shape, &cases[0].1).flops_per_second();
    for (name, layers, paper) in &cases {
        let step = cluster.step(&shape, layers);
        let share = |seconds: f64| format!("{:.1} %", 100.0 * seconds / step.seconds());
        console.say(format_args!(
            "{name:<24}  {:>8.2}  {:>6.1}%  {:>7}  {:>8}  {:>9}  {:>9}  {:>6}",
            step.flops_per_second() / 1e12,
            100.0 * (step.flops_per_second() / base - 1.0),
            share(step.dense),
            share(step.experts),
            share(step.exchange),
            share(step.optimizer + step.reduction),
            paper.map_or_else(String::new, |tflops: f64| format!("{tflops:.2}"))
        ))?;
    }
    console.say(format_args!(
        "\nThe paper: 62.14 to 92.60 TFLOPS, +49.0 %; its first version splits 48.3 % into 32.4 % from pruning and\n\
         15.9 % from rearranging. docs/laep.md says what this calculation leaves out."
    ))?;
    Ok(())
}
