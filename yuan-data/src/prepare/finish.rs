//! The end of a preparation: indexes, `dataset.json`, and everything under its name.

use std::{fs, io::ErrorKind};

use yuan_files::write_whole;

use super::{
    pipeline::Pipeline,
    state::{Given, Workplace},
    within,
};
use crate::{
    DataError, Dataset, DatasetInfo, Position, SplitInfo, TokenType, TokenWriter, source::no_text,
};

/// Everything but `dataset.json`.
pub(super) const FILES: [&str; 5] =
    ["train.bin", "train.idx", "validation.bin", "validation.idx", Dataset::TOKENIZER];

/// Shares of the tokens that documents chosen by their names may validate, relative to the share
/// that is wanted; outside of it, they are too few for that.
const BY_NAME: std::ops::RangeInclusive<f64> = 0.2..=5.0;

impl Pipeline<'_> {
    /// Completes the data set; `sources` are named where there is no text.
    pub fn finish(mut self, given: &Given, sources: &str) -> Result<Dataset, DataError> {
        self.note()?;
        let wanted = self.options.validation;
        let [train, validation] = self.state.written.map(|written| written.tokens);
        if train + validation == 0 {
            return Err(no_text(sources, &self.state.skipped));
        }
        let share = validation as f64 / (train + validation) as f64;
        let by_name = train > 0 && BY_NAME.contains(&(share / wanted));
        let is_within = wanted > 0.0 && !by_name;
        let token_type = TokenType::for_vocabulary(self.encoder.vocab_size());
        let directory = self.workplace.directory();
        let mut splits = indexed(&mut self.writers)?;
        if is_within {
            let eod = self.encoder.eod();
            splits = indexed(&mut within::split(directory, token_type, eod, wanted)?)?;
        }
        let [train, validation] = splits;
        let info = DatasetInfo {
            layout: 1,
            tokenizer: self.tokenizer_digest()?,
            vocab_size: self.encoder.vocab_size(),
            end_of_document: self.options.end_of_document.clone(),
            eod: self.encoder.eod(),
            token_type,
            train,
            validation,
            validation_share: wanted,
            split_within_documents: is_within,
            duplicates: self.state.duplicates,
            sources: given.sources.clone(),
            skipped: self.state.skipped,
        };
        // From here on nothing is computed any more, and the rest can be done again.
        let text = serde_json::to_vec_pretty(&info).expect("plain data");
        write_whole(&directory.join(Dataset::FILE), &text)?;
        put_in_place(self.workplace)
    }
}

/// Writes the indexes of both splits.
fn indexed(writers: &mut [TokenWriter; 2]) -> Result<[SplitInfo; 2], DataError> {
    let mut info = |split: usize| {
        let [bin, idx] = writers[split].index()?;
        let Position { documents, tokens, .. } = writers[split].position();
        Ok::<_, DataError>(SplitInfo { documents, tokens, bin, idx })
    };
    Ok([info(0)?, info(1)?])
}

/// Gives the files of a data set that is complete their places; what a killed process has moved
/// already is there.
pub(super) fn put_in_place(workplace: &Workplace) -> Result<Dataset, DataError> {
    let (directory, out) = (workplace.directory(), workplace.out());
    let path = directory.join(Dataset::FILE);
    let text = fs::read(&path).map_err(DataError::io("read", &path))?;
    let info: DatasetInfo = serde_json::from_slice(&text)
        .map_err(|error| DataError::damaged(&path, error.to_string()))?;
    for name in FILES {
        let prefix = match info.split_within_documents && name != Dataset::TOKENIZER {
            true => within::PREFIX,
            false => "",
        };
        let (from, to) = (directory.join(format!("{prefix}{name}")), out.join(name));
        match fs::rename(&from, &to) {
            Err(error) if error.kind() == ErrorKind::NotFound && to.exists() => {}
            moved => moved.map_err(DataError::io("write", &to))?,
        }
    }
    write_whole(&out.join(Dataset::FILE), &text)?;
    workplace.remove()?;
    Dataset::open(out)
}
