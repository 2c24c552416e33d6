//! Causal attention whose queries and keys see a filtered input.

use burn::{
    module::{Initializer, Module},
    nn::{Dropout, DropoutConfig, Linear, LinearConfig},
    tensor::{
        Bool, Device, FloatDType, Int, Tensor, activation::softmax, module::attention,
        ops::AttentionModuleOptions,
    },
};

use crate::{
    YuanConfig,
    cache::{LayerCache, Span},
    filter::LocalizedFilter,
    ops,
    rope::Rotary,
};

/// Self-attention of one layer: values from the normed input, queries and keys from its filtered form.
#[derive(Module, Debug)]
pub struct Attention {
    /// Localized filtering; absent when `use_lf_gate` is off.
    pub filter: Option<LocalizedFilter>,
    /// H → 2P; the output holds, head by head, the query and then the key.
    pub query_key: Linear,
    /// H → P.
    pub value: Linear,
    /// P → H.
    pub output: Linear,
    dropout: Dropout,
    num_heads: usize,
}

/// Queries, keys and values of one layer, each `[batch, seq, heads, head_dim]`.
#[derive(Debug, Clone)]
pub struct QueryKeyValue {
    /// Rotated queries.
    pub query: Tensor<4>,
    /// Rotated keys.
    pub key: Tensor<4>,
    /// Values.
    pub value: Tensor<4>,
}

impl Attention {
    /// The attention of one layer; the output projection starts smaller by `sqrt(2L)`.
    pub fn new(config: &YuanConfig, device: &Device) -> Self {
        let (hidden, projection) = (config.hidden_size, config.attention_projection_size);
        let linear = |d_in, d_out, std| {
            let initializer = Initializer::Normal { mean: 0.0, std };
            LinearConfig::new(d_in, d_out).with_bias(false).with_initializer(initializer).init(device)
        };
        Self {
            filter: config.use_lf_gate.then(|| LocalizedFilter::new(config, device)),
            query_key: linear(hidden, 2 * projection, config.initializer_range),
            value: linear(hidden, projection, config.initializer_range),
            output: linear(projection, hidden, config.output_initializer_range()),
            dropout: DropoutConfig::new(config.attention_dropout).init(),
            num_heads: config.num_attention_heads,
        }
    }

    /// `[batch, seq, hidden]` → `[batch, seq, hidden]`; `hidden` is the input's normed form.
    pub fn forward(&self, u: Tensor<3>, rotary: &Rotary, documents: Option<&DocumentMask>) -> Tensor<3> {
        let qkv = self.query_key_value(u, rotary);
        let context = self.attend(qkv, documents);
        project(&self.output, context)
    }

    /// The same for the tokens after those in the cache, which they join; see
    /// [`LocalizedFilter`] for `real`.
    pub(crate) fn forward_cached(
        &self,
        u: Tensor<3>,
        rotary: &Rotary,
        cache: &mut LayerCache,
        span: &Span<'_>,
        real: Option<&Tensor<3>>,
    ) -> Tensor<3> {
        let filtered = match &self.filter {
            Some(filter) => filter.forward_cached(u.clone(), &mut cache.filter, real),
            None => u.clone(),
        };
        let QueryKeyValue { query, key, value } = self.split_heads(filtered, u, rotary);
        let [batch, seq, heads, head_dim] = query.dims();
        let [query, key, value] = [query, key, value].map(|x| x.swap_dims(1, 2));
        let context = cache.attend(query, key, value, span);
        project(&self.output, context.swap_dims(1, 2).reshape([batch, seq, heads * head_dim]))
    }

    /// Projects to queries and keys (rotated) and values.
    pub fn query_key_value(&self, u: Tensor<3>, rotary: &Rotary) -> QueryKeyValue {
        let filtered = match &self.filter {
            Some(filter) => filter.forward(u.clone()),
            None => u.clone(),
        };
        self.split_heads(filtered, u, rotary)
    }

