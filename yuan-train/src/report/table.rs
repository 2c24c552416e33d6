//! The closing table of a run: before and after the prune.

use yuan_laep::LayerLoad;

use super::{History, Phase};

/// Parameters, experts, speed, validation loss and imbalance, a column before the prune and one after.
pub fn summary_table(history: &History) -> String {
    let phases = history.phases();
    let title = match (phases.len(), history.pruned_at()) {
        (1, _) => vec!["whole run".to_owned()],
        (_, Some(step)) => vec![format!("before (to step {step})"), "after".to_owned()],
        _ => return String::from("nothing was recorded\n"),
    };
    let mut rows = vec![row("", title)];
    let mut add = |name: &str, cell: &dyn Fn(&Phase) -> String| {
        rows.push(row(name, phases.iter().map(cell).collect()));
    };
    add("parameters", &|phase| format!("{:.2} M", phase.parameters as f64 / 1e6));
    add("experts per layer", &|phase| {
        phase.experts_per_layer.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")
    });
    add("tokens per second", &|phase| {
        phase.tokens_per_second.map_or("-".into(), |speed| format!("{speed:.0}"))
    });
    add("validation loss", &|phase| {
        phase.validation.map_or("-".into(), |(step, loss)| format!("{loss:.4} (step {step})"))
    });
    add("busiest expert / mean", &|phase| match &phase.loads {
        Some(loads) => {
            loads.iter().map(|load| format!("{:.2}", load.max_over_mean())).collect::<Vec<_>>().join(" ")
        }
        None => "-".into(),
    });
    add("least loaded expert / mean", &|phase| match &phase.loads {
        Some(loads) => {
            loads.iter().map(|load| format!("{:.2}", min_over_mean(load))).collect::<Vec<_>>().join(" ")
        }
        None => "-".into(),
    });
    rows.concat()
}

fn min_over_mean(load: &LayerLoad) -> f64 {
    let min = load.tokens_per_expert().iter().copied().min().unwrap_or(0);
    min as f64 * load.num_experts() as f64 / (load.total().max(1)) as f64
}

fn row(name: &str, cells: Vec<String>) -> String {
    let cells: String = cells.iter().map(|cell| format!("  {cell:<24}")).collect();
    format!("{name:<27}{}\n", cells.trim_end())
}
