//! Attention for any type and card, by products over blocks of queries: cuBLAS forms scores
//! and sums, this crate's kernels the softmax between them.
//!
//! Under a causal mask a block of queries meets the keys up to its end only, so a little more than
//! half of all scores is formed. Scores are in f32 and exist for one block at a time; probabilities are rounded to the
//! type of the values, as flash attention does.

use burn::{
    backend::ops::IntTensorOps,
    tensor::{DType, TensorData},
};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::{
    blas::{Matrix, ProductBatch},
    context::Lanes,
    kernels::{Arg, Kernel, KernelFile},
    queue::run,
    tensors::{FirstKeys, contiguous, dims, empty, is_bf16},
};

/// Queries of a block: at 2,048 positions 12 % more scores than the triangle has.
const BLOCK: usize = 256;
/// Bytes of scores in f32 at a time, and of all probabilities and their gradients.
const SCORE_BYTES: usize = 256 << 20;
const PROBABILITY_BYTES: usize = 1200 << 20;
const THREADS: usize = 256;

/// What a position sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mask {
    /// The positions before it and itself.
    Causal,
    /// All positions.
    None,
}

impl Mask {
    /// How many keys the queries before `end` see together, of so many.
    pub fn seen(self, end: usize, keys: usize) -> usize {
        match self {
            Self::Causal => end,
            Self::None => keys,
        }
    }

    /// The first query that sees any of the keys from `start` on.
    fn first_query(self, start: usize) -> usize {
        match self {
            Self::Causal => start,
            Self::None => 0,
        }
    }
}

/// How the work is cut.
#[derive(Debug, Clone, Copy)]
struct Plan {
    /// Batch times heads.
    heads: usize,
    /// Queries.
    seq: usize,
    /// Elements from one head's keys to the next one's.
    keys_apart: usize,
    head_dim: usize,
    /// Heads of one sequence.
    heads_per_row: usize,
    at_once: usize,
    block: usize,
    bf16: bool,
    mask: Mask,
}

impl Plan {
    /// For queries after `past` others, over keys for `capacity` positions.
    fn new(
        query: &CubeTensor,
        [past, capacity]: [usize; 2],
        mask: Mask,
        bytes_per_head: impl Fn(usize, usize) -> usize,
    ) -> Self {
        let [batch, heads_per_row, seq, head_dim] = dims(query);
        let (heads, block, keys) =
            (batch * heads_per_row, BLOCK.min(seq.max(1)), (past + seq).max(1));
        let by_scores = SCORE_BYTES / (4 * block * keys);
        let by_probabilities = PROBABILITY_BYTES / bytes_per_head(keys, query.dtype.size());
        let at_once = by_scores.min(by_probabilities).clamp(1, heads.max(1));
        let keys_apart = capacity * head_dim;
        Self {
            heads,
            seq,
            keys_apart,
            head_dim,
            heads_per_row,
            at_once,
            block,
            bf16: is_bf16(query),
            mask,
        }
    }

    fn size(&self) -> usize {
        if self.bf16 { 2 } else { 4 }
    }

    /// First head and number of heads of every round.
    fn rounds(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.heads)
            .step_by(self.at_once)
            .map(move |first| (first, self.at_once.min(self.heads - first)))
    }

    /// First and last position of every block.
    fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.seq)
            .step_by(self.block)
            .map(move |start| (start, (start + self.block).min(self.seq)))
    }

    /// Positions `start..end` of the heads from `head` on, in a tensor `[heads, seq, head_dim]`.
    fn positions(&self, pointer: u64, head: usize, start: usize, end: usize) -> Matrix {
        let offset = (head * self.seq + start) * self.head_dim * self.size();
        self.matrix(pointer + offset as u64, end - start, self.head_dim, self.head_dim)
    }

    /// Keys or values of the positions before `end`, of the heads from `head` on.
    fn keys(&self, pointer: u64, head: usize, end: usize) -> Matrix {
        let offset = head * self.keys_apart * self.size();
        self.matrix(pointer + offset as u64, end, self.head_dim, self.head_dim)
    }

    fn matrix(&self, pointer: u64, rows: usize, columns: usize, pitch: usize) -> Matrix {
        Matrix { pointer, rows, columns, pitch, transposed: false, bf16: self.bf16 }
    }

    fn kernel(&self, name: &'static str) -> Kernel {
        let causal = self.mask == Mask::Causal;
        Kernel { causal, ..Kernel::new(KernelFile::Softmax, name, self.bf16) }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// `[heads, seq, head_dim]`, from one head to the next.
    fn plane(&self) -> usize {
        self.seq * self.head_dim
    }
}

