//! The tests that mean something on a GPU in one program, which is carried to one
//! (`scripts/gpu.sh`).
#![cfg(feature = "cuda")]

#[path = "masked_twin.rs"]
mod masked_twin;
#[path = "recompute.rs"]
mod recompute;
