//! All ranks of a run, in rows that share the experts.

use super::{Communicator, RankError};
use crate::{ConfigError, YuanConfig};

/// The shape of the ranks of a run: `data` rows of `expert` ranks.
///
/// ```
/// use yuan_model::ranks::Grid;
///
/// let grid = Grid::new(6, 2)?;
/// assert_eq!((grid.data(), grid.expert()), (2, 3));
/// # Ok::<(), yuan_model::ranks::RankError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    data: usize,
    expert: usize,
}

impl Grid {
    /// One rank: a device by itself.
    pub const ONE: Self = Self { data: 1, expert: 1 };

    /// So many ranks in `data` rows.
    ///
    /// # Errors
    ///
    /// If they cannot be cut into so many rows of one length.
    pub fn new(ranks: usize, data: usize) -> Result<Self, RankError> {
        if ranks == 0 || data == 0 || !ranks.is_multiple_of(data) {
            let reason = format!("{ranks} ranks cannot be cut into {data} rows of one length");
            return Err(RankError::Layout(reason));
        }
        Ok(Self { data, expert: ranks / data })
    }

    /// Rows: copies of every expert.
    pub fn data(&self) -> usize {
        self.data
    }

    /// Ranks of a row, over which the experts of a layer are spread.
    pub fn expert(&self) -> usize {
        self.expert
    }

    /// All ranks.
    pub fn size(&self) -> usize {
        self.data * self.expert
    }

    /// Checks that every layer of a model has an expert for every rank that shares them.
    ///
    /// # Errors
    ///
    /// Names the layer that has too few.
    pub fn check(&self, config: &YuanConfig) -> Result<(), ConfigError> {
        for (layer, &experts) in config.experts_per_layer.iter().enumerate() {
            if experts < self.expert {
                return Err(ConfigError::TooFewForRanks { layer, experts, ranks: self.expert });
            }
        }
        Ok(())
    }
}

/// The ranks of a run as a grid: `data` rows of `expert` ranks.
///
/// Every rank holds a copy of all that is no expert's and computes its share of a batch. The experts
/// of every layer are split over the ranks of a row, and every row holds them all: the ranks of a
/// column hold copies of the same ones. Rank `r` is in row `r / expert`, column `r % expert`.
#[derive(Debug, Clone)]
pub struct Ranks {
    world: Communicator,
    row: Communicator,
    column: Communicator,
}

impl Ranks {
    /// All ranks in `data` rows.
    ///
    /// # Errors
    ///
    /// If they cannot be cut into so many rows of one length.
    pub fn new(world: Communicator, data: usize) -> Result<Self, RankError> {
        let (expert, rank) = (Grid::new(world.size(), data)?.expert(), world.rank());
        let row: Vec<usize> = (0..expert).map(|column| rank / expert * expert + column).collect();
        let column: Vec<usize> = (0..data).map(|row| row * expert + rank % expert).collect();
        Ok(Self { row: world.group(&row), column: world.group(&column), world })
    }

    /// All ranks: those that hold copies of what is no expert's.
    pub fn world(&self) -> &Communicator {
        &self.world
    }

    /// The ranks that share the experts with this one.
    pub fn row(&self) -> &Communicator {
        &self.row
    }

    /// The ranks that hold the same experts.
    pub fn column(&self) -> &Communicator {
        &self.column
    }

    /// Their shape.
    pub fn grid(&self) -> Grid {
        Grid { data: self.data(), expert: self.expert() }
    }

    /// Rows: copies of every expert.
    pub fn data(&self) -> usize {
        self.column.size()
    }

    /// Ranks over which the experts of a layer are spread.
    pub fn expert(&self) -> usize {
        self.row.size()
    }

    /// The part of so many rows of a batch that this rank computes; ranks have neighbouring ones,
    /// as many each as can be.
    ///
    /// # Errors
    ///
    /// If there are fewer rows than ranks.
    pub fn share(&self, rows: usize) -> Result<std::ops::Range<usize>, RankError> {
        let (ranks, rank) = (self.world.size(), self.world.rank());
        if rows < ranks {
            let reason = format!("a batch of {rows} rows is too small for {ranks} ranks");
            return Err(RankError::Layout(reason));
        }
        let shares = evenly(rows, ranks);
        let first: usize = shares[..rank].iter().sum();
        Ok(first..first + shares[rank])
    }
}

/// Cuts a number of experts or rows into parts as equal as can be, the larger ones first.
pub fn evenly(count: usize, parts: usize) -> Vec<usize> {
    (0..parts).map(|part| count / parts + usize::from(part < count % parts)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::on_threads;

    #[test]
    fn rows_share_experts_and_columns_hold_copies() {
        let places = on_threads(6, |world| {
            let ranks = Ranks::new(world, 2).unwrap();
            let rank = ranks.world().rank() as u64;
            let gathered = |group: &Communicator| group.gather_counts(&[rank]).unwrap().concat();
            (gathered(ranks.row()), gathered(ranks.column()), ranks.share(8).unwrap())
        });
        assert_eq!(places[4], (vec![3, 4, 5], vec![1, 4], 6..7));
        assert_eq!(places[0], (vec![0, 1, 2], vec![0, 3], 0..2));
    }

    #[test]
    fn ranks_that_make_no_grid_are_refused() {
        let refused = on_threads(3, |world| {
            let rows = Ranks::new(world.clone(), 1).unwrap().share(2).unwrap_err();
            [Ranks::new(world, 2).unwrap_err().to_string(), rows.to_string()]
        });
        let [grid, rows] = &refused[0];
        assert_eq!(grid, "3 ranks cannot be cut into 2 rows of one length");
        assert_eq!(rows, "a batch of 2 rows is too small for 3 ranks");
    }
}
