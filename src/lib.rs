//! Yuan3.0 mixture-of-experts language models and their layer-adaptive expert pruning, on Burn.
//!
//! Three crates under one roof: [`model`] (the transformer), [`laep`] (the planner) and
//! [`train`] (pre-training with LAEP as a callback).
//!
//! ```
//! use yuan::{laep::{LayerLoad, PruneLimits, PrunePlan}, model::{PrunableExperts, YuanConfig, YuanModel}};
//!
//! // A model, and the tokens that its experts received in some window.
//! let config = YuanConfig::tiny(512);
//! let model = YuanModel::new(&config, &yuan::device("flex")?)?;
//! let busy = LayerLoad::new(vec![90, 3, 120, 80, 2, 100, 75, 130]);
//! let loads = vec![busy; config.num_hidden_layers()];
//!
//! // Plan, look, apply.
//! let plan = PrunePlan::new(&loads, &PruneLimits { beta: 0.05.into(), ..PruneLimits::default() }, 1)?;
//! println!("{plan}");
//! let kept: Vec<Vec<usize>> = plan.layers.iter().map(|layer| layer.kept.clone()).collect();
//! let (model, _) = model.keep_experts(&kept).map_err(|(_, error)| error)?;
//! assert_eq!(model.config().experts_per_layer, [6, 6]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub use yuan_laep as laep;
pub use yuan_model as model;
pub use yuan_model::{NoDevice, device};
pub use yuan_train as train;

use std::{
    fmt::Display,
    io::Write,
    process::{ExitCode, Termination},
};

/// Ends a program: an error becomes one line with all its causes, whatever `RUST_BACKTRACE` says,
/// and a failure.
pub fn exit<T: Termination, E: Display>(result: Result<T, E>) -> ExitCode {
    match result {
        Ok(value) => value.report(),
        Err(error) => {
            // A closed pipe is no further failure.
            drop(writeln!(std::io::stderr(), "Error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
