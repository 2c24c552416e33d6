//! What can be wrong with a configuration or with tensors that are to become a model.

use std::path::PathBuf;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read or written.
    #[error("cannot access {path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The text is not JSON, or a key has a value of the wrong kind.
    #[error("not a model configuration: {0}")]
    Format(String),
    /// A key that the model cannot be built without is absent.
    #[error("the configuration has no `{0}`")]
    Missing(&'static str),
    /// Keys contradict each other or have impossible values.
    #[error("{0}")]
    Contradiction(String),
    /// A key asks for something that this library does not compute.
    #[error("{key} = {value} is not supported: {reason}")]
    Unsupported {
        /// The key of `config.json`.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is supported instead.
        reason: &'static str,
    },
}

/// Why a model could not be cut or filled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The list of layers does not fit the model.
    #[error("the model has {expected} layers, but {found} were given")]
    LayerCount {
        /// Layers of the model.
        expected: usize,
        /// Layers given.
        found: usize,
    },
    /// A layer was told to keep an expert that it does not have, or one of them twice, or too few.
    #[error("layer {layer}: {reason}")]
    Experts {
        /// Index of the layer.
        layer: usize,
        /// What is wrong.
        reason: String,
    },
    /// Tensors are missing, superfluous or of the wrong shape; all of them are listed.
    #[error("the tensors do not fit the model: {}", .0.join("; "))]
    Tensors(Vec<String>),
    /// A device failed to compute or to hand over its results.
    #[error("the device failed: {0}")]
    Device(String),
    /// Several devices cannot be one mesh, or a batch cannot be spread over them.
    #[error("{0}")]
    Mesh(String),
}

impl ModelError {
    /// For `map_err` on what is read from a device.
    pub fn device(error: impl std::fmt::Display) -> Self {
        Self::Device(error.to_string())
    }
}
