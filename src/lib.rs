//! Mixture-of-experts language models (Yuan3.0, arXiv 2601.14327) on [Burn](burn), and LAEP,
//! Layer-Adaptive Expert Pruning: in the middle of pre-training, under-used experts are pruned
//! layer by layer from token-load statistics, and the rest are rearranged over the devices.
//!
//! The crates under one roof: [`model`] (the transformer), [`laep`] (the planner), [`train`]
//! (pre-training with LAEP as a callback), [`rl`] (learning from rewards), [`eval`] (benchmarks)
//! and, behind the feature `report`, `report` (tables, pictures and pages of runs). The [`prelude`]
//! has what most programs import, and [`toy`] is the small run of the README.
//!
//! ```
//! use yuan::prelude::*;
//!
//! // A model, and the tokens that its experts received in some window.
//! let config = YuanConfig::tiny(512);
//! let model = YuanModel::new(&config, &yuan::device("flex")?)?;
//! let busy = LayerLoad::new(vec![90, 3, 120, 80, 2, 100, 75, 130]);
//! let loads = vec![busy; config.num_layers()];
//!
//! // Plan, look, apply.
//! let limits = PruneLimits { beta: 0.05.into(), ..PruneLimits::default() };
//! let layout = ExpertLayout { top_k: config.top_k, groups: 1 };
//! let plan = PrunePlan::new(&loads, &limits, layout)?;
//! println!("{plan}");
//! let (model, _) = model.keep_experts(&plan.kept())?;
//! assert_eq!(model.config().experts_per_layer, [6, 6]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod corpus;
pub mod toy;

pub use burn;
pub use yuan_data as data;
pub use yuan_eval as eval;
pub use yuan_files as files;
pub use yuan_laep as laep;
pub use yuan_model as model;
pub use yuan_model::{NoDevice, device};
#[cfg(feature = "report")]
pub use yuan_report as report;
pub use yuan_rl as rl;
pub use yuan_train as train;

/// What a program that trains, plans and prunes imports.
pub mod prelude {
    pub use yuan_laep::{
        ExpertLayout, LayerLoad, LoadTracker, PerLayer, PruneLimits, PrunePlan, StabilityTest,
    };
    pub use yuan_model::{
        ForwardOptions, GenerationOptions, PrunableExperts, YuanConfig, YuanModel, ranks::Ranks,
    };
    #[cfg(feature = "report")]
    pub use yuan_report::Report;
    pub use yuan_train::prelude::*;
}

/// The pages of the documentation, whose programs are compiled and run with the tests.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/architecture.md")]
    struct Architecture;
    #[doc = include_str!("../docs/checkpoints.md")]
    struct Checkpoints;
    #[doc = include_str!("../docs/data.md")]
    struct Data;
    #[doc = include_str!("../docs/distributed.md")]
    struct Distributed;
    #[doc = include_str!("../docs/laep.md")]
    struct Laep;
    #[doc = include_str!("../docs/performance.md")]
    struct Performance;
    #[doc = include_str!("../docs/rl.md")]
    struct Rl;
    #[doc = include_str!("../docs/training.md")]
    struct Training;
}
