//! Every operation in terms of Burn's own: what the fast versions are tested against.

use std::ops::Range;

use burn::backend::{
    Backend, TensorMetadata, get_or_init_device_settings,
    tensor::{BoolTensor, FloatTensor, IntTensor},
};
use burn::tensor::{FloatDType, IndexingUpdateOp, Shape, Slice, TensorData};

use super::{AdamWStep, YuanOps};

/// See [`ops::transfer`](super::transfer).
pub fn transfer<B: Backend>(x: FloatTensor<B>, to: IntTensor<B>) -> FloatTensor<B> {
    B::float_to_device(x, &to.device())
}

/// See [`ops::transfer_int`](super::transfer_int).
pub fn transfer_int<B: Backend>(x: IntTensor<B>, to: IntTensor<B>) -> IntTensor<B> {
    B::int_to_device(x, &to.device())
}

/// See [`ops::dense`](super::dense).
pub fn dense<B: Backend>(rows: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(rows, weight)
}

/// `rowsᵀ · grad`.
pub fn dense_weight_backward<B: Backend>(
    rows: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    B::float_matmul(B::float_transpose(rows), grad)
}

/// See [`ops::embed`](super::embed).
pub fn embed<B: Backend>(
    weight: FloatTensor<B>,
    ids: IntTensor<B>,
    dtype: FloatDType,
) -> FloatTensor<B> {
    B::float_cast(B::float_select(weight, 0, ids), dtype)
}

/// Every row's gradient added to its place in the table.
pub fn embed_backward<B: Backend>(
    grad: FloatTensor<B>,
    ids: IntTensor<B>,
    vocab: usize,
) -> FloatTensor<B> {
    let grad = B::float_cast(grad, FloatDType::F32);
    let table = zeros_like::<B>(&grad, Shape::from([vocab, grad.shape()[1]]));
    B::float_select_assign(table, 0, ids, grad, IndexingUpdateOp::Add)
}

/// See [`ops::gather_rows`](super::gather_rows).
pub fn gather_rows<B: Backend>(source: FloatTensor<B>, rows: IntTensor<B>) -> FloatTensor<B> {
    B::float_select(source, 0, rows)
}

/// See [`ops::dispatch_order`](super::dispatch_order): a counting sort in tensor operations,
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
    let earlier = B::int_sum_dim(B::int_mul(B::int_cumsum(visits.clone(), 0), visits.clone()), 1);
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
    let d_pairs = B::float_mul(B::float_reshape(weights, Shape::from([tokens, top_k, 1])), grad);
    let d_rows =
        B::float_select(B::float_reshape(d_pairs, Shape::from([pairs, width])), 0, pair_of_row);
    (d_rows, B::float_reshape(d_weights, Shape::from([tokens, top_k])))
}

/// The normalised rows in f32, and `1 / sqrt(mean(x²) + ε)` of each.
fn normalised<B: Backend>(x: FloatTensor<B>, epsilon: f64) -> (FloatTensor<B>, FloatTensor<B>) {
    let x = B::float_cast(x, FloatDType::F32);
    let mean_square = B::float_mean_dim(B::float_mul(x.clone(), x.clone()), 1);
    let inverse = B::float_recip(B::float_sqrt(B::float_add_scalar(mean_square, epsilon.into())));
    (B::float_mul(x, inverse.clone()), inverse)
}

/// See [`ops::rms_norm`](super::rms_norm).
pub fn rms_norm<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    epsilon: f64,
) -> FloatTensor<B> {
    let (width, dtype) = (weight.shape()[0], x.dtype());
    let weight = B::float_reshape(weight, Shape::from([1, width]));
    B::float_cast(B::float_mul(normalised::<B>(x, epsilon).0, weight), dtype.into())
}

/// With `n` the normalised row, `r` its inverse root and `g = grad ⊙ weight`:
/// `d x = r (g − n mean(g ⊙ n))`, `d weight = Σ grad ⊙ n`.
pub fn rms_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    epsilon: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (width, dtype) = (weight.shape()[0], x.dtype());
    let (normed, inverse) = normalised::<B>(x, epsilon);
    let grad = B::float_cast(grad, FloatDType::F32);
    let d_weight = B::float_sum_dim(B::float_mul(grad.clone(), normed.clone()), 0);
    let scaled = B::float_mul(grad, B::float_reshape(weight, Shape::from([1, width])));
    let along = B::float_mean_dim(B::float_mul(scaled.clone(), normed.clone()), 1);
    let d_x = B::float_mul(B::float_sub(scaled, B::float_mul(normed, along)), inverse);
    (B::float_cast(d_x, dtype.into()), B::float_reshape(d_weight, Shape::from([width])))
}

