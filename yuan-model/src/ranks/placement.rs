//! Experts that move from rank to rank.

use burn::tensor::Tensor;

use super::{Communicator, LayerRanks};
use crate::{
    ops::{self, RowsToRanks},
    surgery::select,
};

/// How the experts of one layer get to the ranks that hold them from now on: the same for their
/// weights and for the optimizer's moments of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertMove {
    way: RowsToRanks,
    /// The experts that this rank sends, by their places on it, in the order in which they leave.
    leave: Vec<usize>,
    /// Which of the arrived ones is at each place.
    order: Vec<usize>,
}

impl ExpertMove {
    /// Experts of a layer that lie on the ranks of a row as `layer` says, and are to lie as
    /// `placement[rank]` lists them by their numbers in the layer.
    ///
    /// # Panics
    ///
    /// If an expert is not there, or a rank would have none.
    pub fn new(layer: &LayerRanks, placement: &[Vec<usize>]) -> Self {
        let row: &Communicator = layer.ranks().row();
        let rank_of = |expert: usize| {
            let mut end = 0;
            let held = layer.experts_per_rank().iter().position(|&experts| {
                end += experts;
                expert < end
            });
            held.expect("an expert that is placed is there")
        };
        let (own, me) = (layer.own_experts(), row.rank());
        let from_me = |experts: &Vec<usize>| -> Vec<usize> {
            experts.iter().filter(|expert| own.contains(expert)).map(|e| e - own.start).collect()
        };
        let leaving: Vec<Vec<usize>> = placement.iter().map(from_me).collect();
        let mut arriving = Vec::with_capacity(placement[me].len());
        let mut receive = Vec::with_capacity(row.size());
        for rank in 0..row.size() {
            let before = arriving.len();
            let placed = placement[me].iter().enumerate();
            arriving.extend(placed.filter(|(_, e)| rank_of(**e) == rank).map(|(place, _)| place));
            receive.push(arriving.len() - before);
        }
        assert!(!arriving.is_empty(), "rank {me} of a row would have no expert");
        let mut order = vec![0; arriving.len()];
        arriving.iter().enumerate().for_each(|(at, &place)| order[place] = at);
        let send = leaving.iter().map(Vec::len).collect();
        let way = RowsToRanks { group: row.clone(), send, receive };
        Self { way, leave: leaving.concat(), order }
    }

    /// Experts that came from other ranks to this one.
    pub fn moved(&self) -> usize {
        let (all, me): (usize, _) = (self.way.receive.iter().sum(), self.way.group.rank());
        all - self.way.receive[me]
    }

    /// The experts of this rank from now on, from those of before, along the first axis; every rank
    /// of the row calls it together.
    ///
    /// # Panics
    ///
    /// If a rank is gone.
    pub fn apply<const D: usize>(&self, experts: Tensor<D>) -> Tensor<D> {
        let mut shape = experts.dims();
        let width = shape[1..].iter().product();
        let rows = experts.reshape([shape[0], width]);
        // A tensor has a row even if nothing leaves.
        let leaving = if self.leave.is_empty() { rows } else { select(rows, 0, &self.leave) };
        let arrived = ops::all_to_all(leaving, self.way.clone());
        shape[0] = self.order.len();
        select(arrived, 0, &self.order).reshape(shape)
    }
}
