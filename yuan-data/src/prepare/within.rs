//! A split within documents, where too few documents are there to choose some that validate.

use std::path::Path;

use crate::{DataError, TokenFile, TokenType, TokenWriter};

/// Tokens that are copied at once.
const AT_ONCE: u64 = 1 << 20;

/// What the names of the new files begin with.
pub(super) const PREFIX: &str = "within-";

/// Cuts the last part of every document off to validate with; the files of both splits that are
/// there stay, so that it can be done again after a kill.
pub(super) fn split(
    directory: &Path,
    token_type: TokenType,
    eod: u32,
    share: f64,
) -> Result<[TokenWriter; 2], DataError> {
    let whole = ["train", "validation"].map(|name| directory.join(name));
    let named = |name: &str| directory.join(format!("{PREFIX}{name}"));
    let mut splits = [
        TokenWriter::create(&named("train"), token_type)?,
        TokenWriter::create(&named("validation"), token_type)?,
    ];
    for name in whole {
        let file = TokenFile::open(&name)?;
        for document in 0..file.num_documents() {
            let sequences = file.document(document)?;
            let begin = file.sequence(sequences.start)?.start;
            // Without the token that ends it.
            let end = file.sequence(sequences.end - 1)?.end - 1;
            let cut = end - ((end - begin) as f64 * share) as u64;
            for (writer, range) in splits.iter_mut().zip([begin..cut, cut..end]) {
                if range.is_empty() {
                    continue;
                }
                for from in range.clone().step_by(AT_ONCE as usize) {
                    let count = AT_ONCE.min(range.end - from) as usize;
                    writer.push(&file.read(from, count)?)?;
                }
                writer.push(&[eod])?;
                writer.end_document()?;
            }
        }
    }
    Ok(splits)
}