/// See [`ops::add_previous`](super::add_previous).
pub fn add_previous<B: Backend>(taps: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, seq, width] = taps.shape().dims();
    let (previous, current) =
        (part::<B>(taps.clone(), 2, 0..width / 2), part::<B>(taps, 2, width / 2..width));
    if seq == 1 {
        return current; // CubeCL cannot join with an empty part
    }
    let nothing = zeros_like::<B>(&current, Shape::from([batch, 1, width / 2]));
    let shifted = B::float_cat(vec![nothing, part::<B>(previous, 1, 0..seq - 1)], 1);
    B::float_add(current, shifted)
}

/// The current token's tap gets the gradient as it is, the previous one's that of the next token.
pub fn add_previous_backward<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, seq, width] = grad.shape().dims();
    let nothing = zeros_like::<B>(&grad, Shape::from([batch, 1, width]));
    if seq == 1 {
        return B::float_cat(vec![nothing, grad], 2);
    }
    let shifted = B::float_cat(vec![part::<B>(grad.clone(), 1, 1..seq), nothing], 1);
    B::float_cat(vec![shifted, grad], 2)
}

/// See [`ops::rotate`](super::rotate).
pub fn rotate<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
) -> FloatTensor<B> {
    let (pairs, width) = (cos.shape()[3], x.shape()[3]);
    let (first, second) =
        (part::<B>(x.clone(), 3, 0..pairs), part::<B>(x.clone(), 3, pairs..2 * pairs));
    let product = |a: &FloatTensor<B>, b: &FloatTensor<B>| B::float_mul(a.clone(), b.clone());
    let mut parts = vec![
        B::float_sub(product(&first, &cos), product(&second, &sin)),
        B::float_add(product(&second, &cos), product(&first, &sin)),
    ];
    if 2 * pairs < width {
        parts.push(part::<B>(x, 3, 2 * pairs..width));
    }
    B::float_cat(parts, 3)
}

/// Both [rotated](super::rotate), side by side in every head.
pub fn rotate_pair<B: YuanOps>(
    first: FloatTensor<B>,
    second: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
) -> FloatTensor<B> {
    B::float_cat(vec![B::rotate(first, cos.clone(), sin.clone()), B::rotate(second, cos, sin)], 3)
}

/// Queries and keys taken apart and rotated, and values, all `[batch, heads, seq, head_dim]`.
pub(super) fn rotated_heads<B: YuanOps>(
    query_key: FloatTensor<B>,
    value: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
) -> [FloatTensor<B>; 3] {
    let width = value.shape()[3];
    let half = |range| part::<B>(query_key.clone(), 3, range);
    let query = B::rotate(half(0..width), cos.clone(), sin.clone());
    let key = B::rotate(half(width..2 * width), cos, sin);
    [query, key, value].map(|x| B::float_swap_dims(x, 1, 2))
}

/// See [`ops::causal_attention`](super::causal_attention); the softmax is in f32 whatever the type.
///
/// Not Burn's own: on CUDA its choice among kernels has been seen to try them for minutes.
pub fn causal_attention<B: Backend>(
    query: FloatTensor<B>,
    key: FloatTensor<B>,
    value: FloatTensor<B>,
    first_keys: Option<IntTensor<B>>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let nothing = B::float_zeros(Shape::from([1]), &query.device(), FloatDType::F32);
    let dtype = value.dtype().into();
    let probabilities = causal_probabilities::<B>(query, key, first_keys);
    (B::float_matmul(B::float_cast(probabilities, dtype), value), nothing)
}

/// Softmax of the scaled scores in f32, zero in the future and before the first key.
fn causal_probabilities<B: Backend>(
    query: FloatTensor<B>,
    key: FloatTensor<B>,
    first_keys: Option<IntTensor<B>>,
) -> FloatTensor<B> {
    let [batch, heads, seq, width] = query.shape().dims();
    let scores = B::float_cast(B::float_matmul(query, B::float_transpose(key)), FloatDType::F32);
    let scores = B::float_mul_scalar(scores, (1.0 / (width as f64).sqrt()).into());
    let hidden = future::<B>(&scores);
    let hidden = match first_keys {
        Some(first) => B::bool_or(hidden, before::<B>(first, [batch, heads, seq])),
        None => hidden,
    };
    softmax::<B>(B::float_mask_fill(scores, hidden, f32::NEG_INFINITY.into()))
}

