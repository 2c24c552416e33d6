//! The plan as a table: the dry run.

use std::fmt;

use crate::{
    PrunePlan,
    plan::{LayerPlan, LayerSummary},
};

impl fmt::Display for PrunePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits = &self.limits;
        writeln!(
            f,
            "alpha {}  beta {}  multiple_of {}  min_experts {}  groups {}",
            limits.alpha, limits.beta, limits.multiple_of, limits.min_experts, self.num_groups
        )?;
        writeln!(
            f,
            "{:>5}  {:>7}  {:>5}  {:>6}  {:>11}  {:>22}  {:>13}  {:>12}  {:>7}  {:>5}",
            "layer",
            "experts",
            "kept",
            "pruned",
            "pruned load",
            "busiest / mean expert",
            "groups before",
            "groups after",
            "optimum",
            "bound"
        )?;
        for (index, layer) in self.layers.iter().enumerate() {
            write_row(f, &index.to_string(), &layer.summary())?;
        }
        let before: usize = self.layers.iter().map(LayerPlan::num_experts).sum();
        let after = before - self.num_pruned();
        write!(
            f,
            "{:>5}  {:>7}  {:>5}  {:>6}  {:.1} % of the experts pruned",
            "all",
            before,
            after,
            self.num_pruned(),
            100.0 * self.num_pruned() as f64 / before.max(1) as f64
        )
    }
}

fn write_row(f: &mut fmt::Formatter<'_>, name: &str, layer: &LayerSummary) -> fmt::Result {
    let optimum = layer.optimum.map_or_else(|| "-".into(), |optimum| format!("{optimum:.3}"));
    writeln!(
        f,
        "{:>5}  {:>7}  {:>5}  {:>6}  {:>9.2} %  {:>22.2}  {:>13.3}  {:>12.3}  {:>7}  {:>5.3}",
        name,
        layer.experts,
        layer.kept,
        layer.pruned,
        100.0 * layer.pruned_load,
        layer.max_over_mean,
        layer.groups_before,
        layer.groups_after,
        optimum,
        layer.lower_bound
    )
}
