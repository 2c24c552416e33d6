//! Text to batches: documents → tokenizer → one stream of tokens per split → shuffled rows.

mod batches;
mod documents;
mod tokens;

pub use batches::RowStream;
pub use documents::{Document, Split, files_below, read_directory, read_document, thin_out};
pub use tokenizers::Tokenizer;
pub use tokens::{END_OF_DOCUMENT, TokenStreams, read_tokenizer, train_tokenizer};
