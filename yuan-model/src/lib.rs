//! The Yuan3.0 mixture-of-experts language model (arXiv 2601.14327), written once on
//! [Burn](burn) tensors: the [`Device`](burn::tensor::Device) decides where it runs.
//!
//! Start with [`YuanConfig`] (what a model is) and [`YuanModel`] (embedding → blocks → norm →
//! head): a [`Block`] is [`Attention`] on a [`LocalizedFilter`] and the experts of [`moe`].
//! [`layers`] is what goes through the layers and the one loop over them; [`ranks`] spreads a model
//! over devices.
//! [`PrunableExperts`] cuts the experts of any model; [`Cache`], [`generate`] and [`text`] make
//! text; [`hf`] has Hugging Face's names, keys and checkpoints; [`vision`] makes rows of the model of
//! pictures. Beneath them are [`ops`] (the
//! operations that matter for speed), [`loss`], [`masks`] (packed rows), [`named`] (parameters by
//! path) and [`storage`]; [`device()`] names what it all runs on.
//!
//! ```
//! use burn::tensor::{Device, Int, Tensor};
//! use yuan_model::{ForwardOptions, YuanConfig, YuanModel};
//!
//! let config = YuanConfig::tiny(96);
//! let model = YuanModel::new(&config, &Device::flex())?;
//! let input_ids = Tensor::<2, Int>::from_data([[5, 17, 42, 8]], &Device::flex());
//! let output = model.forward(input_ids, ForwardOptions::default());
//! assert_eq!(output.logits.dims(), [1, 4, 96]);
//! // Each of the 4 tokens visits two of the 8 experts of each of the two layers.
//! assert_eq!(output.tokens_per_expert.len(), 2);
//! assert_eq!(output.tokens_per_expert[0].clone().sum().into_scalar::<i64>(), 8);
//! # Ok::<(), yuan_model::ConfigError>(())
//! ```

mod attention;
mod block;
mod cache;
mod config;
mod device;
mod error;
mod filter;
pub mod generate;
pub mod hf;
pub mod layers;
pub mod loss;
pub mod masks;
mod model;
pub mod moe;
pub mod named;
mod norm;
mod objective;
pub mod ops;
mod params;
mod precision;
pub mod ranks;
pub mod rope;
pub mod storage;
mod surgery;
pub mod text;
pub mod vision;

pub use burn;

pub use attention::{Attention, DocumentMask, QueryKeyValue};
pub use block::Block;
pub use cache::{Cache, FilterCache};
pub use config::{RouterType, SpecialTokens, YarnConfig, YuanConfig};
pub use device::{NoDevice, available, device, host_device};
pub use error::{ConfigError, ModelError};
pub use filter::{LocalizedFilter, PairConv};
pub use generate::{GenerateError, GenerationOptions};
pub use layers::{Batch, BatchImages, LossMask, LossOutput};
pub use model::{ForwardOptions, HiddenOutput, Inputs, ModelOutput, YuanModel};
pub use moe::BalanceLosses;
pub use norm::RmsNorm;
pub use objective::{Objective, ObjectiveLoss, ScoredLabels};
pub use params::ParameterCount;
pub use precision::Precision;
pub use ranks::DeviceRows;
#[doc(hidden)]
pub use surgery::with_value;
pub use surgery::{ExpertAxis, PrunableExperts, RefusedCut, Selection};

/// What a program that builds, runs and prunes models imports.
pub mod prelude {
    pub use crate::{
        ForwardOptions, GenerationOptions, PrunableExperts, YuanConfig, YuanModel, device,
        ranks::Ranks,
    };
}

/// FNV-1a: stable over machines and versions, which the standard hasher does not promise.
#[doc(hidden)]
pub fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