pub(super) fn forward(
    query: CubeTensor,
    key: CubeTensor,
    value: CubeTensor,
    first_keys: Option<CubeTensor>,
    mask: Mask,
) -> CubeTensor {
    after(query, key, value, 0, first_keys, mask)
}

/// See [`ops::cached_attention`](crate::ops::cached_attention).
pub(super) fn cached(
    query: CubeTensor,
    key: CubeTensor,
    value: CubeTensor,
    length: usize,
    first_keys: &[usize],
) -> CubeTensor {
    let [_, _, queries, _] = dims(&query);
    let first_keys = first_keys.iter().any(|&first| first > 0).then(|| {
        let shape = [first_keys.len(), length];
        // A query among the padding sees itself.
        let row = |&first: &usize| (0..length).map(move |position| first.min(position) as i32);
        let firsts = TensorData::new(first_keys.iter().flat_map(row).collect::<Vec<i32>>(), shape);
        CubeBackend::int_from_data(firsts, &query.device)
    });
    after(query, key, value, length - queries, first_keys, Mask::Causal)
}

/// Queries after `past` positions, whose keys and values come first; `first_keys` are of all
/// positions.
fn after(
    query: CubeTensor,
    key: CubeTensor,
    value: CubeTensor,
    past: usize,
    first_keys: Option<CubeTensor>,
    mask: Mask,
) -> CubeTensor {
    let [query, key, value] = [query, key, value].map(contiguous);
    let first_keys = FirstKeys::new(first_keys, &query);
    let [_, _, capacity, _] = dims(&key);
    let plan =
        Plan::new(&query, [past, capacity], mask, |keys, size| BLOCK.min(keys) * keys * size);
    let total = past + plan.seq;
    let out = empty(&query, query.meta.shape().clone(), query.dtype);
    let block = [plan.at_once, plan.block, total];
    let (scores, probabilities) =
        (empty(&query, block, DType::F32), empty(&query, block, query.dtype));
    let tensors = [&query, &key, &value, &out, &scores, &probabilities, &first_keys.tensor];
    let first_key = first_keys.argument();
    run(tensors, move |lanes, pointers| {
        let [query, key, value, out, scores, probabilities, first_keys_at] = pointers;
        let starts = first_key(first_keys_at);
        for (head, heads) in plan.rounds() {
            for (start, end) in plan.blocks() {
                let seen = mask.seen(past + end, total);
                let queries = plan.positions(query, head, start, end);
                scores_of(
                    lanes,
                    &plan,
                    heads,
                    queries,
                    plan.keys(key, head, seen),
                    plan.scale(),
                    scores,
                )?;
                let sizes = [past + start, seen, plan.heads_per_row, total, head].map(Arg::Int);
                let places = [scores, probabilities].map(Arg::Pointer);
                let args = [&places[..], &[starts], &sizes].concat();
                let kernel = plan.kernel("attention_softmax");
                lanes.launch(kernel, [end - start, heads], THREADS, 0, &args)?;
                let weights = plan.matrix(probabilities, end - start, seen, seen);
                let parts =
                    [weights, plan.keys(value, head, seen), plan.positions(out, head, start, end)];
                let strides = [(end - start) * seen, plan.keys_apart, plan.plane()];
                lanes.product(0, parts, 1.0, 0.0, Some(ProductBatch { count: heads, strides }))?;
            }
        }
        Ok(())
    });
    out
}

/// `scale · queries · keysᵀ` of some heads, in f32, without gaps.
fn scores_of(
    lanes: &mut Lanes<'_>,
    plan: &Plan,
    heads: usize,
    queries: Matrix,
    keys: Matrix,
    scale: f32,
    to: u64,
) -> Result<(), String> {
    let (rows, columns) = (queries.rows, keys.rows);
    let scores =
        Matrix { pointer: to, rows, columns, pitch: columns, transposed: false, bf16: false };
    let strides = [plan.plane(), plan.keys_apart, rows * columns];
    lanes.product(
        0,
        [queries, keys.t(), scores],
        scale,
        0.0,
        Some(ProductBatch { count: heads, strides }),
    )
}

