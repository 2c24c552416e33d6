//! A dry run of LAEP: what would be pruned, and where the rest would sit, from loads alone.
//!
//!     cargo run --release -p yuan-laep --example plan -- runs/pretrain/loads.json 0.1
//!
//! The first argument is a file with `{"layers": [[tokens of expert 0, …], …]}`, the second β. The
//! program `yuan plan` has every other limit as an option.

use std::{env, error::Error, fs};

use yuan_laep::{ExpertLayout, LoadFile, LoadStatistics, PruneLimits, PrunePlan, WhatIf};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let Some(file) = arguments.next() else {
        return Err("name a file of loads, for instance loads.json of a run".into());
    };
    let beta: f64 = arguments.next().as_deref().unwrap_or("0.1").parse()?;

    // What was measured: the tokens that each expert of each layer received.
    let text = fs::read_to_string(&file).map_err(|error| format!("cannot read {file}: {error}"))?;
    let loads = LoadFile::from_json(&text)?;
    for (layer, load) in loads.window.layers.iter().enumerate() {
        let statistics = LoadStatistics::of(load);
        println!(
            "layer {layer}: busiest expert {:.2} x mean, gini {:.2}, {} dead",
            statistics.max_over_mean, statistics.gini, statistics.dead_experts
        );
    }

    // Who goes, and where the rest sit.
    let limits = PruneLimits { beta: beta.into(), multiple_of: 2, ..PruneLimits::default() };
    let top_k = loads.model.map_or(2, |model| model.top_k);
    let layout = ExpertLayout { top_k, groups: 2 };
    let plan = PrunePlan::new(&loads.window.layers, &limits, layout)?;
    println!("\n{plan}\n");

    // What other limits would do to the same loads.
    let (alphas, betas) = ([0.4, f64::INFINITY], [0.5 * beta, beta, 2.0 * beta]);
    let rows = WhatIf::sweep(&loads.window.layers, &limits, layout, loads.model, &alphas, &betas)?;
    print!("{}", WhatIf::table(&rows));
    Ok(())
}
