//! The Yuan3.0 mixture-of-experts language model (arXiv 2601.14327), written once on
//! [Burn](burn) tensors: the [`Device`](burn::tensor::Device) decides where it runs.
//!
//! Read in this order: [`config`] (what a model is), [`model`] (embedding → blocks → norm → head),
//! [`block`], [`attention`] with [`filter`] and [`rope`], [`moe`] (router, dispatch, experts),
//! [`cache`] and [`generate`] (text out of the model), [`text`] (tokens in and out), [`ops`] (the
//! operations that matter for speed), [`loss`], [`surgery`] (cutting experts), [`mesh`] (many
//! devices), [`hf`] (Hugging Face's names, keys and checkpoints), [`storage`] and [`files`] beneath
//! it; [`device`](mod@device) names what it all runs on.
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

pub mod attention;
pub mod block;
pub mod cache;
pub mod config;
pub mod device;
mod error;
pub mod files;
pub mod filter;
pub mod generate;
pub mod hf;
pub mod layered;
pub mod loss;
pub mod masks;
pub mod mesh;
pub mod model;
pub mod moe;
pub mod named;
pub mod norm;
pub mod ops;
pub mod params;
mod precision;
pub mod rope;
pub mod storage;
pub mod surgery;
pub mod text;

pub use block::Block;
pub use cache::Cache;
pub use config::{RouterType, SpecialTokens, YarnConfig, YuanConfig};
pub use device::{NoDevice, device, host_device};
pub use error::{ConfigError, ModelError};
pub use generate::{GenerateError, GenerationOptions};
pub use layered::{Batch, DeviceRows, ExpertLoad, Layered, LossOutput};
pub use mesh::{DeviceMesh, MeshModel};
pub use model::{ForwardOptions, ModelOutput, YuanModel};
pub use moe::BalanceLosses;
pub use params::ParameterCount;
pub use precision::Precision;
pub use surgery::{ExpertAxis, PrunableExperts, RefusedCut, Selection};

/// FNV-1a: stable over machines and versions, which the standard hasher does not promise.
pub fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
