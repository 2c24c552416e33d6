//! Text to batches: documents → tokenizer → one stream of tokens per split → shuffled rows.

mod batches;
mod documents;
mod registry;
mod tokens;

pub use batches::RowStream;
pub use documents::{Document, Split, read_directory, thin_out};
pub use registry::read_crate_sources;
pub use tokens::{END_OF_DOCUMENT, TokenStreams, read_tokenizer, train_tokenizer};
