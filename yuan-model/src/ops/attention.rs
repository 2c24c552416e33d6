//! Causal attention: over rows, over packed rows, over a cache.

use burn::backend::{
    Dispatch, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Device, Int, Tensor};

use super::YuanOps;

/// `softmax(q kᵀ / sqrt(d)) v` where position `i` sees positions `j ≤ i`, in a packed row those of
/// its document only: `first_keys[i] ≤ j`.
///
/// The scores are formed again for the gradient instead of being kept.
///
/// # Shapes
///
/// - `query`, `key`, `value`, output: `[batch, heads, seq, d]`
/// - `first_keys`: `[batch, seq]`, where each position's document starts; it never falls along a
///   row
pub fn causal_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    first_keys: Option<Tensor<2, Int>>,
) -> Tensor<4> {
    let first_keys = or_unpacked(first_keys, &query.device()).into_dispatch();
    let (query, key, value) = (query.into_dispatch(), key.into_dispatch(), value.into_dispatch());
    Tensor::from_dispatch(Dispatch::causal_attention(query, key, value, first_keys).0)
}

/// [`causal_attention`] of queries and keys that come side by side and are [rotated](super::rotate)
/// first.
///
/// # Shapes
///
/// - `query_key`: `[batch, seq, heads, 2 · head_dim]`, in every head the query and then the key
/// - `value`, output: `[batch, seq, heads, head_dim]`
/// - `cos`, `sin`: `[batch or 1, seq, 1, pairs]`; they carry no gradient
/// - `first_keys`: `[batch, seq]`, see [`causal_attention`]
pub fn rotary_attention(
    query_key: Tensor<4>,
    value: Tensor<4>,
    cos: Tensor<4>,
    sin: Tensor<4>,
    first_keys: Option<Tensor<2, Int>>,
) -> Tensor<4> {
    let first_keys = or_unpacked(first_keys, &value.device()).into_dispatch();
    let (query_key, value) = (query_key.into_dispatch(), value.into_dispatch());
    let (cos, sin) = (cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::rotary_attention(query_key, value, cos, sin, first_keys))
}

/// Attention of the newest tokens over a cache: queries `length − num_queries ..` of every row see
/// the keys `first_key ..` up to themselves. What comes before a row's first key is padding; a
/// query there sees itself.
///
/// It has no gradient.
///
/// # Shapes
///
/// - `query`, output: `[batch, heads, num_queries, d]`
/// - `key`, `value`: `[batch, heads, capacity, d]`, of which the first `length` are filled
/// - `first_keys`: `[batch]`
///
/// # Panics
///
/// If the cache is shorter than `length`, that than the queries, or `first_keys` does not fit the
/// batch.
pub fn cached_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    length: usize,
    first_keys: &[usize],
) -> Tensor<4> {
    let ([batch, _, num_queries, _], [_, _, capacity, _]) = (query.dims(), key.dims());
    assert!(
        num_queries <= length && length <= capacity,
        "{num_queries} queries, {length} keys of {capacity}"
    );
    assert_eq!(first_keys.len(), batch, "a first key for every row");
    let (query, key, value) = (query.into_dispatch(), key.into_dispatch(), value.into_dispatch());
    Tensor::from_dispatch(Dispatch::cached_attention(
        query,
        key,
        value,
        length,
        first_keys.to_vec(),
    ))
}

/// An operation of a backend cannot leave a tensor out: `[1, 1]` stands for rows of one document.
fn or_unpacked(first_keys: Option<Tensor<2, Int>>, device: &Device) -> Tensor<2, Int> {
    first_keys.unwrap_or_else(|| Tensor::zeros([1, 1], device))
}

