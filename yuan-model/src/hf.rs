//! Hugging Face interop: the only place with Hugging Face's names.

mod config;
mod layout;

pub use layout::{HostTensor, ParameterSource, TensorLayout};
