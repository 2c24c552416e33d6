//! One row of a batch, and where rows come from.

use yuan_data::{DataError, Mixture, row_of_epochs};
use yuan_model::{masks::document_position_ids, vision::Picture};

use crate::TrainError;

/// One row of a batch; all lists have its length.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row {
    /// Number of the data set it is from.
    pub set: usize,
    /// What the model reads.
    pub input_ids: Vec<u32>,
    /// The token that follows each.
    pub labels: Vec<u32>,
    /// Position of each token in its document.
    pub position_ids: Vec<u32>,
    /// Which labels are learnt; none: all of them.
    pub learnt: Option<Vec<bool>>,
    /// Tokens from here on only fill the row up.
    pub padding_from: usize,
    /// Tiles of its images, all of one size.
    pub tiles: Vec<Picture>,
    /// Where the rows of the tiles stand, in order; the tokens there only keep the places.
    pub image_places: Vec<usize>,
    /// What an objective reads of every label ([`Batch::signals`](crate::Batch::signals)); all rows of a
    /// batch have as many.
    pub signals: Vec<Vec<f32>>,
}

impl Row {
    /// A row of text: every label is learnt, and positions begin anew after the end of a document.
    pub fn of_text(set: usize, tokens: &[u32], eod: u32) -> Self {
        let input_ids = tokens[..tokens.len() - 1].to_vec();
        Self {
            set,
            labels: tokens[1..].to_vec(),
            position_ids: document_position_ids(&input_ids, eod),
            learnt: None,
            padding_from: input_ids.len(),
            input_ids,
            ..Self::default()
        }
    }

    /// Labels that are learnt.
    pub fn learnt_labels(&self) -> u64 {
        match &self.learnt {
            Some(learnt) => learnt.iter().filter(|learnt| **learnt).count() as u64,
            None => self.labels.len() as u64,
        }
    }
}

/// A sequence of rows without end, of which any can be had from its number alone: a run goes on
/// anywhere, with another batch size or on other devices.
pub trait RowSource: Send + Sync + std::fmt::Debug {
    /// Tokens of a row.
    fn row_len(&self) -> usize;

    /// The row at a place of the sequence.
    ///
    /// # Errors
    ///
    /// If its file is damaged.
    fn row(&self, place: u64) -> Result<Row, TrainError>;
}

/// Rows of token files, mixed by weight.
#[derive(Debug)]
pub struct TokenRows {
    mixture: Mixture,
    eod: u32,
}

impl TokenRows {
    /// Of a mixture whose documents end with `eod`.
    pub fn new(mixture: Mixture, eod: u32) -> Self {
        Self { mixture, eod }
    }
}

impl RowSource for TokenRows {
    fn row_len(&self) -> usize {
        self.mixture.row_len()
    }

    fn row(&self, place: u64) -> Result<Row, TrainError> {
        let row = self.mixture.row(place)?;
        Ok(Row::of_text(row.set, &row.tokens, self.eod))
    }
}

/// Rows of tokens that are in memory.
#[derive(Debug)]
pub struct MemoryRows {
    tokens: Vec<u32>,
    eod: u32,
    row_len: usize,
    seed: Option<u64>,
}

impl MemoryRows {
    /// Rows in an order that `seed` and the epoch decide, or in their own without one.
    ///
    /// # Errors
    ///
    /// If there are too few tokens for a row.
    pub fn new(
        tokens: Vec<u32>,
        eod: u32,
        row_len: usize,
        seed: Option<u64>,
    ) -> Result<Self, TrainError> {
        if row_len == 0 || tokens.len() <= row_len {
            let tokens = tokens.len();
            let reason = format!("{tokens} tokens are too few for one row of {row_len}");
            return Err(DataError::NoText(reason).into());
        }
        Ok(Self { tokens, eod, row_len, seed })
    }

    /// Rows of one epoch.
    pub fn num_rows(&self) -> u64 {
        ((self.tokens.len() - 1) / self.row_len) as u64
    }
}

impl RowSource for MemoryRows {
    fn row_len(&self) -> usize {
        self.row_len
    }

    fn row(&self, place: u64) -> Result<Row, TrainError> {
        let at = place_in_epoch(place, self.num_rows(), self.seed) as usize * self.row_len;
        Ok(Row::of_text(0, &self.tokens[at..=at + self.row_len], self.eod))
    }
}

/// Which of `rows` rows stands at a place of the epochs that follow each other.
pub(super) fn place_in_epoch(place: u64, rows: u64, seed: Option<u64>) -> u64 {
    // Distinct orders for distinct pairs of seed and epoch.
    let key = seed.map(|seed| move |epoch| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ epoch);
    row_of_epochs(place, rows, key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_inputs_and_positions_restart_after_a_document() {
        let rows = MemoryRows::new((0..42).collect(), 9, 4, None).unwrap();
        assert_eq!(rows.num_rows(), 10);
        let row = rows.row(2).unwrap();
        assert_eq!(row.input_ids, [8, 9, 10, 11]);
        assert_eq!(row.labels, [9, 10, 11, 12]);
        assert_eq!(row.position_ids, [0, 1, 0, 1]);
        assert_eq!(row.learnt_labels(), 4);
    }

    #[test]
    fn every_epoch_visits_every_row_once_in_another_order() {
        let rows = MemoryRows::new((0..42).collect(), 99, 4, Some(7)).unwrap();
        let first = |place| rows.row(place).unwrap().input_ids[0];
        let epochs: [Vec<u32>; 2] = [(0..10).map(first).collect(), (10..20).map(first).collect()];
        assert_ne!(epochs[0], epochs[1]);
        for mut epoch in epochs {
            epoch.sort_unstable();
            assert!(epoch.into_iter().eq((0..10).map(|row| row * 4)));
        }
    }

    #[test]
    fn too_few_tokens_are_refused() {
        let error = MemoryRows::new(vec![1, 2, 3], 0, 3, None).unwrap_err();
        assert_eq!(error.to_string(), "3 tokens are too few for one row of 3");
    }
}