/// Gradients for queries, keys and values; scores are formed again, and probabilities and their
/// gradients are whole for as many heads as fit, so that keys and values get their sums in one
/// product per block.
pub(super) fn backward(
    query: CubeTensor,
    key: CubeTensor,
    value: CubeTensor,
    first_keys: Option<CubeTensor>,
    grad: CubeTensor,
    mask: Mask,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [query, key, value, grad] = [query, key, value, grad].map(contiguous);
    let first_keys = FirstKeys::new(first_keys, &query);
    let [_, _, seq, _] = dims(&query);
    let plan = Plan::new(&query, [0, seq], mask, |seq, size| 2 * seq * seq * size);
    let like_query = || empty(&query, query.meta.shape().clone(), query.dtype);
    let [d_query, d_key, d_value] = [like_query(), like_query(), like_query()];
    let block = || empty(&query, [plan.at_once, plan.block, plan.seq], DType::F32);
    let whole = || empty(&query, [plan.at_once, plan.seq, plan.seq], query.dtype);
    let (scores, d_p, p, d_scores) = (block(), block(), whole(), whole());
    let tensors = [
        &query,
        &key,
        &value,
        &grad,
        &d_query,
        &d_key,
        &d_value,
        &scores,
        &d_p,
        &p,
        &d_scores,
        &first_keys.tensor,
    ];
    let first_key = first_keys.argument();
    run(tensors, move |lanes, pointers| {
        let [
            query,
            key,
            value,
            grad,
            d_query,
            d_key,
            d_value,
            scores,
            d_p,
            p,
            d_scores,
            first_keys_at,
        ] = pointers;
        let starts = first_key(first_keys_at);
        let (seq, square) = (plan.seq, plan.seq * plan.seq);
        for (head, heads) in plan.rounds() {
            let at = |pointer, start, end| plan.positions(pointer, head, start, end);
            for (start, end) in plan.blocks() {
                let seen = mask.seen(end, seq);
                let keys = [at(key, 0, seen), at(value, 0, seen)];
                scores_of(
                    lanes,
                    &plan,
                    heads,
                    at(query, start, end),
                    keys[0],
                    plan.scale(),
                    scores,
                )?;
                scores_of(lanes, &plan, heads, at(grad, start, end), keys[1], 1.0, d_p)?;
                let places =
                    [&[scores, d_p, p, d_scores].map(Arg::Pointer)[..], &[starts]].concat();
                let sizes = [start, seen, plan.heads_per_row, seq, head].map(Arg::Int);
                let far = [Arg::Float(plan.scale().into()), Arg::Long(seq), Arg::Long(square)];
                let args = [&places[..], &sizes, &far].concat();
                let kernel = plan.kernel("attention_softmax_backward");
                lanes.launch(kernel, [end - start, heads], THREADS, 0, &args)?;
                let row = (start * seq * plan.size()) as u64;
                let rows = plan.matrix(d_scores + row, end - start, seen, seq);
                let batch = Some(ProductBatch {
                    count: heads,
                    strides: [square, plan.plane(), plan.plane()],
                });
                lanes.product(0, [rows, keys[0], at(d_query, start, end)], 1.0, 0.0, batch)?;
            }
            for (start, end) in plan.blocks() {
                let from_query = mask.first_query(start);
                let corner = ((from_query * seq + start) * plan.size()) as u64;
                let batch = Some(ProductBatch {
                    count: heads,
                    strides: [square, plan.plane(), plan.plane()],
                });
                for (weights, from, to) in [(p, grad, d_value), (d_scores, query, d_key)] {
                    let columns =
                        plan.matrix(weights + corner, seq - from_query, end - start, seq).t();
                    let parts = [columns, at(from, from_query, seq), at(to, start, end)];
                    lanes.product(0, parts, 1.0, 0.0, batch)?;
                }
            }
        }
        Ok(())
    });
    (d_query, d_key, d_value)
}