/// True where the key comes before the query's first one: `[batch, seq]` → `[batch, heads, seq,
/// seq]`.
fn before<B: Backend>(first_keys: IntTensor<B>, [batch, heads, seq]: [usize; 3]) -> BoolTensor<B> {
    let device = first_keys.device();
    let settings = get_or_init_device_settings::<B>(&device);
    let wide = Shape::from([batch, 1, seq, seq]);
    let keys = B::int_arange(0..seq as i64, &device, settings.int_dtype);
    let keys = B::int_expand(B::int_reshape(keys, Shape::from([1, 1, 1, seq])), wide.clone());
    let first = B::int_expand(B::int_reshape(first_keys, Shape::from([batch, 1, seq, 1])), wide);
    let mask = B::int_lower(keys, first, settings.bool_dtype);
    B::bool_expand(mask, Shape::from([batch, heads, seq, seq]))
}

/// True where a key comes after its query, or before the first key of its row and is not the
/// query's own; `scores` are `[batch, heads, queries, length]` of the last queries.
fn unseen<B: Backend>(scores: &FloatTensor<B>, first_keys: &[usize]) -> BoolTensor<B> {
    let (shape, device) = (scores.shape(), scores.device());
    let settings = get_or_init_device_settings::<B>(&device);
    let [batch, queries, length] = [shape[0], shape[2], shape[3]];
    let all = |values: std::ops::Range<usize>, shape: [usize; 4]| {
        let places =
            B::int_arange(values.start as i64..values.end as i64, &device, settings.int_dtype);
        B::int_expand(
            B::int_reshape(places, Shape::from(shape)),
            Shape::from([batch, 1, queries, length]),
        )
    };
    let query = all(length - queries..length, [1, 1, queries, 1]);
    let key = all(0..length, [1, 1, 1, length]);
    let first: Vec<i64> = first_keys.iter().map(|&first| first as i64).collect();
    let first = TensorData::new(first, [batch, 1, 1, 1]).convert_dtype(settings.int_dtype.into());
    let first =
        B::int_expand(B::int_from_data(first, &device), Shape::from([batch, 1, queries, length]));
    let future = B::int_lower(query.clone(), key.clone(), settings.bool_dtype);
    let padding = B::int_lower(key.clone(), first, settings.bool_dtype);
    let others = B::int_not_equal(key, query, settings.bool_dtype);
    let mask = B::bool_or(future, B::bool_and(padding, others));
    B::bool_expand(mask, shape)
}

fn softmax<B: Backend>(scores: FloatTensor<B>) -> FloatTensor<B> {
    let shifted = B::float_sub(scores.clone(), B::float_max_dim(scores, 3));
    let exponentials = B::float_exp(shifted);
    B::float_div(exponentials.clone(), B::float_sum_dim(exponentials, 3))
}

/// Gradients of [`ops::causal_attention`](super::causal_attention): the scores are formed again.
///
/// With `p` the probabilities: `d v = pᵀ grad`, `d p = grad vᵀ`,
/// `d s = p ⊙ (d p − Σ_j d p ⊙ p) / sqrt(d)`, `d q = d s k`, `d k = d sᵀ q`.
pub fn causal_attention_backward<B: Backend>(
    query: FloatTensor<B>,
    key: FloatTensor<B>,
    value: FloatTensor<B>,
    first_keys: Option<IntTensor<B>>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (scale, dtype) = (1.0 / (query.shape()[3] as f64).sqrt(), query.dtype().into());
    let p = causal_probabilities::<B>(query.clone(), key.clone(), first_keys);
    let d_value =
        B::float_matmul(B::float_transpose(B::float_cast(p.clone(), dtype)), grad.clone());
    let d_p = B::float_cast(B::float_matmul(grad, B::float_transpose(value)), FloatDType::F32);
    let along = B::float_sum_dim(B::float_mul(d_p.clone(), p.clone()), 3);
    let d_scores = B::float_mul_scalar(B::float_mul(p, B::float_sub(d_p, along)), scale.into());
    let d_scores = B::float_cast(d_scores, dtype);
    let d_query = B::float_matmul(d_scores.clone(), key);
    (d_query, B::float_matmul(B::float_transpose(d_scores), query), d_value)
}

