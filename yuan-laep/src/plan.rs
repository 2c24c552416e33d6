//! Who goes: Algorithm 1, *expert pruning*, and the plan that carries the decision.

use serde::{Deserialize, Serialize};

use crate::{
    ExpertLayout, GroupBalance, LayerLoad, PlanError, PruneLimits, rearrange,
    rearrange::{cut_in_order, optimal_balance},
};

/// What one layer keeps, in its new order, and what it loses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Tokens per expert that the decision rests on, old expert 0 first.
    pub load: LayerLoad,
    /// Old indices of the kept experts in their new order: the groups one after the other.
    pub kept: Vec<usize>,
    /// Old indices of the pruned experts, ascending.
    pub pruned: Vec<usize>,
    /// The kept experts of every device group, by load descending.
    pub groups: Vec<Vec<usize>>,
}

/// What a plan does to one layer, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerSummary {
    /// Experts before.
    pub experts: usize,
    /// Experts that remain.
    pub kept: usize,
    /// Experts that go.
    pub pruned: usize,
    /// Share of the load that went to them.
    pub pruned_load: f64,
    /// Load of the busiest expert over the mean, before.
    pub max_over_mean: f64,
    /// Load of the busiest group over the mean if the old experts are cut into groups in their old
    /// order.
    pub groups_before: f64,
    /// The same for the kept experts in their new order.
    pub groups_after: f64,
    /// The best that any arrangement of the kept experts could have, where it is known.
    pub optimum: Option<f64>,
    /// No arrangement can be better than this.
    pub lower_bound: f64,
}

impl LayerPlan {
    /// The plan of this layer in numbers.
    pub fn summary(&self) -> LayerSummary {
        let after = self.balance();
        LayerSummary {
            experts: self.num_experts(),
            kept: self.kept.len(),
            pruned: self.pruned.len(),
            pruned_load: self.pruned_load_fraction(),
            max_over_mean: self.load.max_over_mean(),
            groups_before: self.balance_before().max_over_mean,
            groups_after: after.max_over_mean,
            optimum: self.optimum(),
            lower_bound: after.lower_bound,
        }
    }

    /// Experts before the prune.
    pub fn num_experts(&self) -> usize {
        self.load.num_experts()
    }

    /// Share of the load that went to pruned experts.
    pub fn pruned_load_fraction(&self) -> f64 {
        let tokens = self.load.tokens_per_expert();
        let pruned: u128 = self.pruned.iter().map(|&expert| u128::from(tokens[expert])).sum();
        pruned as f64 / self.load.total().max(1) as f64
    }

    /// Balance of the groups under the load measured.
    pub fn balance(&self) -> GroupBalance {
        GroupBalance::of(self.load.tokens_per_expert(), &self.groups)
    }

    /// The best balance that any arrangement of the kept experts could have, where the search for
    /// it is short.
    pub fn optimum(&self) -> Option<f64> {
        optimal_balance(self.load.tokens_per_expert(), &self.groups)
    }

    /// The old experts cut into as many groups in their old order.
    pub fn groups_before(&self) -> Vec<Vec<usize>> {
        let experts: Vec<usize> = (0..self.num_experts()).collect();
        cut_in_order(&experts, self.groups.len())
    }

    /// Balance of the [groups before](Self::groups_before).
    pub fn balance_before(&self) -> GroupBalance {
        GroupBalance::of(self.load.tokens_per_expert(), &self.groups_before())
    }
}

/// The decision for a whole model: plain data that can be printed, saved, edited and applied.
///
/// ```
/// use yuan_laep::{ExpertLayout, LayerLoad, PruneLimits, PrunePlan};
///
/// let loads = [LayerLoad::new(vec![1, 40, 30, 29])];
/// let plan = PrunePlan::new(&loads, &PruneLimits::default(), ExpertLayout::default())?;
/// assert_eq!(plan.kept(), [[1, 2, 3]]);
/// // It can be saved, edited and read again; what makes no sense is refused.
/// assert_eq!(PrunePlan::from_json(&plan.to_json())?, plan);
/// # Ok::<(), yuan_laep::PlanError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StoredPlan")]
pub struct PrunePlan {
    /// The constraints it was made under.
    pub limits: PruneLimits,
    /// Device groups that the kept experts of a layer are spread over.
    pub num_groups: usize,
    /// Experts that each token visits.
    pub top_k: usize,
    /// One entry per layer.
    pub layers: Vec<LayerPlan>,
}

