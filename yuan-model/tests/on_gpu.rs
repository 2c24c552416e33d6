//! The tests that mean something on a GPU in one program, which is carried to one
//! (`scripts/gpu.sh`); on its own, each of them is a program of 130 MB.
#![cfg(feature = "cuda")]
#![allow(clippy::duplicate_mod, reason = "every test program has its own copy of what they share")]

#[path = "balance.rs"]
mod balance;
#[path = "decode.rs"]
mod decode;
#[path = "fast_paths.rs"]
mod fast_paths;
#[path = "model.rs"]
mod model;
#[path = "ops.rs"]
mod ops;
#[path = "parity.rs"]
mod parity;
#[path = "vision.rs"]
mod vision;
