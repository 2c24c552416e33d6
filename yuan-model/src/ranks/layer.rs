//! The experts of one layer, spread over ranks: tokens to their experts and back.
//!
//! On every rank the tokens are sorted by expert. They travel rank by rank and are put in order by
//! expert where they arrive, by rank within one expert: the order in which one device would have
//! them, with the ranks' rows one after the other.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{DeviceRows, RankError, Ranks};
use crate::ops::{self, RowsToRanks};

/// How the experts of one layer are spread over the ranks of a row.
#[derive(Debug, Clone)]
pub struct LayerRanks {
    ranks: Ranks,
    /// Experts of each rank of a row; those of the first rank come first.
    experts: Vec<usize>,
}

/// Rows that arrived at the experts of a rank.
#[derive(Debug)]
pub struct Arrival {
    /// Sorted by expert, `[rows, hidden]`.
    pub rows: Tensor<2>,
    /// Rows of each expert of this rank.
    pub rows_per_expert: Vec<usize>,
    /// Rows that arrived at each rank of the row.
    pub rows_per_rank: DeviceRows,
    /// How they came.
    way: RowsToRanks,
    /// Where each row that arrived stands in `rows`, and which one stands at each place.
    order: [Tensor<1, Int>; 2],
}

impl LayerRanks {
    /// `experts[rank]` experts are on each rank of a row.
    ///
    /// # Panics
    ///
    /// If there is not one number for each rank.
    pub fn new(ranks: Ranks, experts: Vec<usize>) -> Self {
        assert_eq!(experts.len(), ranks.expert(), "a number of experts for every rank");
        Self { ranks, experts }
    }

    /// All ranks.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Experts of each rank of a row.
    pub fn experts_per_rank(&self) -> &[usize] {
        &self.experts
    }

    /// The experts of this rank among those of the layer.
    pub fn own_experts(&self) -> Range<usize> {
        self.experts_of(self.ranks.row().rank())
    }

    fn experts_of(&self, rank: usize) -> Range<usize> {
        let first: usize = self.experts[..rank].iter().sum();
        first..first + self.experts[rank]
    }

    /// Sends rows, `[rows, hidden]` sorted by expert, to the ranks of their experts;
    /// `rows_per_expert` counts them for every expert of the layer.
    ///
    /// # Errors
    ///
    /// If a rank is gone.
    pub fn send(&self, rows: Tensor<2>, rows_per_expert: &[usize]) -> Result<Arrival, RankError> {
        let row = self.ranks.row();
        let counts: Vec<u64> = rows_per_expert.iter().map(|&count| count as u64).collect();
        let counts = row.gather_counts(&counts)?;
        let sent = |from: usize, to: usize| -> usize {
            counts[from][self.experts_of(to)].iter().map(|&count| count as usize).sum()
        };
        let all = || 0..row.size();
        let way = RowsToRanks {
            group: row.clone(),
            send: all().map(|to| sent(row.rank(), to)).collect(),
            receive: all().map(|from| sent(from, row.rank())).collect(),
        };
        let arrived = |to| all().map(|from| sent(from, to) as u64).sum();
        let rows_per_rank = DeviceRows::new(all().map(arrived).collect());

        let device = rows.device();
        let own = self.own_experts();
        let table: Vec<&[u64]> = counts.iter().map(|counts| &counts[own.clone()]).collect();
        let of_expert = |expert: usize| table.iter().map(|counts| counts[expert] as usize).sum();
        let mut rows_per_expert: Vec<usize> = (0..own.len()).map(of_expert).collect();
        // Every rank takes the same operations, with a row of zeros where nothing arrives.
        if rows_per_expert.iter().all(|&count| count == 0) {
            rows_per_expert[0] = 1;
        }
        let order = order(&table).map(|order| indices(order, &device));
        let arrived = ops::all_to_all(rows, way.clone());
        let [place_of_row, row_at_place] = order.clone();
        let rows = ops::gather_rows(arrived, row_at_place, place_of_row, 1);
        Ok(Arrival { rows, rows_per_expert, rows_per_rank, way, order })
    }
}

impl Arrival {
    /// Sends what the experts made of the rows, `[rows, hidden]` in their order, back to where they
    /// came from, in the order in which they were there.
    pub fn send_back(self, rows: Tensor<2>) -> Tensor<2> {
        let [place_of_row, row_at_place] = self.order;
        ops::all_to_all(ops::gather_rows(rows, place_of_row, row_at_place, 1), self.way.back())
    }
}

/// From `counts[rank][expert]` rows that arrive rank by rank, sorted by expert within each: the
/// place of each when they are sorted by expert, then by rank; and which one is at each place.
fn order(counts: &[&[u64]]) -> [Vec<i64>; 2] {
    let total = counts.iter().map(|counts| counts.iter().sum::<u64>()).sum::<u64>() as usize;
    if total == 0 {
        return [vec![0], vec![0]];
    }
    let mut starts = Vec::with_capacity(counts.len());
    let mut start = 0;
    for counts in counts {
        starts.push(start);
        start += counts.iter().sum::<u64>() as usize;
    }
    let mut row_at_place: Vec<i64> = Vec::with_capacity(total);
    for expert in 0..counts.first().map_or(0, |counts| counts.len()) {
        for (start, counts) in starts.iter_mut().zip(counts) {
            let end = *start + counts[expert] as usize;
            row_at_place.extend((*start..end).map(|row| row as i64));
            *start = end;
        }
    }
    let mut place_of_row = vec![0; total];
    for (place, &row) in row_at_place.iter().enumerate() {
        place_of_row[row as usize] = place as i64;
    }
    [place_of_row, row_at_place]
}

fn indices(order: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    let length = order.len();
    Tensor::from_data(TensorData::new(order, [length]), device)
}

#[cfg(test)]
mod tests {
    use super::order;

    #[test]
    fn rows_are_put_in_order_by_expert_and_by_rank_within() {
        let [place_of_row, row_at_place] = order(&[&[1, 2], &[0, 1], &[2, 0]]);
        assert_eq!(row_at_place, [0, 4, 5, 1, 2, 3]);
        assert_eq!(place_of_row, [0, 3, 4, 5, 1, 2]);
    }
}
