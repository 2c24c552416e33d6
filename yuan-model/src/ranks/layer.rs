//! The experts of one layer, spread over ranks: tokens to their experts and back.
//!
//! On every rank the tokens are sorted by expert. They travel rank by rank and are put in order by
//! expert where they arrive, by rank within one expert: the order in which one device would have
//! them, with the ranks' rows one after the other.

use std::ops::Range;

use burn::tensor::{Int, Tensor};

use super::{DeviceRows, Ranks};
use crate::{
    ModelError,
    ops::{self, RowsToRanks},
};

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
    /// `rows_per_expert`, `[num_experts]`, counts them for every expert of the layer.
    ///
    /// # Errors
    ///
    /// If the device fails.
    ///
    /// # Panics
    ///
    /// If a rank is gone.
    pub fn send(
        &self,
        rows: Tensor<2>,
        rows_per_expert: Tensor<1, Int>,
    ) -> Result<Arrival, ModelError> {
        let (row, [num_experts]) = (self.ranks.row(), rows_per_expert.dims());
        let on_device = ops::gather_counts(rows_per_expert, row);
        // The one place of a forward pass that waits for the device, and for the other ranks.
        let counts = ops::read_counts(on_device.clone())?;
        let counts: Vec<&[usize]> = counts.chunks(num_experts).collect();
        let sent = |from: usize, to: usize| counts[from][self.experts_of(to)].iter().sum();
        let all = || 0..row.size();
        let way = RowsToRanks {
            group: row.clone(),
            send: all().map(|to| sent(row.rank(), to)).collect(),
            receive: all().map(|from| sent(from, row.rank())).collect(),
        };
        let arrived = |to| all().map(|from| sent(from, to) as u64).sum();
        let rows_per_rank = DeviceRows::new(all().map(arrived).collect());

        let own = self.own_experts();
        let of_expert = |expert: usize| counts.iter().map(|counts| counts[expert]).sum();
        let mut rows_per_expert: Vec<usize> = own.clone().map(of_expert).collect();
        // Every rank takes the same operations, with a row of zeros where nothing arrives.
        if rows_per_expert.iter().all(|&count| count == 0) {
            rows_per_expert[0] = 1;
        }
        let arriving = rows_per_expert.iter().sum();
        let arrived = ops::all_to_all(rows, way.clone());
        let (place_of_row, row_at_place) =
            ops::arrival_order(on_device, num_experts, own, arriving);
        let order = [place_of_row.clone(), row_at_place.clone()];
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
