//! The toy of the README: its text, its model and its settings, which are also the defaults of
//! `yuan pretrain`.

use std::path::Path;

use yuan_laep::{PruneLimits, StabilityTest};
use yuan_model::YuanConfig;
use yuan_train::{LaepConfig, TrainConfig, TrainError, Trigger, data::Document};

pub use crate::corpus::read_crate_sources;

/// Text without a data set to download: sources and documentation of the crates that this library
/// was built from, which Cargo has unpacked. `Cargo.lock` pins every byte.
///
/// # Errors
///
/// If Cargo or its registry is not there; a directory of text (`data::Corpus::read`) serves then.
pub fn corpus() -> Result<Vec<Document>, TrainError> {
    read_crate_sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
}

/// A model of 29.9 M parameters: 4 layers of 16 experts, of which every token visits two.
pub fn model() -> YuanConfig {
    YuanConfig::toy(4096)
}

/// 240 steps of 2,048 tokens; the experts are pruned as soon as the loads of all layers are stable.
pub fn train_config() -> TrainConfig {
    TrainConfig {
        validate_every: Some(60),
        laep: LaepConfig {
            window_steps: 10,
            trigger: Trigger::Stable { rounds: 1 },
            stability: StabilityTest { windows: 3, max_change: 0.12, min_rank_correlation: 0.6 },
            limits: PruneLimits {
                beta: 0.19.into(),
                multiple_of: 2,
                min_experts: 8,
                ..PruneLimits::default()
            },
            groups: 2,
            ..LaepConfig::default()
        },
        ..TrainConfig::default()
    }
}
