//! Text at the size of a real run, without tensors: from files of text to rows of tokens.
//!
//! Read in this order: [`Sources`] (which files are text, and as what), [`tokenizer`] (text to
//! tokens), [`TokenFile`] and [`TokenWriter`] (Megatron's indexed layout, mapped into memory),
//! [`prepare`](prepare()) (from sources to a [`Dataset`] in bounded memory, gone on with where it
//! was stopped), and [`Mixture`] (which row of which data set comes next, computed from one number).
//!
//! ```
//! use yuan_data::{Dataset, Mixture, NoProgress, PrepareOptions, prepare};
//!
//! let temp = tempfile::tempdir()?;
//! for name in 0..40 {
//!     let text = format!("Document {name}: the router sends every token to two experts. ").repeat(9);
//!     std::fs::write(temp.path().join(format!("{name}.txt")), text)?;
//! }
//! let options = PrepareOptions::train_tokenizer(vec![temp.path().into()], 300);
//! let out = temp.path().join("tokens");
//! prepare(&out, &options, &NoProgress)?;
//!
//! let dataset = Dataset::open(&out)?;
//! assert_eq!(dataset.info().train.documents + dataset.info().validation.documents, 40);
//! // Rows of 16 tokens and the one that follows, in an order that the seed decides.
//! let mixture = Mixture::new(16, Some(7), vec![("text", 1.0, dataset.train()?)])?;
//! assert_eq!(mixture.row(0)?.tokens.len(), 17);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod dataset;
mod document;
mod error;
mod indexed;
mod mixture;
mod order;
mod prepare;
mod source;
pub mod tokenizer;

pub use dataset::{Dataset, DatasetInfo, SourceInfo, SplitInfo};
pub use document::{Document, Split, thin_out};
pub use error::DataError;
pub use indexed::{Position, TokenFile, TokenType, TokenWriter};
pub use mixture::{Mixture, MixtureRow, Shares};
pub use order::{Permutation, mix, row_of_epochs};
pub use prepare::{
    NoProgress, PrepareOptions, Progress, Stage, TokenizerFrom, is_unfinished, prepare,
    prepare_documents,
};
pub use source::{
    Corpus, Item, JsonLines, Part, Place, Reading, Skipped, SkippedFiles, SourceFile, Sources,
    files_below, read_document,
};
pub use tokenizers::Tokenizer;
