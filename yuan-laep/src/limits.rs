//! How much may go: the constraints of Algorithm 1.

use serde::{Deserialize, Serialize};

use crate::{PerLayer, PlanError};

/// The two load constraints of the paper, and what rounds and bounds the kept count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PruneLimits {
    /// α, individual load constraint: `load[i] ≤ α · T / N`. Infinity turns it off; in JSON
    /// `"inf"`.
    pub alpha: PerLayer,
    /// β, cumulative load constraint: the pruned experts carry at most `β · T` together.
    pub beta: PerLayer,
    /// The kept count of a layer is rounded **up** to a multiple of this (the expert-parallel
    /// size).
    pub multiple_of: usize,
    /// At least this many experts remain, itself rounded up to the multiple (and never more than
    /// there are).
    pub min_experts: usize,
    /// At most this share of the experts of a layer may go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pruned_fraction: Option<f64>,
}

/// What a plan has to respect whatever the loads are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertLayout {
    /// Experts that each token visits: no layer may keep fewer.
    pub top_k: usize,
    /// Device groups that the kept experts of a layer are spread over.
    pub groups: usize,
}

impl ExpertLayout {
    /// Checks both counts.
    ///
    /// # Errors
    ///
    /// Names the one that is zero.
    pub fn validate(&self) -> Result<(), PlanError> {
        for (name, value) in [("top_k", self.top_k), ("groups", self.groups)] {
            if value == 0 {
                let value = value.to_string();
                return Err(PlanError::Limit { name, value, expected: "at least 1" });
            }
        }
        Ok(())
    }
}

impl Default for ExpertLayout {
    /// Two experts for each token, all of them in one group.
    fn default() -> Self {
        Self { top_k: 2, groups: 1 }
    }
}

impl Default for PruneLimits {
    /// `α = ∞, β = 0.1`, single experts, at least one remains.
    fn default() -> Self {
        Self {
            alpha: f64::INFINITY.into(),
            beta: 0.1.into(),
            multiple_of: 1,
            min_experts: 1,
            max_pruned_fraction: None,
        }
    }
}

impl PruneLimits {
    /// Checks every limit alone, and the multiple against the groups.
    ///
    /// # Errors
    ///
    /// Names the limit that is out of range.
    pub fn validate(&self, groups: usize) -> Result<(), PlanError> {
        let count = |name| PlanError::Limit { name, value: "0".into(), expected: "at least 1" };
        for (name, limit, allowed, expected) in [
            ("alpha", &self.alpha, (|x| x >= 0.0) as fn(f64) -> bool, "a number of at least 0"),
            ("beta", &self.beta, |x| (0.0..=1.0).contains(&x), "a share of the load, from 0 to 1"),
        ] {
            // Not a number fails every comparison.
            if let Some(value) = limit.values().iter().find(|&&value| !allowed(value)) {
                return Err(PlanError::Limit { name, value: value.to_string(), expected });
            }
        }
        if let Some(fraction) = self.max_pruned_fraction.filter(|f| !(0.0..=1.0).contains(f)) {
            let value = fraction.to_string();
            return Err(PlanError::Limit {
                name: "max_pruned_fraction",
                value,
                expected: "a number in [0, 1]",
            });
        }
        for (name, value) in [("multiple_of", self.multiple_of), ("groups", groups)] {
            if value == 0 {
                return Err(count(name));
            }
        }
        if !self.multiple_of.is_multiple_of(groups) {
            return Err(PlanError::Groups { multiple_of: self.multiple_of, groups });
        }
        Ok(())
    }

    /// Checks the limits against the experts of a model, so that a plan cannot fail on anything but
    /// its loads.
    ///
    /// # Errors
    ///
    /// Names the limit or the layer that does not fit.
    pub fn check_model(&self, experts_per_layer: &[usize], top_k: usize) -> Result<(), PlanError> {
        self.check_layers(experts_per_layer.len())?;
        experts_per_layer
            .iter()
            .enumerate()
            .try_for_each(|(layer, &experts)| self.check_layer(layer, experts, top_k))
    }

    pub(crate) fn check_layer(
        &self,
        layer: usize,
        num_experts: usize,
        top_k: usize,
    ) -> Result<(), PlanError> {
        if num_experts == 0 {
            return Err(PlanError::NoExperts { layer });
        }
        if !num_experts.is_multiple_of(self.multiple_of) {
            return Err(PlanError::NotAMultiple {
                layer,
                num_experts,
                multiple_of: self.multiple_of,
            });
        }
        if num_experts < top_k {
            return Err(PlanError::BelowTopK { layer, kept: num_experts, top_k });
        }
        Ok(())
    }

    /// Checks that limits per layer are as many as the layers.
    pub(crate) fn check_layers(&self, layers: usize) -> Result<(), PlanError> {
        for (name, limit) in [("alpha", &self.alpha), ("beta", &self.beta)] {
            if let PerLayer::Each(values) = limit
                && values.len() != layers
            {
                return Err(PlanError::LimitPerLayer { name, found: values.len(), layers });
            }
        }
        Ok(())
    }

    /// Experts that a layer of `num_experts` keeps when the load constraints allow to prune
    /// `allowed`.
    pub(crate) fn kept(&self, num_experts: usize, allowed: usize, top_k: usize) -> usize {
        let allowed = match self.max_pruned_fraction {
            Some(fraction) => allowed.min((fraction * num_experts as f64).floor() as usize),
            None => allowed,
        };
        let at_least = self.min_experts.max(top_k).max(num_experts - allowed);
        // Saturation only matters for an absurd minimum, which keeps the whole layer anyway.
        at_least.checked_next_multiple_of(self.multiple_of).unwrap_or(usize::MAX).min(num_experts)
    }
}
