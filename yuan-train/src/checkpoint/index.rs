//! What is where in a checkpoint that several ranks wrote.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};
use yuan_model::named::StoredParameter;

use crate::TrainError;

/// `index.json`: the elements of every parameter, counted through the whole parameter, that each
/// rank wrote into its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Index {
    /// Ranks, each of which wrote [two files](files_of).
    pub ranks: usize,
    pub parameters: BTreeMap<String, Entry>,
}

/// One parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Shape in the whole model.
    pub shape: Vec<usize>,
    /// Whether it was ever updated and has moments.
    pub moments: bool,
    /// In order, without gaps.
    pub pieces: Vec<Piece>,
}

/// Neighbouring elements of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Piece {
    pub rank: usize,
    pub start: usize,
    pub end: usize,
}

/// More ranks than anybody has are a damaged number.
const MOST_RANKS: usize = 99_999;

/// Names of the files of parameters and of moments that a rank of several writes.
pub(super) fn files_of(rank: usize) -> [String; 2] {
    ["model", "optimizer"].map(|what| format!("{what}-{rank:05}.safetensors"))
}

impl Index {
    pub const FILE: &'static str = "index.json";

    /// From the pieces of every rank, each with the place of its parameter among the stored ones.
    ///
    /// # Errors
    ///
    /// Names a parameter that was not written whole, or in part twice.
    pub fn new(
        stored: &[StoredParameter],
        moments: &[bool],
        pieces: &[Vec<(usize, Piece)>],
    ) -> Result<Self, String> {
        let mut of_parameter: Vec<Vec<Piece>> = vec![Vec::new(); stored.len()];
        for (parameter, piece) in pieces.iter().flatten() {
            of_parameter.get_mut(*parameter).ok_or("a rank has another model")?.push(*piece);
        }
        let mut parameters = BTreeMap::new();
        for ((stored, mut pieces), &moments) in stored.iter().zip(of_parameter).zip(moments) {
            pieces.sort_by_key(|piece| piece.start);
            let entry = Entry { shape: stored.shape.clone(), moments, pieces };
            parameters.insert(stored.path.clone(), entry);
        }
        let index = Self { ranks: pieces.len(), parameters };
        index.check()?;
        Ok(index)
    }

    /// Reads the file; none if there is none, where one process wrote the checkpoint.
    pub fn load(directory: &Path) -> Result<Option<Self>, TrainError> {
        let path = directory.join(Self::FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let parsed = serde_json::from_str::<Self>(&text).map_err(|error| error.to_string());
        let checked = parsed.and_then(|index| index.check().map(|()| index));
        checked.map(Some).map_err(|reason| TrainError::Damaged { path, reason })
    }

    /// Names of all files with tensors.
    pub fn files(&self) -> impl Iterator<Item = String> {
        (0..self.ranks).flat_map(files_of)
    }

    /// Every parameter is there, once.
    fn check(&self) -> Result<(), String> {
        if !(1..=MOST_RANKS).contains(&self.ranks) {
            return Err(format!("{} ranks, expected 1 to {MOST_RANKS}", self.ranks));
        }
        for (path, Entry { shape, pieces, .. }) in &self.parameters {
            let elements =
                shape.iter().try_fold(1_usize, |product, &axis| product.checked_mul(axis));
            let mut end = 0;
            for piece in pieces {
                if piece.start != end || piece.end <= piece.start || piece.rank >= self.ranks {
                    return Err(format!(
                        "`{path}`: rank {} has elements {} to {}, expected them to begin at {end}",
                        piece.rank, piece.start, piece.end
                    ));
                }
                end = piece.end;
            }
            if elements != Some(end) {
                return Err(format!("`{path}` of shape {shape:?} has {end} elements"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(pieces: &[(usize, usize, usize)]) -> Index {
        let piece = |&(rank, start, end): &(usize, usize, usize)| Piece { rank, start, end };
        let pieces = pieces.iter().map(piece).collect();
        let entry = Entry { shape: vec![2, 3], moments: true, pieces };
        Index { ranks: 2, parameters: [("w".to_owned(), entry)].into() }
    }

    #[test]
    fn gaps_overlaps_and_ranks_that_are_not_there_are_found() {
        index(&[(1, 0, 4), (0, 4, 6)]).check().unwrap();
        for wrong in [
            &[(0, 0, 3), (1, 4, 6)][..],
            &[(0, 0, 4), (1, 3, 6)],
            &[(0, 0, 4), (2, 4, 6)],
            &[(0, 0, 4)],
            &[(0, 0, 6), (1, 6, 7)],
            &[],
        ] {
            assert!(index(wrong).check().unwrap_err().contains("`w`"), "{wrong:?}");
        }
        for ranks in [0, 10_000_000_000] {
            let index = Index { ranks, ..index(&[]) };
            assert!(index.check().unwrap_err().contains("expected 1 to 99999"));
        }
    }
}
