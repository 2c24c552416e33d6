//! Text to batches: documents → tokenizer → one stream of tokens per split → shuffled rows.

mod batches;
mod documents;
mod read;
mod tokens;

pub use batches::RowStream;
pub use documents::{Document, Split, thin_out};
pub use read::{Corpus, Skipped, files_below, read_document};
pub use tokenizers::Tokenizer;
pub use tokens::{
    END_OF_DOCUMENT, SMALLEST_VOCABULARY, TokenStreams, read_tokenizer, train_tokenizer,
};
