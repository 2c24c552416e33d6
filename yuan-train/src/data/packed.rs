//! Conversations packed into rows without being cut.

use std::{collections::BTreeMap, path::Path};

use yuan_data::{DataError, TokenFile};

use super::{Row, RowSource, rows::place_in_epoch};
use crate::TrainError;

/// Rows of conversations, packed by best fit: each goes, the longest first, into the row that it
/// leaves the least room in. None is cut, positions begin anew with each, and what is left of a row
/// is padding that is neither learnt nor counted as a load.
///
/// A conversation of n tokens takes n − 1 places: its last token is only predicted, and nothing is
/// predicted across a border.
#[derive(Debug)]
pub struct PackedRows {
    tokens: TokenFile,
    learnt: TokenFile,
    row_len: usize,
    seed: Option<u64>,
    eod: u32,
    /// The conversations of every row.
    rows: Vec<Vec<u32>>,
    left_out: usize,
}

impl PackedRows {
    /// Names of the files of a split in a directory: tokens, and which of them are learnt.
    pub(super) fn names(directory: &Path, split: &str) -> [std::path::PathBuf; 2] {
        [directory.join(split), directory.join(format!("{split}.learnt"))]
    }

    /// Packs the conversations of two files, a document each: tokens, and 1 where one is learnt.
    ///
    /// # Errors
    ///
    /// If the files do not fit each other, or no conversation fits into a row.
    pub fn new(
        tokens: TokenFile,
        learnt: TokenFile,
        row_len: usize,
        seed: Option<u64>,
        eod: u32,
    ) -> Result<Self, TrainError> {
        let count = tokens.num_documents();
        let damaged = |reason: &str| {
            let path = learnt.path().to_path_buf();
            TrainError::from(DataError::Damaged { path, reason: reason.into() })
        };
        if learnt.num_documents() != count || learnt.num_tokens() != tokens.num_tokens() {
            return Err(damaged("it is not the mask of the tokens beside it"));
        }
        let mut lengths = Vec::with_capacity(count);
        for conversation in 0..count {
            let range = range_of(&tokens, conversation)?;
            lengths.push((range.end - range.start).saturating_sub(1) as usize);
        }
        let (rows, left_out) = best_fit(&lengths, row_len);
        if rows.is_empty() {
            let longest = lengths.iter().max().map_or(0, |longest| longest + 1);
            return Err(DataError::NoText(match count {
                0 => "there is no conversation".into(),
                _ => format!(
                    "no conversation fits into a row of {row_len} tokens; the longest has {longest}"
                ),
            })
            .into());
        }
        Ok(Self { tokens, learnt, row_len, seed, eod, rows, left_out })
    }

    /// Rows of one epoch.
    pub fn num_rows(&self) -> u64 {
        self.rows.len() as u64
    }

    /// Conversations that are longer than a row.
    pub fn left_out(&self) -> usize {
        self.left_out
    }
}

impl RowSource for PackedRows {
    fn row_len(&self) -> usize {
        self.row_len
    }

    fn row(&self, place: u64) -> Result<Row, TrainError> {
        let number = place_in_epoch(place, self.num_rows(), self.seed) as usize;
        let mut row = Row {
            input_ids: Vec::with_capacity(self.row_len),
            labels: Vec::with_capacity(self.row_len),
            position_ids: Vec::with_capacity(self.row_len),
            ..Row::default()
        };
        let mut mask = Vec::with_capacity(self.row_len);
        for &conversation in &self.rows[number] {
            let range = range_of(&self.tokens, conversation as usize)?;
            let count = (range.end - range.start) as usize;
            let tokens = self.tokens.read(range.start, count)?;
            let learnt = self.learnt.read(range.start, count)?;
            row.input_ids.extend(&tokens[..count - 1]);
            row.labels.extend(&tokens[1..]);
            row.position_ids.extend(0..count as u32 - 1);
            mask.extend(learnt[1..].iter().map(|&learnt| learnt != 0));
        }
        row.padding_from = row.input_ids.len();
        let room = self.row_len - row.padding_from;
        row.input_ids.resize(self.row_len, self.eod);
        row.labels.resize(self.row_len, self.eod);
        row.position_ids.extend(0..room as u32);
        mask.resize(self.row_len, false);
        row.learnt = Some(mask);
        Ok(row)
    }
}

/// The tokens of a conversation.
pub(super) fn range_of(
    file: &TokenFile,
    conversation: usize,
) -> Result<std::ops::Range<u64>, TrainError> {
    let sequences = file.document(conversation)?;
    if sequences.is_empty() {
        return Ok(0..0);
    }
    let (first, last) = (file.sequence(sequences.start)?, file.sequence(sequences.end - 1)?);
    Ok(first.start..last.end)
}

/// Puts items of these lengths into rows of `room`; the items of every row, and how many are longer
/// than a row.
pub(super) fn best_fit(lengths: &[usize], room: usize) -> (Vec<Vec<u32>>, usize) {
    let fitting = (0..lengths.len() as u32).filter(|&item| {
        let length = lengths[item as usize];
        length > 0 && length <= room
    });
    let mut items: Vec<u32> = fitting.collect();
    // Of equal lengths, in their order: the result depends on nothing else.
    items.sort_by_key(|&item| std::cmp::Reverse(lengths[item as usize]));
    let mut rows: Vec<Vec<u32>> = Vec::new();
    // Rows by the room that is left in them.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for item in items {
        let length = lengths[item as usize];
        let best = open.range(length..).next().map(|(&left, _)| left);
        let (row, left) = match best {
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, room)
            }
            Some(left) => {
                let found = open.get_mut(&left).expect("it was found");
                let row = found.pop().expect("no list is empty");
                if found.is_empty() {
                    open.remove(&left);
                }
                (row, left)
            }
        };
        rows[row].push(item);
        if left > length {
            open.entry(left - length).or_default().push(row);
        }
    }
    (rows, lengths.iter().filter(|&&length| length > room).count())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_item_that_fits_is_packed_once(
            lengths in prop::collection::vec(0_usize..40, 0..80),
            room in 1_usize..40,
        ) {
            let (rows, left_out) = best_fit(&lengths, room);
            let mut packed: Vec<u32> = rows.concat();
            packed.sort_unstable();
            let fits = |&item: &u32| (1..=room).contains(&lengths[item as usize]);
            let expected: Vec<u32> = (0..lengths.len() as u32).filter(fits).collect();
            prop_assert_eq!(packed, expected);
            prop_assert_eq!(left_out, lengths.iter().filter(|length| **length > room).count());
            let filled = |row: &Vec<u32>| row.iter().map(|&i| lengths[i as usize]).sum::<usize>();
            prop_assert!(rows.iter().all(|row| filled(row) <= room));
            // No two rows could be one: best fit opens a row only where nothing has room.
            let mut sums: Vec<usize> = rows.iter().map(filled).collect();
            sums.sort_unstable();
            prop_assert!(sums.len() < 2 || sums[0] + sums[1] > room);
        }
    }
}
