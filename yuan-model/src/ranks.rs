//! Ranks: every one runs the same program on its own device and meets the others in collectives.
//!
//! A [`Communicator`] is a group of ranks that exchange data; an [`Engine`] carries it: threads of
//! one process ([`on_threads`]) or processes ([`connect`]). [`Ranks`] arranges all ranks of a
//! run in rows that share the experts of every layer. [`LayerRanks`] is what a layer knows of that,
//! and sends tokens to the ranks of their experts and back.
//!
//! Ranks compute alike only if all of them take the same collectives in the same order. So whatever
//! decides about one (counts, losses, plans) must be the same number on every rank.

mod communicator;
mod launch;
mod layer;
mod layout;
mod model;
mod placement;
mod rows;
mod sockets;
mod threads;

pub use communicator::{Communicator, Engine, RankError};
pub use launch::TOKEN;
pub use layer::{Arrival, LayerRanks};
pub use layout::{Grid, Ranks, evenly};
pub use placement::ExpertMove;
pub use rows::DeviceRows;
pub use sockets::{Meeting, connect};
pub use threads::on_threads;
