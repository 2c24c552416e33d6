//! Token order: rows sorted by expert on the way in, back to tokens on the way out.

use burn::tensor::{Bool, IndexingUpdateOp, Int, Tensor};

use crate::ops;

/// The order in which the (token, expert) pairs of one layer are computed.
///
/// It is a counting sort in tensor operations: stable, on the device, nothing is sorted.
#[derive(Debug, Clone)]
pub struct Dispatch {
    /// `[pairs, experts]`, one where the pair visits the expert.
    visits: Tensor<2, Int>,
    /// Row of every pair in the sorted order, `[pairs]`; pairs of a token are neighbours.
    row_of_pair: Tensor<1, Int>,
    /// Pair in every row of the sorted order, `[pairs]`.
    pair_of_row: Tensor<1, Int>,
    top_k: usize,
}

impl Dispatch {
    /// Orders the pairs that `experts`, `[tokens, top_k]`, lists.
    pub fn new(experts: Tensor<2, Int>, num_experts: usize) -> Self {
        let [tokens, top_k] = experts.dims();
        let (device, pairs) = (experts.device(), tokens * top_k);
        let expert_of_pair = experts.reshape([pairs]);
        let columns = Tensor::<1, Int>::arange(0..num_experts as i64, &device).unsqueeze::<2>();
        let visits = expert_of_pair.clone().unsqueeze_dim::<2>(1).equal(columns).int();
        // Earlier pairs of the same expert, plus all pairs of earlier experts.
        let earlier =
            (visits.clone().cumsum(0) * visits.clone()).sum_dim(1).squeeze_dim::<1>(1).sub_scalar(1);
        let counts = visits.clone().sum_dim(0).squeeze_dim::<1>(0);
        let starts = counts.clone().cumsum(0) - counts;
        let row_of_pair = earlier + starts.gather(0, expert_of_pair);
        let pair = Tensor::<1, Int>::arange(0..pairs as i64, &device);
        let pair_of_row = pair.zeros_like().scatter(0, row_of_pair.clone(), pair, IndexingUpdateOp::Add);
        Self { visits, row_of_pair, pair_of_row, top_k }
    }

    /// Tokens that each expert receives, `[experts]`.
    pub fn tokens_per_expert(&self) -> Tensor<1, Int> {
        self.visits.clone().sum_dim(0).squeeze_dim(0)
    }

    /// Tokens that each expert receives among those where `counted`, `[tokens]`, is true.
    pub fn tokens_per_expert_where(&self, counted: Tensor<1, Bool>) -> Tensor<1, Int> {
        let [pairs, _] = self.visits.dims();
        let counted = counted.int().unsqueeze_dim::<2>(1).repeat_dim(1, self.top_k).reshape([pairs, 1]);
        (self.visits.clone() * counted).sum_dim(0).squeeze_dim(0)
    }

    /// The same counts on the host: the one place of a forward pass that reads from the device.
    ///
    /// A product per expert needs its sizes there; kernels that take them on the device will not.
    ///
    /// # Panics
    ///
    /// If the device fails to hand over its data.
    pub fn rows_per_expert(&self) -> Vec<usize> {
        let counts = self.tokens_per_expert().into_data().convert::<i64>();
        counts.iter::<i64>().map(|count| count as usize).collect()
    }

    /// Copies each token to the rows of its experts: `[tokens, hidden]` → `[pairs, hidden]`.
    pub fn scatter(&self, tokens: Tensor<2>) -> Tensor<2> {
        let token_of_row = self.pair_of_row.clone().div_scalar(self.top_k as i64);
        ops::gather_rows(tokens, token_of_row, self.row_of_pair.clone(), self.top_k)
    }

    /// Adds the rows of each token, weighted: `[pairs, hidden]` and `[tokens, top_k]` → `[tokens, hidden]`.
    pub fn combine(&self, rows: Tensor<2>, weights: Tensor<2>) -> Tensor<2> {
        let weights = weights.cast(rows.dtype());
        ops::combine_rows(rows, weights, self.row_of_pair.clone(), self.pair_of_row.clone())
    }
}
