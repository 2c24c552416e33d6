//! What every rank of a cluster would hold of a model, and what a step would take.

use yuan::{
    laep::{
        LayerLoad,
        efficiency::{MemoryShape, PlacedLayer, RankMemory, RankWork, Spread},
    },
    model::YuanConfig,
    train::{memory_shape, model_shape},
};

use super::Options;
use crate::console::Console;

/// Rows of the table: a model, with and without recomputation.
pub fn show(
    options: &Options,
    models: &[(&str, YuanConfig)],
    console: &Console,
) -> anyhow::Result<()> {
    let (copies, groups, tokens) = (options.copies, options.groups, options.tokens);
    console.say(format_args!(
        "\nWhat the fullest rank holds, in GB: stages of {copies} rows of {groups} ranks; parameters, gradients and\n\
         moments in f32, moments cut over the ranks (ZeRO-1), activations of {tokens} tokens in bf16\n"
    ))?;
    console.say(format_args!(
        "{:<10} {:>8} {:<10} {:>6} {:>6}  {:>6} {:>7} {:>9} {:>11} {:>6}  {:>8} {:>9}",
        "",
        "params",
        "layers",
        "stages",
        "GPUs",
        "params",
        "moments",
        "gradients",
        "activations",
        "peak",
        "s a step",
        "tokens/s"
    ))?;
    for (name, model) in models {
        let shape = memory_shape(model);
        for recompute in [false, true] {
            let work = RankWork { tokens, busiest: 1.0, recompute };
            let found = match options.stages {
                Some(stages) => Some(spread(options, stages)),
                None => fewest_stages(options, &shape, work),
            };
            let how = if recompute { "recomputed" } else { "kept" };
            let billions = format!("{:.1} B", shape.parameters() / 1e9);
            let Some(spread) = found else {
                console.say(format_args!(
                    "{name:<10} {billions:>8} {how:<10} no number of stages fits {} GB",
                    options.capacity
                ))?;
                continue;
            };
            let memory = shape.fullest_rank(spread, work);
            let seconds = seconds(options, model, spread, recompute);
            let step = tokens * options.micro_batches * (copies * groups) as f64;
            let gb = |bytes: f64| format!("{:.1}", bytes / 1e9);
            let RankMemory { parameters, moments, gradients, activations, .. } = memory;
            console.say(format_args!(
                "{name:<10} {billions:>8} {how:<10} {:>6} {:>6}  {:>6} {:>7} {:>9} {:>11} {:>6}  {seconds:>8.1} {:>9.0}{}",
                spread.stages,
                spread.ranks(),
                gb(parameters),
                gb(moments),
                gb(gradients),
                gb(activations),
                gb(memory.peak()),
                step / seconds,
                if memory.peak() > capacity(options) { "  does not fit" } else { "" }
            ))?;
        }
    }
    console.say(format_args!(
        "\n{} of {} GB a GPU are left to the runtime; loads are equal, and stages wait for the first and the last\n\
         micro-batch. docs/distributed.md says what this was compared with.",
        format_args!("{:.0} %", 100.0 * RUNTIME),
        options.capacity
    ))?;
    Ok(())
}

/// Share of a GPU's memory that is not planned with: libraries, buffers of collectives, gaps.
const RUNTIME: f64 = 0.1;

fn capacity(options: &Options) -> f64 {
    options.capacity * 1e9 * (1.0 - RUNTIME)
}

fn spread(options: &Options, stages: usize) -> Spread {
    Spread { stages, data: options.copies, expert: options.groups }
}

fn fewest_stages(options: &Options, shape: &MemoryShape, work: RankWork) -> Option<Spread> {
    let spreads = (1..=shape.experts_per_layer.len()).map(|stages| spread(options, stages));
    let mut fitting =
        spreads.filter(|&spread| shape.fullest_rank(spread, work).peak() <= capacity(options));
    fitting.next()
}

/// Seconds of a step under equal loads.
fn seconds(options: &Options, model: &YuanConfig, spread: Spread, recompute: bool) -> f64 {
    let mut cluster = options.cluster();
    cluster.passes = if recompute { 4.0 } else { 3.0 };
    let layer = |&experts: &usize| {
        let all: Vec<usize> = (0..experts).collect();
        let groups = all.chunks(experts.div_ceil(spread.expert)).map(<[usize]>::to_vec).collect();
        PlacedLayer { load: LayerLoad::new(vec![1; experts]), groups }
    };
    let layers: Vec<PlacedLayer> = model.experts_per_layer.iter().map(layer).collect();
    let step = cluster.step(&model_shape(model, options.seq, 2.0), &layers);
    cluster.seconds_in_stages(&step, spread.stages)
}
