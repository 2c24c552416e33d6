//! Rows of tokens to batches: where the data of a run comes from and in which order.
//!
//! Text to tokens, and tokens to rows, is [`yuan_data`]'s; here are the rows of conversations
//! ([`PackedRows`]), batches with their masks, and what a run remembers of its data
//! ([`DataSets`]).

mod batches;
#[cfg(feature = "chat")]
mod conversations;
mod packed;
#[cfg(feature = "images")]
mod pages;
mod rows;
mod sets;
mod step_data;
mod written;

pub use batches::{RowStream, batch_of};
#[cfg(feature = "chat")]
pub(crate) use conversations::Conversations;
#[cfg(feature = "chat")]
pub use conversations::{ChatFiles, ConversationCounts};
pub use packed::PackedRows;
#[cfg(feature = "images")]
pub(crate) use pages::write_pages;
#[cfg(feature = "images")]
pub use pages::{ImagePlace, ImageSource, PageCounts, PageFiles, PageRows, PageSettings};
pub use rows::{MemoryRows, Row, RowSource, TokenRows};
pub use sets::{DataKind, DataSet, DataSets, Streams, WeightedPath};
pub use step_data::{RunRows, StepData};
pub use written::WrittenFiles;