/// The first keys that [`causal_attention`] was given; to a row of one position it is all the same.
pub(super) fn packed<T: TensorMetadata>(first_keys: T) -> Option<T> {
    (first_keys.shape()[..] != [1, 1]).then_some(first_keys)
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{
        Backend, TensorMetadata, get_or_init_device_settings,
        tensor::{BoolTensor, FloatTensor, IntTensor},
    };
    use burn::tensor::{FloatDType, Shape, Slice, TensorData};

    /// See [`causal_attention`](super::causal_attention); the softmax is in f32 whatever the type.
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

    /// Gradients of [`causal_attention`](super::causal_attention): the scores are formed again.
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
        let p = causal_probabilities::<B>(query.clone(), key.clone(), first_keys);
        gradients_of::<B>(p, query, key, value, grad)
    }

    /// `q kᵀ / sqrt(d)` in f32.
    pub(in crate::ops) fn scaled_scores<B: Backend>(
        query: FloatTensor<B>,
        key: FloatTensor<B>,
    ) -> FloatTensor<B> {
        let width = query.shape()[3] as f64;
        let scores = B::float_matmul(query, B::float_transpose(key));
        B::float_mul_scalar(B::float_cast(scores, FloatDType::F32), (1.0 / width.sqrt()).into())
    }

    /// Gradients for queries, keys and values from the probabilities and the output's gradient.
    pub(in crate::ops) fn gradients_of<B: Backend>(
        p: FloatTensor<B>,
        query: FloatTensor<B>,
        key: FloatTensor<B>,
        value: FloatTensor<B>,
        grad: FloatTensor<B>,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
        let (scale, dtype) = (1.0 / (query.shape()[3] as f64).sqrt(), query.dtype().into());
        let d_value =
            B::float_matmul(B::float_transpose(B::float_cast(p.clone(), dtype)), grad.clone());
        let d_p = B::float_cast(B::float_matmul(grad, B::float_transpose(value)), FloatDType::F32);
        let along = B::float_sum_dim(B::float_mul(d_p.clone(), p.clone()), 3);
        let d_scores = B::float_mul_scalar(B::float_mul(p, B::float_sub(d_p, along)), scale.into());
        let d_scores = B::float_cast(d_scores, dtype);
        let d_query = B::float_matmul(d_scores.clone(), key);
        (d_query, B::float_matmul(B::float_transpose(d_scores), query), d_value)
    }

    /// See [`cached_attention`](super::cached_attention).
    pub fn cached_attention<B: Backend>(
        query: FloatTensor<B>,
        key: FloatTensor<B>,
        value: FloatTensor<B>,
        length: usize,
        first_keys: &[usize],
    ) -> FloatTensor<B> {
        let queries = query.shape()[2];
        let filled = |x: FloatTensor<B>| {
            B::float_slice(
                x,
                &[Slice::full(), Slice::full(), Slice::from(0..length), Slice::full()],
            )
        };
        let dtype = value.dtype().into();
        let scores = scaled_scores::<B>(query, filled(key));
        let scores = if queries == 1 && first_keys.iter().all(|&first| first == 0) {
            scores
        } else {
            let mask = unseen::<B>(&scores, first_keys);
            B::float_mask_fill(scores, mask, f32::NEG_INFINITY.into())
        };
        B::float_matmul(B::float_cast(softmax::<B>(scores), dtype), filled(value))
    }

    /// Softmax of the scaled scores in f32, zero in the future and before the first key.
    fn causal_probabilities<B: Backend>(
        query: FloatTensor<B>,
        key: FloatTensor<B>,
        first_keys: Option<IntTensor<B>>,
    ) -> FloatTensor<B> {
        let [batch, heads, seq, _] = query.shape().dims();
        let scores = scaled_scores::<B>(query, key);
        let hidden = future::<B>(&scores);
        let hidden = match first_keys {
            Some(first) => B::bool_or(hidden, before::<B>(first, [batch, heads, seq])),
            None => hidden,
        };
        softmax::<B>(B::float_mask_fill(scores, hidden, f32::NEG_INFINITY.into()))
    }

    pub(in crate::ops) fn softmax<B: Backend>(scores: FloatTensor<B>) -> FloatTensor<B> {
        let shifted = B::float_sub(scores.clone(), B::float_max_dim(scores, 3));
        let exponentials = B::float_exp(shifted);
        B::float_div(exponentials.clone(), B::float_sum_dim(exponentials, 3))
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

    /// True where the key comes before the query's first one: `[batch, seq]` → `[batch, heads, seq,
    /// seq]`.
    fn before<B: Backend>(
        first_keys: IntTensor<B>,
        [batch, heads, seq]: [usize; 3],
    ) -> BoolTensor<B> {
        let device = first_keys.device();
        let settings = get_or_init_device_settings::<B>(&device);
        let wide = Shape::from([batch, 1, seq, seq]);
        let keys = B::int_arange(0..seq as i64, &device, settings.int_dtype);
        let keys = B::int_expand(B::int_reshape(keys, Shape::from([1, 1, 1, seq])), wide.clone());
        let first =
            B::int_expand(B::int_reshape(first_keys, Shape::from([batch, 1, seq, 1])), wide);
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
        let first =
            TensorData::new(first, [batch, 1, 1, 1]).convert_dtype(settings.int_dtype.into());
        let first = B::int_expand(
            B::int_from_data(first, &device),
            Shape::from([batch, 1, queries, length]),
        );
        let future = B::int_lower(query.clone(), key.clone(), settings.bool_dtype);
        let padding = B::int_lower(key.clone(), first, settings.bool_dtype);
        let others = B::int_not_equal(key, query, settings.bool_dtype);
        let mask = B::bool_or(future, B::bool_and(padding, others));
        B::bool_expand(mask, shape)
    }
}

/// What attention keeps beside its inputs: first keys, output, logarithms of the sums.
type SavedAttention<B> = (IntTensor<B>, FloatTensor<B>, FloatTensor<B>);

/// Rotated queries and keys, cosines, sines, output and logarithms of the sums; first keys.
type SavedRotaryAttention<B> = ([FloatTensor<B>; 6], IntTensor<B>);

step!(
    CausalAttention, 3, kept 3, SavedAttention<B>,
    |[query, key, value], (first_keys, output, log_sums), grad| {
        B::causal_attention_backward(query, key, value, first_keys, output, log_sums, grad).into()
    }
);

step!(RotaryAttention, 2, kept 1, SavedRotaryAttention<B>, |[value], (saved, first_keys), grad| {
    let [q, k, cos, sin, output, log_sums] = saved;
    let [v, grad] = [value, grad].map(|x| B::float_swap_dims(x, 1, 2));
    let (d_q, d_k, d_v) = B::causal_attention_backward(q, k, v, first_keys, output, log_sums, grad);
    let [d_q, d_k, d_v] = [d_q, d_k, d_v].map(|x| B::float_swap_dims(x, 1, 2));
    [B::rotate_pair(d_q, d_k, cos, B::float_neg(sin)), d_v]
});
