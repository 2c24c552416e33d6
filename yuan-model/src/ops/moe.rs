//! What a mixture of experts is made of: the order of tokens, rows on their way, and the products
//! of the experts.

use burn::backend::{Dispatch, tensor::IntTensor};
use burn::tensor::{Int, Tensor};
use std::ops::Range;

use super::YuanOps;
use crate::ModelError;

/// Counts that the backend already has on the host; `None` if they must be read from the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCounts(pub Option<Vec<usize>>);

/// The order in which (token, expert) pairs are computed: by expert, pairs of one expert as they
/// come.
///
/// # Shapes
///
/// - `experts`: `[tokens, top_k]`, all below `num_experts`
/// - output: the row of every pair `[tokens · top_k]`, the pair in every row `[tokens · top_k]`,
///   the pairs of every expert `[num_experts]`
pub fn dispatch_order(
    experts: Tensor<2, Int>,
    num_experts: usize,
) -> (Tensor<1, Int>, Tensor<1, Int>, Tensor<1, Int>) {
    let (rows, pairs, counts) = Dispatch::dispatch_order(experts.into_dispatch(), num_experts);
    (Tensor::from_dispatch(rows), Tensor::from_dispatch(pairs), Tensor::from_dispatch(counts))
}

/// Brings the counts of [`dispatch_order`] to the host: the one place of a forward pass that waits
/// for the device.
///
/// What is launched between the two runs while they travel.
///
/// # Errors
///
/// If the device fails to hand over its data.
pub fn read_counts(counts: Tensor<1, Int>) -> Result<Vec<usize>, ModelError> {
    match Dispatch::read_counts(counts.clone().into_dispatch()).0 {
        Some(counts) => Ok(counts),
        None => {
            let counts = counts.try_into_data().map_err(ModelError::device)?.convert::<i64>();
            Ok(counts.iter::<i64>().map(|count| count as usize).collect())
        }
    }
}

/// The order by expert, and by rank within one expert, of rows that arrive rank by rank, sorted by
/// expert within each.
///
/// # Shapes
///
/// - `counts`: `[ranks · num_experts]`, rows that each rank sends to each expert of the layer
/// - `experts`: those whose rows arrive here, which are `arriving` together; one if there are none
/// - output: the place of every row that arrives `[arriving]`, the row at every place `[arriving]`
///
/// # Panics
///
/// If there are not so many experts.
pub fn arrival_order(
    counts: Tensor<1, Int>,
    num_experts: usize,
    experts: Range<usize>,
    arriving: usize,
) -> (Tensor<1, Int>, Tensor<1, Int>) {
    assert!(experts.end <= num_experts, "experts {experts:?} of {num_experts}");
    let counts = counts.into_dispatch();
    let (places, rows) = Dispatch::arrival_order(counts, num_experts, experts, arriving);
    (Tensor::from_dispatch(places), Tensor::from_dispatch(rows))
}

/// Rows of `source` in a new order, each `copies` times over all.
///
/// `inverse` lists, for source row `i`, the `copies` output rows that hold it; with it the
/// gradient is again a gather (and a sum over the copies), not a scatter.
///
/// # Shapes
///
/// - `source`: `[num_rows, d]`
/// - `rows`: `[num_rows · copies]`, source row of every output row
/// - `inverse`: `[num_rows · copies]`, output rows of source row 0, then of row 1, …
/// - output: `[num_rows · copies, d]`
pub fn gather_rows(
    source: Tensor<2>,
    rows: Tensor<1, Int>,
    inverse: Tensor<1, Int>,
    copies: usize,
) -> Tensor<2> {
    let (rows, inverse) = (rows.into_dispatch(), inverse.into_dispatch());
    Tensor::from_dispatch(Dispatch::gather_rows(source.into_dispatch(), rows, inverse, copies))
}

/// One matrix product per group of rows, each with its own weight: the experts' product.
///
/// Row `i` of `rows` belongs to the group that `rows_per_group` says; groups follow each
/// other and may be empty. The cost follows the rows: nothing is padded to the busiest group.
///
/// # Shapes
///
/// - `rows`: `[num_rows, d_in]`, sorted by group
/// - `weight`: `[groups, d_in, d_out]`
/// - output: `[num_rows, d_out]`
///
/// # Panics
///
/// If the shapes do not fit, or `rows_per_group` does not sum to `num_rows`.
pub fn grouped_matmul(rows: Tensor<2>, weight: Tensor<3>, rows_per_group: &[usize]) -> Tensor<2> {
    let ([num_rows, d_in], [groups, weight_in, _]) = (rows.dims(), weight.dims());
    assert_eq!(d_in, weight_in, "rows of width {d_in} against weights of {weight_in} rows");
    assert_eq!(rows_per_group.len(), groups, "one row count for each of {groups} groups");
    assert_eq!(rows_per_group.iter().sum::<usize>(), num_rows, "row counts sum to the rows");
    let (rows, weight) = (rows.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::grouped_matmul(rows, weight, rows_per_group.to_vec()))
}

