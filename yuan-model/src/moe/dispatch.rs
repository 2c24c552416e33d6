//! Token order: rows sorted by expert on the way in, back to tokens on the way out.

use burn::tensor::{Bool, Int, Tensor};

use crate::{ModelError, ops};

/// The order in which the (token, expert) pairs of one layer are computed.
#[derive(Debug, Clone)]
pub struct Dispatch {
    /// Experts of every token, `[tokens, top_k]`.
    experts: Tensor<2, Int>,
    /// Row of every pair in the sorted order, `[pairs]`; pairs of a token are neighbours.
    row_of_pair: Tensor<1, Int>,
    /// Pair in every row of the sorted order, `[pairs]`.
    pair_of_row: Tensor<1, Int>,
    /// Pairs of every expert, `[num_experts]`.
    tokens_per_expert: Tensor<1, Int>,
}

impl Dispatch {
    /// Orders the pairs that `experts`, `[tokens, top_k]`, lists.
    pub fn new(experts: Tensor<2, Int>, num_experts: usize) -> Self {
        let (row_of_pair, pair_of_row, tokens_per_expert) =
            ops::dispatch_order(experts.clone(), num_experts);
        Self { experts, row_of_pair, pair_of_row, tokens_per_expert }
    }

    /// Tokens that each expert receives, `[experts]`.
    pub fn tokens_per_expert(&self) -> Tensor<1, Int> {
        self.tokens_per_expert.clone()
    }

    /// Tokens that each expert receives among those where `counted`, `[tokens]`, is true.
    pub fn tokens_per_expert_where(&self, counted: Tensor<1, Bool>) -> Tensor<1, Int> {
        let [num_experts] = self.tokens_per_expert.dims();
        let columns = Tensor::<1, Int>::arange(0..num_experts as i64, &self.experts.device());
        let visits =
            self.experts.clone().unsqueeze_dim::<3>(2).equal(columns.unsqueeze::<3>()).int();
        let counted = counted.int().unsqueeze_dims::<3>(&[1, 2]);
        (visits * counted).sum_dims_squeeze::<1, _>(&[0, 1])
    }

    /// Rows of every expert, padding included, on the host: a product per expert needs its size
    /// there.
    ///
    /// # Errors
    ///
    /// If the device fails to hand over its data.
    pub fn rows_per_expert(&self) -> Result<Vec<usize>, ModelError> {
        ops::read_counts(self.tokens_per_expert.clone())
    }

    /// Copies each token to the rows of its experts: `[tokens, hidden]` → `[pairs, hidden]`.
    pub fn scatter(&self, tokens: Tensor<2>) -> Tensor<2> {
        let [_, top_k] = self.experts.dims();
        let token_of_row = self.pair_of_row.clone().div_scalar(top_k as i64);
        ops::gather_rows(tokens, token_of_row, self.row_of_pair.clone(), top_k)
    }

    /// Adds the rows of each token, weighted: `[pairs, hidden]` and `[tokens, top_k]` → `[tokens,
    /// hidden]`.
    pub fn combine(&self, rows: Tensor<2>, weights: Tensor<2>) -> Tensor<2> {
        let weights = weights.cast(rows.dtype());
        ops::combine_rows(rows, weights, self.row_of_pair.clone(), self.pair_of_row.clone())
    }
}