    fn split_heads(&self, filtered: Tensor<3>, u: Tensor<3>, rotary: &Rotary) -> QueryKeyValue {
        let [batch, seq, _] = u.dims();
        let query_key = project(&self.query_key, filtered);
        let head_dim = query_key.dims()[2] / (2 * self.num_heads);
        let query_key = query_key.reshape([batch, seq, self.num_heads, 2 * head_dim]);
        let query = query_key.clone().slice_dim(3, 0..head_dim);
        let key = query_key.slice_dim(3, head_dim..2 * head_dim);
        let value = project(&self.value, u).reshape([batch, seq, self.num_heads, head_dim]);
        QueryKeyValue { query: rotary.rotate(query), key: rotary.rotate(key), value }
    }

    /// Causal softmax attention, heads joined: `[batch, seq, heads · head_dim]`.
    pub fn attend(&self, qkv: QueryKeyValue, documents: Option<&DocumentMask>) -> Tensor<3> {
        let [batch, seq, heads, head_dim] = qkv.query.dims();
        let [query, key, value] = [qkv.query, qkv.key, qkv.value].map(|x| x.swap_dims(1, 2));
        let context = match documents {
            _ if self.dropout.prob > 0.0 && query.device().is_autodiff() => {
                self.attend_with_dropout(query, key, value, documents)
            }
            Some(documents) => {
                let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
                attention(query, key, value, Some(documents.expand(heads)), None, options)
            }
            None => ops::causal_attention(query, key, value),
        };
        context.swap_dims(1, 2).reshape([batch, seq, heads * head_dim])
    }

    /// Burn's attention has no dropout, so training with it forms the probabilities here.
    fn attend_with_dropout(
        &self,
        query: Tensor<4>,
        key: Tensor<4>,
        value: Tensor<4>,
        documents: Option<&DocumentMask>,
    ) -> Tensor<4> {
        let [_, heads, seq, head_dim] = query.dims();
        let scores = query.matmul(key.transpose()).div_scalar((head_dim as f64).sqrt());
        let future = Tensor::<2, Bool>::tril_mask([seq, seq], 0, &scores.device()).unsqueeze::<4>();
        let scores = scores.cast(FloatDType::F32).mask_fill(future, f32::NEG_INFINITY);
        let scores = match documents {
            Some(documents) => scores.mask_fill(documents.expand(heads), f32::NEG_INFINITY),
            None => scores,
        };
        let probabilities = softmax(scores, 3).cast(value.dtype());
        self.dropout.forward(probabilities).matmul(value)
    }
}

impl YuanConfig {
    /// Initial standard deviation of projections back to the residual stream (Megatron's rule).
    pub(crate) fn output_initializer_range(&self) -> f64 {
        self.initializer_range / (2.0 * self.num_hidden_layers() as f64).sqrt()
    }
}

/// Keeps the documents of a packed row apart (`reset_attention_mask`).
#[derive(Debug, Clone)]
pub struct DocumentMask {
    /// `[batch, 1, seq, seq]`, true where query and key are of different documents.
    different: Tensor<4, Bool>,
}

impl DocumentMask {
    /// A document starts wherever the position is zero; `position_ids` is `[batch, seq]`.
    pub fn new(position_ids: Tensor<2, Int>) -> Self {
        let document = position_ids.equal_scalar(0).int().cumsum(1);
        let rows = document.clone().unsqueeze_dim::<3>(2);
        let different = rows.not_equal(document.unsqueeze_dim::<3>(1));
        Self { different: different.unsqueeze_dim::<4>(1) }
    }

    fn expand(&self, heads: usize) -> Tensor<4, Bool> {
        let [batch, _, seq, _] = self.different.dims();
        self.different.clone().expand([batch, heads, seq, seq])
    }
}

/// A product on `[batch · seq, d_in]`, whose gradient for the weight is one product too.
pub(crate) fn project(linear: &Linear, x: Tensor<3>) -> Tensor<3> {
    let [batch, seq, d_in] = x.dims();
    let weight = linear.weight.val().cast(x.dtype());
    let d_out = weight.dims()[1];
    x.reshape([batch * seq, d_in]).matmul(weight).reshape([batch, seq, d_out])
}