/// SwiGLU: `silu(gate) ⊙ up` of `[gate | up]` side by side.
///
/// # Shapes
///
/// - `gate_up`: `[num_rows, 2 · d]`
/// - output: `[num_rows, d]`
pub fn swiglu(gate_up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::swiglu(gate_up.into_dispatch()))
}

/// Adds up the rows of each token by weight: `y_t = Σ_j w_tj · rows[row_of_pair[t · top_k + j]]`.
///
/// # Shapes
///
/// - `rows`: `[tokens · top_k, d]` in any order
/// - `weights`: `[tokens, top_k]`
/// - `row_of_pair`: `[tokens · top_k]`, where the row of each (token, choice) pair is
/// - `pair_of_row`: `[tokens · top_k]`, its inverse
/// - output: `[tokens, d]`
pub fn combine_rows(
    rows: Tensor<2>,
    weights: Tensor<2>,
    row_of_pair: Tensor<1, Int>,
    pair_of_row: Tensor<1, Int>,
) -> Tensor<2> {
    let (rows, weights) = (rows.into_dispatch(), weights.into_dispatch());
    let (row_of_pair, pair_of_row) = (row_of_pair.into_dispatch(), pair_of_row.into_dispatch());
    Tensor::from_dispatch(Dispatch::combine_rows(rows, weights, row_of_pair, pair_of_row))
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{
        Backend, TensorMetadata, get_or_init_device_settings,
        tensor::{FloatTensor, IntTensor},
    };
    use burn::tensor::{FloatDType, IndexingUpdateOp, Shape, Slice, TensorData, read_sync};
    use std::ops::Range;

    use crate::ops::parts::part;

    /// See [`dispatch_order`](super::dispatch_order): a counting sort in tensor operations,
    /// nothing is sorted.
    pub fn dispatch_order<B: Backend>(
        experts: IntTensor<B>,
        num_experts: usize,
    ) -> (IntTensor<B>, IntTensor<B>, IntTensor<B>) {
        let ([tokens, top_k], device) = (experts.shape().dims(), experts.device());
        let settings = get_or_init_device_settings::<B>(&device);
        let (pairs, dtype) = (tokens * top_k, experts.dtype());
        let arange = |end: usize| {
            B::int_cast(B::int_arange(0..end as i64, &device, settings.int_dtype), dtype.into())
        };
        let flat = |x: IntTensor<B>, size: usize| B::int_reshape(x, Shape::from([size]));
        let expert_of_pair = B::int_reshape(experts, Shape::from([pairs, 1]));
        let wide = Shape::from([pairs, num_experts]);
        let columns = B::int_expand(
            B::int_reshape(arange(num_experts), Shape::from([1, num_experts])),
            wide.clone(),
        );
        let own = B::int_expand(expert_of_pair.clone(), wide);
        let visits =
            B::bool_into_int(B::int_equal(own, columns, settings.bool_dtype), settings.int_dtype);
        // Earlier pairs of the same expert, plus all pairs of earlier experts.
        let earlier =
            B::int_sum_dim(B::int_mul(B::int_cumsum(visits.clone(), 0), visits.clone()), 1);
        let earlier = B::int_sub_scalar(flat(earlier, pairs), 1.into());
        let counts = flat(B::int_sum_dim(visits, 0), num_experts);
        let starts = B::int_sub(B::int_cumsum(counts.clone(), 0), counts.clone());
        let starts = B::int_gather(0, starts, flat(expert_of_pair, pairs));
        let row_of_pair = B::int_add(earlier, starts);
        let nothing = B::int_zeros(Shape::from([pairs]), &device, settings.int_dtype);
        let pair_of_row =
            B::int_scatter(0, nothing, row_of_pair.clone(), arange(pairs), IndexingUpdateOp::Add);
        (row_of_pair, pair_of_row, counts)
    }

    /// See [`arrival_order`](super::arrival_order): on the host.
    ///
    /// # Panics
    ///
    /// If the device fails.
    pub fn arrival_order<B: Backend>(
        counts: IntTensor<B>,
        num_experts: usize,
        experts: Range<usize>,
        arriving: usize,
    ) -> (IntTensor<B>, IntTensor<B>) {
        let (dtype, device) = (counts.dtype(), counts.device());
        let data = read_sync(B::int_into_data(counts));
        let data = data.unwrap_or_else(|error| panic!("the device failed: {error}"));
        let counts: Vec<i64> = data.convert::<i64>().iter::<i64>().collect();
        let ranks: Vec<&[i64]> =
            counts.chunks(num_experts).map(|counts| &counts[experts.clone()]).collect();
        let mut starts = Vec::with_capacity(ranks.len());
        let mut start = 0;
        for counts in &ranks {
            starts.push(start);
            start += counts.iter().sum::<i64>();
        }
        let mut row_at_place = Vec::with_capacity(arriving);
        for expert in 0..experts.len() {
            for (start, counts) in starts.iter_mut().zip(&ranks) {
                row_at_place.extend(*start..*start + counts[expert]);
                *start += counts[expert];
            }
        }
        // A row of zeros stands where nothing arrives.
        row_at_place.resize(arriving, 0);
        let mut place_of_row = vec![0; arriving];
        for (place, &row) in row_at_place.iter().enumerate() {
            place_of_row[row as usize] = place as i64;
        }
        let on_device = |order: Vec<i64>| {
            let data = TensorData::new(order, [arriving]).convert_dtype(dtype);
            B::int_from_data(data, &device)
        };
        (on_device(place_of_row), on_device(row_at_place))
    }

    /// See [`gather_rows`](super::gather_rows).
    pub fn gather_rows<B: Backend>(source: FloatTensor<B>, rows: IntTensor<B>) -> FloatTensor<B> {
        B::float_select(source, 0, rows)
    }

    /// The copies of every source row gathered side by side, and added up.
    pub fn gather_rows_backward<B: Backend>(
        grad: FloatTensor<B>,
        inverse: IntTensor<B>,
        copies: usize,
    ) -> FloatTensor<B> {
        let [rows, width] = grad.shape().dims();
        let gathered = B::float_select(grad, 0, inverse);
        if copies == 1 {
            return gathered;
        }
        let apart = B::float_reshape(gathered, Shape::from([rows / copies, copies, width]));
        B::float_reshape(B::float_sum_dim(apart, 1), Shape::from([rows / copies, width]))
    }

    /// A product per group on its slice of rows; empty groups cost nothing.
    pub fn grouped_matmul<B: Backend>(
        rows: FloatTensor<B>,
        weight: FloatTensor<B>,
        rows_per_group: &[usize],
    ) -> FloatTensor<B> {
        let (d_in, d_out) = (weight.shape()[1], weight.shape()[2]);
        let products: Vec<_> = groups(rows_per_group)
            .map(|(group, range)| {
                let weight =
                    B::float_slice(weight.clone(), &[index(group), Slice::full(), Slice::full()]);
                let weight = B::float_reshape(weight, Shape::from([d_in, d_out]));
                B::float_matmul(B::float_slice(rows.clone(), &[range, Slice::full()]), weight)
            })
            .collect();
        if products.is_empty() {
            let (device, dtype) = (rows.device(), FloatDType::from(rows.dtype()));
            return B::float_zeros(Shape::from([0, d_out]), &device, dtype);
        }
        B::float_cat(products, 0)
    }

    /// `rowsᵀ · grad` of every group, stacked; zero where a group has no rows.
    pub fn grouped_matmul_weight_backward<B: Backend>(
        rows: FloatTensor<B>,
        grad: FloatTensor<B>,
        rows_per_group: &[usize],
    ) -> FloatTensor<B> {
        let (d_in, d_out) = (rows.shape()[1], grad.shape()[1]);
        let (device, dtype) = (rows.device(), FloatDType::from(rows.dtype()));
        let shape = Shape::from([1, d_in, d_out]);
        let mut products = Vec::with_capacity(rows_per_group.len());
        let mut start = 0;
        for &count in rows_per_group {
            if count == 0 {
                products.push(B::float_zeros(shape.clone(), &device, dtype));
                continue;
            }
            let range = [Slice::from(start..start + count), Slice::full()];
            let rows = B::float_transpose(B::float_slice(rows.clone(), &range));
            let product = B::float_matmul(rows, B::float_slice(grad.clone(), &range));
            products.push(B::float_reshape(product, shape.clone()));
            start += count;
        }
        B::float_cat(products, 0)
    }

    /// `silu(gate) ⊙ up`.
    pub fn swiglu<B: Backend>(gate_up: FloatTensor<B>) -> FloatTensor<B> {
        let (gate, up) = halves::<B>(gate_up);
        let sigmoid = B::sigmoid(gate.clone());
        B::float_mul(B::float_mul(gate, sigmoid), up)
    }

    /// With `s = σ(gate)`: `d gate = grad ⊙ up ⊙ s (1 + gate (1 − s))`, `d up = grad ⊙ gate ⊙ s`.
    pub fn swiglu_backward<B: Backend>(
        gate_up: FloatTensor<B>,
        grad: FloatTensor<B>,
    ) -> FloatTensor<B> {
        let (gate, up) = halves::<B>(gate_up);
        let sigmoid = B::sigmoid(gate.clone());
        let silu = B::float_mul(gate.clone(), sigmoid.clone());
        let one_minus = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1.0.into());
        let slope =
            B::float_mul(sigmoid, B::float_add_scalar(B::float_mul(gate, one_minus), 1.0.into()));
        let d_gate = B::float_mul(B::float_mul(grad.clone(), up), slope);
        let d_up = B::float_mul(grad, silu);
        B::float_cat(vec![d_gate, d_up], 1)
    }

    /// The rows of every token side by side, multiplied by their weights, and added up.
    pub fn combine_rows<B: Backend>(
        rows: FloatTensor<B>,
        weights: FloatTensor<B>,
        row_of_pair: IntTensor<B>,
    ) -> FloatTensor<B> {
        let ([_, width], [tokens, top_k]) = (rows.shape().dims(), weights.shape().dims());
        let rows = B::float_reshape(
            B::float_select(rows, 0, row_of_pair),
            Shape::from([tokens, top_k, width]),
        );
        let weights = B::float_reshape(weights, Shape::from([tokens, top_k, 1]));
        let sum = B::float_sum_dim(B::float_mul(rows, weights), 1);
        B::float_reshape(sum, Shape::from([tokens, width]))
    }

    /// `d rows[r] = w_tj · grad_t` for the pair in row `r`, `d w_tj = rows[row_of_pair] · grad_t`.
    pub fn combine_rows_backward<B: Backend>(
        rows: FloatTensor<B>,
        weights: FloatTensor<B>,
        row_of_pair: IntTensor<B>,
        pair_of_row: IntTensor<B>,
        grad: FloatTensor<B>,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let ([pairs, width], [tokens, top_k]) = (rows.shape().dims(), weights.shape().dims());
        let by_pair = Shape::from([tokens, top_k, width]);
        let rows = B::float_reshape(B::float_select(rows, 0, row_of_pair), by_pair);
        let grad = B::float_reshape(grad, Shape::from([tokens, 1, width]));
        let d_weights = B::float_sum_dim(B::float_mul(rows, grad.clone()), 2);
        let d_pairs =
            B::float_mul(B::float_reshape(weights, Shape::from([tokens, top_k, 1])), grad);
        let d_rows =
            B::float_select(B::float_reshape(d_pairs, Shape::from([pairs, width])), 0, pair_of_row);
        (d_rows, B::float_reshape(d_weights, Shape::from([tokens, top_k])))
    }

    /// Index and row range of every group that has rows.
    fn groups(rows_per_group: &[usize]) -> impl Iterator<Item = (usize, Slice)> + '_ {
        let starts = rows_per_group.iter().scan(0, |start, &count| {
            *start += count;
            Some((*start - count)..*start)
        });
        starts
            .enumerate()
            .filter(|(_, range)| !range.is_empty())
            .map(|(group, range)| (group, Slice::from(range)))
    }

    fn index(group: usize) -> Slice {
        Slice::from(group..group + 1)
    }

    fn halves<B: Backend>(gate_up: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
        let width = gate_up.shape()[1];
        (part::<B>(gate_up.clone(), 1, 0..width / 2), part::<B>(gate_up, 1, width / 2..width))
    }
}

step!(GatherRows, 1, kept 0, (IntTensor<B>, usize), |[], (inverse, copies), grad| {
    [B::gather_rows_backward(grad, inverse, copies)]
});

step!(GroupedMatmul, 2, kept 2, Vec<usize>, |[rows, weight], counts, grad| {
    let transposed = B::float_swap_dims(weight, 1, 2);
    let d_rows = B::grouped_matmul(grad.clone(), transposed, counts.clone());
    [d_rows, B::grouped_matmul_weight_backward(rows, grad, counts)]
});

step!(Swiglu, 1, kept 1, (), |[gate_up], (), grad| [B::swiglu_backward(gate_up, grad)]);

step!(
    CombineRows, 2, kept 2, [IntTensor<B>; 2],
    |[rows, weights], [row_of_pair, pair_of_row], grad| {
        B::combine_rows_backward(rows, weights, row_of_pair, pair_of_row, grad).into()
    }
);