impl PrunePlan {
    /// Plans every layer: Algorithm 1 chooses, Algorithm 2 arranges.
    ///
    /// # Errors
    ///
    /// Limits out of range, a layer without experts or load, or experts that cannot be split
    /// into multiples and groups.
    pub fn new(
        loads: &[LayerLoad],
        limits: &PruneLimits,
        layout: ExpertLayout,
    ) -> Result<Self, PlanError> {
        layout.validate()?;
        limits.validate(layout.groups)?;
        if loads.is_empty() {
            return Err(PlanError::NoLayers);
        }
        limits.check_layers(loads.len())?;
        let mut layers = Vec::with_capacity(loads.len());
        for (layer, load) in loads.iter().enumerate() {
            layers.push(plan_layer(layer, load, limits, layout)?);
        }
        let ExpertLayout { top_k, groups: num_groups } = layout;
        Ok(Self { limits: limits.clone(), num_groups, top_k, layers })
    }

    /// Old indices of the experts that every layer keeps, in their new order: what
    /// `PrunableExperts::keep_experts` of `yuan-model` takes.
    pub fn kept(&self) -> Vec<Vec<usize>> {
        self.layers.iter().map(|layer| layer.kept.clone()).collect()
    }

    /// Reads a plan from JSON and checks it, since plans may be edited by hand.
    ///
    /// # Errors
    ///
    /// [`PlanError::Format`] for anything that is no plan, else what [`check`](Self::check) finds.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let stored: StoredPlan =
            serde_json::from_str(text).map_err(|error| PlanError::Format(error.to_string()))?;
        stored.try_into()
    }

    /// The plan as indented JSON.
    #[expect(clippy::missing_panics_doc, reason = "plain data always serialises")]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan is plain data")
    }

    /// Checks that the limits are in their ranges, that every expert is kept or pruned exactly
    /// once, that the groups are the kept experts in equal parts, and that no layer falls below
    /// `top_k`.
    ///
    /// # Errors
    ///
    /// Names the limit, or the first layer and expert that is wrong.
    pub fn check(&self) -> Result<(), PlanError> {
        if self.layers.is_empty() {
            return Err(PlanError::NoLayers);
        }
        ExpertLayout { top_k: self.top_k, groups: self.num_groups }.validate()?;
        self.limits.validate(self.num_groups)?;
        self.limits.check_layers(self.layers.len())?;
        self.layers.iter().enumerate().try_for_each(|(layer, plan)| self.check_layer(layer, plan))
    }

    /// Checks the plan against the experts of the model that it is to be applied to.
    ///
    /// # Errors
    ///
    /// Everything [`check`](Self::check) finds, and a model with other layers, experts or `top_k`.
    pub fn check_against(
        &self,
        experts_per_layer: &[usize],
        top_k: usize,
    ) -> Result<(), PlanError> {
        self.check()?;
        if experts_per_layer.len() != self.layers.len() {
            return Err(PlanError::LayerCount {
                expected: experts_per_layer.len(),
                found: self.layers.len(),
            });
        }
        for (layer, (plan, &expected)) in self.layers.iter().zip(experts_per_layer).enumerate() {
            if plan.num_experts() != expected {
                return Err(PlanError::ExpertCount { layer, expected, found: plan.num_experts() });
            }
            if plan.kept.len() < top_k {
                return Err(PlanError::BelowTopK { layer, kept: plan.kept.len(), top_k });
            }
        }
        Ok(())
    }

    /// Experts of every layer after the prune: `per_layer_experts_blocks` of the config.
    pub fn experts_per_layer(&self) -> Vec<usize> {
        self.layers.iter().map(|layer| layer.kept.len()).collect()
    }

    /// Experts pruned over all layers.
    pub fn num_pruned(&self) -> usize {
        self.layers.iter().map(|layer| layer.pruned.len()).sum()
    }

    /// Share of the load of all layers that went to pruned experts.
    pub fn pruned_load_fraction(&self) -> f64 {
        let total: f64 = self.layers.iter().map(|layer| layer.load.total() as f64).sum();
        let pruned = self
            .layers
            .iter()
            .map(|layer| layer.pruned_load_fraction() * layer.load.total() as f64);
        pruned.sum::<f64>() / total.max(1.0)
    }

    fn check_layer(&self, layer: usize, plan: &LayerPlan) -> Result<(), PlanError> {
        let num_experts = plan.num_experts();
        let mut seen = vec![false; num_experts];
        for &expert in plan.kept.iter().chain(&plan.pruned) {
            match seen.get_mut(expert) {
                None => return Err(PlanError::NoSuchExpert { layer, expert, num_experts }),
                Some(true) => return Err(PlanError::Repeated { layer, expert }),
                Some(fresh) => *fresh = true,
            }
        }
        if let Some(expert) = seen.iter().position(|&listed| !listed) {
            return Err(PlanError::Missing { layer, expert });
        }
        if plan.kept.len() < self.top_k {
            let kept = plan.kept.len();
            return Err(PlanError::BelowTopK { layer, kept, top_k: self.top_k });
        }
        let equal_parts = plan.groups.len() == self.num_groups
            && plan.groups.iter().all(|group| group.len() * self.num_groups == plan.kept.len());
        if !equal_parts || !plan.groups.iter().flatten().eq(&plan.kept) {
            return Err(PlanError::GroupsDiffer { layer });
        }
        Ok(())
    }
}

