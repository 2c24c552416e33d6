//! Other limits on the same loads: what would go, what would it save, what would it cost?

use serde::Serialize;

use crate::{
    ExpertLayout, LayerLoad, LayerPlan, ModelSize, PerLayer, PlanError, PruneLimits, PrunePlan,
};

/// What a prune under some limits would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WhatIf {
    /// α of the limits.
    pub alpha: PerLayer,
    /// β of the limits.
    pub beta: PerLayer,
    /// Experts over all layers.
    pub experts: usize,
    /// Experts that would go.
    pub pruned: usize,
    /// Fewest and most experts that a layer would keep.
    pub kept_per_layer: (usize, usize),
    /// Share of the (token, expert) pairs that went to them.
    pub pruned_load: f64,
    /// Share of the tokens that would lose an expert in a layer, on average over the layers: at
    /// least this (each loses all its experts) and at most that (each loses one). Loads alone do
    /// not tell which.
    pub tokens_losing: (f64, f64),
    /// Parameters that would go, where the model's size is known.
    pub parameters: Option<u64>,
    /// Step time of the experts over what perfect balance would give, old experts in their old
    /// order: the sum of every layer's busiest group over the sum of the means.
    pub slowdown_before: f64,
    /// The same for the kept experts in their new order.
    pub slowdown_after: f64,
}

impl WhatIf {
    /// Sums up a plan.
    pub fn of(plan: &PrunePlan, size: Option<ModelSize>) -> Self {
        let total: f64 = plan.layers.iter().map(|layer| layer.load.total() as f64).sum();
        let weighted = |value: &dyn Fn(&LayerPlan) -> f64| -> f64 {
            plan.layers.iter().map(|layer| value(layer) * layer.load.total() as f64).sum::<f64>()
                / total
        };
        let kept = plan.experts_per_layer();
        let pruned_load = plan.pruned_load_fraction();
        let top_k = plan.top_k as f64;
        let most = weighted(&|layer| (layer.pruned_load_fraction() * top_k).min(1.0));
        Self {
            alpha: plan.limits.alpha.clone(),
            beta: plan.limits.beta.clone(),
            experts: plan.layers.iter().map(LayerPlan::num_experts).sum(),
            pruned: plan.num_pruned(),
            kept_per_layer: (
                kept.iter().copied().min().unwrap_or(0),
                kept.iter().copied().max().unwrap_or(0),
            ),
            pruned_load,
            tokens_losing: (pruned_load, most),
            parameters: size
                .map(|size| (plan.num_pruned() as u64).saturating_mul(size.parameters_per_expert)),
            slowdown_before: weighted(&|layer| layer.balance_before().max_over_mean),
            slowdown_after: weighted(&|layer| layer.balance().max_over_mean),
        }
    }

    /// Every α with every β, the other limits being those of `base`.
    ///
    /// # Errors
    ///
    /// What [`PrunePlan::new`] refuses of the first combination that it does.
    pub fn sweep(
        loads: &[LayerLoad],
        base: &PruneLimits,
        layout: ExpertLayout,
        size: Option<ModelSize>,
        alphas: &[f64],
        betas: &[f64],
    ) -> Result<Vec<Self>, PlanError> {
        let pairs = alphas.iter().flat_map(|&alpha| betas.iter().map(move |&beta| (alpha, beta)));
        pairs
            .map(|(alpha, beta)| {
                let limits = PruneLimits { alpha: alpha.into(), beta: beta.into(), ..base.clone() };
                Ok(Self::of(&PrunePlan::new(loads, &limits, layout)?, size))
            })
            .collect()
    }

    /// The table of a sweep, a row each.
    pub fn table(rows: &[Self]) -> String {
        let head = format!(
            "{:>7}  {:>7}  {:>7}  {:>12}  {:>11}  {:>16}  {:>10}  {:>13}  {:>12}\n",
            "alpha",
            "beta",
            "experts",
            "kept a layer",
            "pruned load",
            "tokens losing",
            "parameters",
            "groups before",
            "groups after"
        );
        let row = |row: &Self| {
            let parameters =
                row.parameters.map_or_else(|| "-".into(), |count| format!("-{}", short(count)));
            format!(
                "{:>7}  {:>7}  {:>6.1}%  {:>12}  {:>10.2}%  {:>16}  {:>10}  {:>13.3}  {:>12.3}\n",
                row.alpha.to_string(),
                row.beta.to_string(),
                -100.0 * row.pruned as f64 / row.experts.max(1) as f64,
                format!("{}-{}", row.kept_per_layer.0, row.kept_per_layer.1),
                100.0 * row.pruned_load,
                format!("{:.2}-{:.2}%", 100.0 * row.tokens_losing.0, 100.0 * row.tokens_losing.1),
                parameters,
                row.slowdown_before,
                row.slowdown_after
            )
        };
        rows.iter().fold(head, |table, what_if| table + &row(what_if))
    }
}

/// A count with its unit: 12.3 M, 505.4 B.
fn short(count: u64) -> String {
    match count {
        1_000_000_000.. => format!("{:.1} B", count as f64 / 1e9),
        1_000_000.. => format!("{:.1} M", count as f64 / 1e6),
        _ => format!("{:.1} k", count as f64 / 1e3),
    }
}