/// True where the key comes after the query.
fn future<B: Backend>(scores: &FloatTensor<B>) -> BoolTensor<B> {
    let (shape, device) = (scores.shape(), scores.device());
    let settings = get_or_init_device_settings::<B>(&device);
    let seq = shape[2];
    let positions = |shape: [usize; 4]| {
        B::int_reshape(
            B::int_arange(0..seq as i64, &device, settings.int_dtype),
            Shape::from(shape),
        )
    };
    let mask =
        B::int_lower(positions([1, 1, seq, 1]), positions([1, 1, 1, seq]), settings.bool_dtype);
    B::bool_expand(mask, shape)
}

/// See [`ops::cached_attention`](super::cached_attention).
pub fn cached_attention<B: Backend>(
    query: FloatTensor<B>,
    key: FloatTensor<B>,
    value: FloatTensor<B>,
    length: usize,
    first_keys: &[usize],
) -> FloatTensor<B> {
    let [_, _, queries, d] = query.shape().dims();
    let filled = |x: FloatTensor<B>| {
        B::float_slice(x, &[Slice::full(), Slice::full(), Slice::from(0..length), Slice::full()])
    };
    let dtype = value.dtype().into();
    let scores =
        B::float_cast(B::float_matmul(query, B::float_transpose(filled(key))), FloatDType::F32);
    let scores = B::float_mul_scalar(scores, (1.0 / (d as f64).sqrt()).into());
    let scores = if queries == 1 && first_keys.iter().all(|&first| first == 0) {
        scores
    } else {
        let mask = unseen::<B>(&scores, first_keys);
        B::float_mask_fill(scores, mask, f32::NEG_INFINITY.into())
    };
    B::float_matmul(B::float_cast(softmax::<B>(scores), dtype), filled(value))
}

/// Logits less the logarithm of the sum of their exponentials: log-probabilities.
fn log_probabilities<B: Backend>(logits: FloatTensor<B>) -> FloatTensor<B> {
    let shifted = B::float_sub(logits.clone(), B::float_max_dim(logits, 1));
    let sum = B::float_sum_dim(B::float_exp(shifted.clone()), 1);
    B::float_sub(shifted, B::float_log(sum))
}

/// See [`ops::cross_entropy`](super::cross_entropy).
pub fn cross_entropy<B: Backend>(logits: FloatTensor<B>, labels: IntTensor<B>) -> FloatTensor<B> {
    let rows = logits.shape()[0];
    let labels = B::int_reshape(labels, Shape::from([rows, 1]));
    let picked = B::float_gather(1, log_probabilities::<B>(logits), labels);
    B::float_neg(B::float_reshape(picked, Shape::from([rows])))
}

/// `grad · (softmax(logits) − onehot(label))`.
pub fn cross_entropy_backward<B: Backend>(
    logits: FloatTensor<B>,
    labels: IntTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let column = Shape::from([logits.shape()[0], 1]);
    let grad = B::float_reshape(grad, column.clone());
    let spread = B::float_mul(B::float_exp(log_probabilities::<B>(logits)), grad.clone());
    B::float_scatter(
        1,
        spread,
        B::int_reshape(labels, column),
        B::float_neg(grad),
        IndexingUpdateOp::Add,
    )
}

/// See [`ops::linear_cross_entropy`](super::linear_cross_entropy).
pub fn linear_cross_entropy<B: YuanOps>(
    rows: FloatTensor<B>,
    weight: FloatTensor<B>,
    labels: IntTensor<B>,
    scale: f64,
    rows_at_once: usize,
) -> FloatTensor<B> {
    let parts = pieces(rows.shape()[0], rows_at_once).map(|piece| {
        let logits = piece_logits::<B>(&rows, &weight, scale, piece.clone());
        B::cross_entropy(logits, int_rows::<B>(&labels, piece))
    });
    B::float_cat(parts.collect(), 0)
}