/// A plan as it is read: earlier versions had `top_k` among the limits.
#[derive(Deserialize)]
struct StoredPlan {
    limits: StoredLimits,
    num_groups: usize,
    top_k: Option<usize>,
    layers: Vec<LayerPlan>,
}

#[derive(Deserialize)]
struct StoredLimits {
    #[serde(flatten)]
    limits: PruneLimits,
    top_k: Option<usize>,
}

/// Whatever file a plan is read from, it is checked.
impl TryFrom<StoredPlan> for PrunePlan {
    type Error = PlanError;

    fn try_from(stored: StoredPlan) -> Result<Self, PlanError> {
        let plan = Self {
            top_k: stored.top_k.or(stored.limits.top_k).unwrap_or(1),
            limits: stored.limits.limits,
            num_groups: stored.num_groups,
            layers: stored.layers,
        };
        plan.check()?;
        Ok(plan)
    }
}

fn plan_layer(
    layer: usize,
    load: &LayerLoad,
    limits: &PruneLimits,
    layout: ExpertLayout,
) -> Result<LayerPlan, PlanError> {
    let num_experts = load.num_experts();
    limits.check_layer(layer, num_experts, layout.top_k)?;
    if load.total() == 0 {
        return Err(PlanError::NoLoad { layer });
    }
    let order = load.ascending();
    let allowed = allowed_prefix(load, &order, limits.alpha.at(layer), limits.beta.at(layer));
    let cut = num_experts - limits.kept(num_experts, allowed, layout.top_k);
    let mut pruned = order[..cut].to_vec();
    pruned.sort_unstable();
    let groups = rearrange(load.tokens_per_expert(), &order[cut..], layout.groups);
    Ok(LayerPlan { load: load.clone(), kept: groups.concat(), pruned, groups })
}

/// Length of the prefix of the ascending order that both load constraints allow to prune.
///
/// Both are monotone along the order, so the pruned set is a prefix: `min(K_α, K_β)`.
fn allowed_prefix(load: &LayerLoad, order: &[usize], alpha: f64, beta: f64) -> usize {
    let total = load.total() as f64;
    let individual = alpha * total / load.num_experts() as f64;
    let cumulative = beta * total;
    let mut sum = 0_u128;
    order
        .iter()
        .take_while(|&&expert| {
            let tokens = load.tokens_per_expert()[expert];
            sum += u128::from(tokens);
            tokens as f64 <= individual && sum as f64 <= cumulative
        })
        .count()
}
