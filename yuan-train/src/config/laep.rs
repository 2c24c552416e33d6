//! Settings of layer-adaptive expert pruning (LAEP): when, how much, and what undoes it.

use serde::{Deserialize, Deserializer, Serialize};
use yuan_laep::{LoadTracker, PruneLimits, PrunePlan, StabilityTest};

use super::learns::Learns;
use crate::{SpeedModel, TrainError};

/// When to prune.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// When the loads of every layer are stable; so many times at most, each on loads of its own.
    Stable {
        /// Prunes of the run.
        rounds: usize,
    },
    /// After these steps, stable or not.
    Steps(Vec<u64>),
    /// Never: the loads are only recorded.
    Never,
}

/// Undoes a prune that costs too much: the validation loss must return to within a margin in time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// The loss may exceed that of right before the prune by this share of it.
    pub margin: f64,
    /// Steps after the prune by which it must have come so far.
    pub steps: u64,
}

/// What learns right after a prune: the routers alone for some steps are the cheap recovery, since
/// what is left to learn is mostly where the tokens of the pruned experts go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// The parameters that learn meanwhile.
    pub learns: Learns,
    /// Steps after each prune.
    pub steps: u64,
}

/// Settings of layer-adaptive expert pruning.
///
/// ```
/// use yuan_train::{Guard, LaepConfig, Trigger};
///
/// let laep = LaepConfig {
///     trigger: Trigger::Stable { rounds: 2 },
///     guard: Some(Guard { margin: 0.01, steps: 40 }),
///     ..LaepConfig::default()
/// };
/// laep.validate()?;
/// # Ok::<(), yuan_train::TrainError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LaepConfig {
    /// W: optimizer steps whose loads make a window.
    pub window_steps: u64,
    /// When to prune.
    pub trigger: Trigger,
    /// What counts as stable; the plan rests on as many windows.
    pub stability: StabilityTest,
    /// How much may go.
    pub limits: PruneLimits,
    /// Device groups that the kept experts are spread over: the ranks that share the experts, or a
    /// multiple.
    pub groups: usize,
    /// Windows after which all experts are spread over the groups anew by the latest loads, without
    /// pruning any; absent: only with a prune.
    #[serde(default, deserialize_with = "zero_is_absent")]
    pub rearrange_every: Option<u64>,
    /// A plan made elsewhere, applied instead of one on the run's own loads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PrunePlan>,
    /// Whether the devices are measured when training begins, so that every prune comes with a
    /// prediction of the speed after it.
    #[serde(default)]
    pub predict_speed: bool,
    /// What that prediction rests on: what was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<SpeedModel>,
    /// What undoes a prune; without it a prune stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
    /// What learns right after a prune; without it everything that learns otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
}

impl Default for LaepConfig {
    fn default() -> Self {
        Self {
            window_steps: 20,
            trigger: Trigger::Stable { rounds: 1 },
            stability: StabilityTest::default(),
            limits: PruneLimits::default(),
            groups: 1,
            rearrange_every: None,
            plan: None,
            predict_speed: false,
            speed: None,
            guard: None,
            recovery: None,
        }
    }
}

impl LaepConfig {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// Names the setting that is out of range.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.stability.validate()?;
        self.limits.validate(self.groups)?;
        self.tracker()?;
        if self.rearrange_every == Some(0) {
            return Err(TrainError::Zero { name: "rearrange_every" });
        }
        match &self.trigger {
            Trigger::Stable { rounds: 0 } => return Err(TrainError::Zero { name: "rounds" }),
            Trigger::Steps(steps) => {
                let starts = steps.first().is_some_and(|&first| first > 0);
                if !starts || !steps.is_sorted_by(|a, b| a < b) {
                    return Err(TrainError::PruneSteps(steps.clone()));
                }
            }
            Trigger::Stable { .. } | Trigger::Never => {}
        }
        if let Some(plan) = &self.plan {
            plan.check()?;
            if self.rounds() > 1 {
                return Err(TrainError::PlanOnce);
            }
        }
        if self.recovery.is_some_and(|recovery| recovery.steps == 0) {
            return Err(TrainError::Zero { name: "the recovery's steps" });
        }
        let Some(Guard { margin, steps }) = self.guard else { return Ok(()) };
        if !(margin >= 0.0 && margin.is_finite()) {
            let (name, expected) = ("the guard's margin", "must not be negative".into());
            return Err(TrainError::OutOfRange { name, value: margin, expected });
        }
        if steps == 0 {
            return Err(TrainError::Zero { name: "the guard's steps" });
        }
        Ok(())
    }

    pub(crate) fn rounds(&self) -> usize {
        match &self.trigger {
            Trigger::Stable { rounds } => *rounds,
            Trigger::Steps(steps) => steps.len(),
            Trigger::Never => 0,
        }
    }

    pub(crate) fn tracker(&self) -> Result<LoadTracker, TrainError> {
        Ok(LoadTracker::new(self.window_steps, self.stability.windows + 1)?)
    }
}

/// Runs of earlier versions say 0 where nothing is meant to happen.
pub(crate) fn zero_is_absent<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::deserialize(from)?.filter(|&number| number != 0))
}
