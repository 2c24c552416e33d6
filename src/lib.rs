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
pub use yuan_train as train;

use burn::tensor::Device;

/// A device that is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no device {wanted:?} in this build; it has: {}", found.join(", "))]
pub struct UnknownDevice {
    /// The name that was asked for.
    pub wanted: String,
    /// Names that would have worked.
    pub found: Vec<&'static str>,
}

/// A device that this build has, and how to get it.
type Named = (&'static str, fn() -> Device);

/// A device by name: `flex`, `ndarray`, `wgpu` or `cuda`, each behind the feature of its name.
///
/// # Errors
///
/// Lists the devices of this build when it has no such one.
pub fn device(name: &str) -> Result<Device, UnknownDevice> {
    #[allow(deprecated, reason = "users ask for ndarray, which upstream deprecates in favour of flex")]
    let all: Vec<Named> = vec![
        #[cfg(feature = "flex")]
        ("flex", Device::flex),
        #[cfg(feature = "ndarray")]
        ("ndarray", Device::ndarray),
        #[cfg(feature = "wgpu")]
        ("wgpu", || Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        ("cuda", || Device::cuda(0)),
    ];
    let found = all.iter().map(|(name, _)| *name).collect();
    let chosen = all.into_iter().find(|(known, _)| *known == name);
    chosen.map(|(_, device)| device()).ok_or_else(|| UnknownDevice { wanted: name.to_owned(), found })
}
