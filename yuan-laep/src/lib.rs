//! LAEP, Layer-Adaptive Expert Pruning (arXiv 2601.14327): the planner.
//!
//! From the tokens that each expert of a mixture-of-experts model received, this crate
//! decides *when* a run may prune, *which* experts every layer keeps and *where* the kept
//! ones sit. It holds no tensor and knows no model: integers go in, a [`PrunePlan`] comes
//! out, which can be printed, saved, edited, refused and applied later.
//!
//! Read in this order: [`LayerLoad`] and [`LoadTracker`] (what was measured), [`StabilityTest`]
//! (may we decide yet?), [`PruneLimits`] (how much may go), [`PrunePlan`] (who goes), [`rearrange`]
//! (where the rest sit); then [`LoadStatistics`] (how unequal are the loads?), [`WhatIf`] (other
//! limits on the same loads) and [`efficiency`] (what it does to the speed).
//!
//! ```
//! use yuan_laep::{ExpertLayout, LayerLoad, PruneLimits, PrunePlan};
//!
//! let loads = [LayerLoad::new(vec![5, 400, 30, 900, 2, 250, 350, 63])];
//! let limits = PruneLimits { beta: 0.1.into(), multiple_of: 2, ..PruneLimits::default() };
//! let layout = ExpertLayout { top_k: 2, groups: 2 };
//! let plan = PrunePlan::new(&loads, &limits, layout)?;
//!
//! // Experts 4, 0, 2 and 7 carry 5 % of the load together; expert 5 would make it 17.5 %.
//! assert_eq!(plan.layers[0].pruned, [0, 2, 4, 7]);
//! // The kept ones sit in two groups of near-equal load: 900 + 250 and 400 + 350.
//! assert_eq!(plan.layers[0].groups, [[3, 5], [1, 6]]);
//! # Ok::<(), yuan_laep::PlanError>(())
//! ```

pub mod efficiency;
mod error;
mod limits;
mod load;
mod per_layer;
mod plan;
mod rearrange;
mod report;
mod stability;
mod statistics;
mod what_if;

pub use error::PlanError;
pub use limits::{ExpertLayout, PruneLimits};
pub use load::{LayerLoad, LoadFile, LoadTracker, LoadWindow, ModelSize};
pub use per_layer::PerLayer;
pub use plan::{LayerPlan, LayerSummary, PrunePlan};
pub use rearrange::{GroupBalance, optimal_balance, rearrange};
pub use stability::{LayerStability, StabilityTest};
pub use statistics::LoadStatistics;
pub use what_if::WhatIf;

/// What a program that plans imports.
pub mod prelude {
    pub use crate::{
        ExpertLayout, LayerLoad, LoadFile, LoadTracker, PerLayer, PlanError, PruneLimits,
        PrunePlan, StabilityTest,
    };
}
