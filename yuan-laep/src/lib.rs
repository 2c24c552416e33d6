//! LAEP, Layer-Adaptive Expert Pruning (arXiv 2601.14327): the planner.
//!
//! From the tokens that each expert of a mixture-of-experts model received, this crate
//! decides *when* a run may prune, *which* experts every layer keeps and *where* the kept
//! ones sit. It holds no tensor and knows no model: integers go in, a [`PrunePlan`] comes
//! out, which can be printed, saved, edited, refused and applied later.
//!
//! Read in this order: [`load`] (what was measured), [`stability`] (may we decide yet?),
//! [`limits`] (how much may go), [`plan`] (who goes), [`mod@rearrange`] (where the rest sit),
//! [`report`] (the plan as a table); then [`statistics`] (how unequal are the loads?), [`what_if`]
//! (other limits on the same loads) and [`efficiency`] (what it does to the speed).
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
pub mod error;
pub mod limits;
pub mod load;
mod per_layer;
pub mod plan;
pub mod rearrange;
pub mod report;
pub mod stability;
pub mod statistics;
pub mod what_if;

pub use error::PlanError;
pub use limits::{ExpertLayout, PruneLimits};
pub use load::{LayerLoad, LoadFile, LoadTracker, LoadWindow, ModelSize};
pub use per_layer::PerLayer;
pub use plan::{LayerPlan, LayerSummary, PrunePlan};
pub use rearrange::{GroupBalance, optimal_balance, rearrange};
pub use stability::{LayerStability, StabilityTest};
pub use statistics::LoadStatistics;
pub use what_if::WhatIf;