/// With `g = grad · (softmax(logits) − onehot)`: `d rows = scale · g · weightᵀ`, `d weight = scale
/// · rowsᵀ · g`.
pub fn linear_cross_entropy_backward<B: YuanOps>(
    rows: FloatTensor<B>,
    weight: FloatTensor<B>,
    labels: IntTensor<B>,
    scale: f64,
    rows_at_once: usize,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = rows.dtype().into();
    let transposed = B::float_transpose(weight.clone());
    let (mut d_rows, mut d_weight) = (Vec::new(), None);
    for piece in pieces(rows.shape()[0], rows_at_once) {
        let logits = piece_logits::<B>(&rows, &weight, scale, piece.clone());
        let grad = B::float_slice(grad.clone(), &[Slice::from(piece.clone())]);
        let d_logits =
            B::cross_entropy_backward(logits, int_rows::<B>(&labels, piece.clone()), grad);
        let d_logits = B::float_cast(B::float_mul_scalar(d_logits, scale.into()), dtype);
        let rows = B::float_slice(rows.clone(), &[Slice::from(piece), Slice::full()]);
        let part = B::float_matmul(B::float_transpose(rows), d_logits.clone());
        d_weight = Some(match d_weight {
            None => part,
            Some(sum) => B::float_add(sum, part),
        });
        d_rows.push(B::float_matmul(d_logits, transposed.clone()));
    }
    let d_weight = d_weight.unwrap_or_else(|| B::float_mul_scalar(weight, 0.0.into()));
    (B::float_cat(d_rows, 0), d_weight)
}

fn pieces(rows: usize, at_once: usize) -> impl Iterator<Item = Range<usize>> {
    let at_once = at_once.max(1);
    (0..rows).step_by(at_once).map(move |start| start..(start + at_once).min(rows))
}

/// Logits of some rows, in f32.
fn piece_logits<B: Backend>(
    rows: &FloatTensor<B>,
    weight: &FloatTensor<B>,
    scale: f64,
    piece: Range<usize>,
) -> FloatTensor<B> {
    let rows = B::float_slice(rows.clone(), &[Slice::from(piece), Slice::full()]);
    let logits = B::float_cast(B::float_matmul(rows, weight.clone()), FloatDType::F32);
    if scale == 1.0 { logits } else { B::float_mul_scalar(logits, scale.into()) }
}

fn int_rows<B: Backend>(labels: &IntTensor<B>, piece: Range<usize>) -> IntTensor<B> {
    B::int_slice(labels.clone(), &[Slice::from(piece)])
}

/// See [`ops::sum_of_squares`](super::sum_of_squares).
pub fn sum_of_squares<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_sum(B::float_mul(x.clone(), x))
}

/// AdamW as in Loshchilov and Hutter, "Decoupled Weight Decay Regularization", Algorithm 2.
pub fn adamw_update<B: Backend>(
    param: FloatTensor<B>,
    grad: FloatTensor<B>,
    moment_1: FloatTensor<B>,
    moment_2: FloatTensor<B>,
    step: &AdamWStep,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let scale = |tensor, by: f64| B::float_mul_scalar(tensor, by.into());
    let grad = scale(grad, step.gradient_scale);
    let squared = B::float_mul(grad.clone(), grad.clone());
    let moment_1 = B::float_add(scale(moment_1, step.beta_1), scale(grad, 1.0 - step.beta_1));
    let moment_2 = B::float_add(scale(moment_2, step.beta_2), scale(squared, 1.0 - step.beta_2));
    let [correction_1, correction_2] = step.bias_corrections();
    let root = B::float_sqrt(scale(moment_2.clone(), 1.0 / correction_2));
    let denominator = B::float_add_scalar(root, step.epsilon.into());
    let update =
        B::float_div(scale(moment_1.clone(), step.learning_rate / correction_1), denominator);
    let param = scale(param, 1.0 - step.learning_rate * step.weight_decay);
    (B::float_sub(param, update), moment_1, moment_2)
}

impl AdamWStep {
    /// `1 − β₁ᵗ` and `1 − β₂ᵗ`.
    pub(crate) fn bias_corrections(&self) -> [f64; 2] {
        [self.beta_1, self.beta_2].map(|beta| 1.0 - beta.powf(self.step as f64))
    }
}

fn halves<B: Backend>(gate_up: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let width = gate_up.shape()[1];
    (part::<B>(gate_up.clone(), 1, 0..width / 2), part::<B>(gate_up, 1, width / 2..width))
}

/// A range along one axis.
fn part<B: Backend>(
    tensor: FloatTensor<B>,
    axis: usize,
    range: std::ops::Range<usize>,
) -> FloatTensor<B> {
    let mut slices = vec![Slice::full(); tensor.shape().num_dims()];
    slices[axis] = Slice::from(range);
    B::float_slice(tensor, &slices)
}

fn zeros_like<B: Backend>(tensor: &FloatTensor<B>, shape: Shape) -> FloatTensor<B> {
    B::float_zeros(shape, &tensor.device(), FloatDType::from(tensor.dtype()))
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
