//! Causal attention whose queries and keys see a filtered input.

use burn::{
    module::{Initializer, Module},
    nn::{Dropout, DropoutConfig, Linear, LinearConfig},
    tensor::{Bool, Device, FloatDType, Int, Tensor, activation::softmax},
};

use crate::{
    YuanConfig,
    cache::{LayerCache, Span},
    filter::LocalizedFilter,
    ops,
    rope::Rotary,
};

/// Self-attention of one layer: values from the normed input, queries and keys from its filtered
/// form.
#[derive(Module, Debug)]
pub struct Attention {
    /// Localized filtering; absent when `localized_filter` is off.
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
            LinearConfig::new(d_in, d_out)
                .with_bias(false)
                .with_initializer(initializer)
                .init(device)
        };
        Self {
            filter: config.localized_filter.then(|| LocalizedFilter::new(config, device)),
            query_key: linear(hidden, 2 * projection, config.init_std),
            value: linear(hidden, projection, config.init_std),
            output: linear(projection, hidden, config.output_initializer_range()),
            dropout: DropoutConfig::new(config.attention_dropout).init(),
            num_heads: config.num_attention_heads,
        }
    }

    /// `[batch, seq, hidden]` → `[batch, seq, hidden]`; `hidden` is the input's normed form.
    pub fn forward(
        &self,
        u: Tensor<3>,
        rotary: &Rotary,
        documents: Option<&DocumentMask>,
    ) -> Tensor<3> {
        let context = if self.drops(&u) {
            self.attend_with_dropout(self.query_key_value(u, rotary), documents)
        } else {
            let (query_key, value) = self.project_heads(self.filtered(u.clone()), u);
            let (cos, sin) = (rotary.cos().cast(value.dtype()), rotary.sin().cast(value.dtype()));
            let first_keys = documents.map(|documents| documents.first_keys.clone());
            ops::rotary_attention(query_key, value, cos, sin, first_keys)
        };
        let [batch, seq, heads, head_dim] = context.dims();
        project(&self.output, context.reshape([batch, seq, heads * head_dim]))
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
        self.split_heads(self.filtered(u.clone()), u, rotary)
    }

    fn filtered(&self, u: Tensor<3>) -> Tensor<3> {
        match &self.filter {
            Some(filter) => filter.forward(u),
            None => u,
        }
    }

    /// Queries beside keys, `[batch, seq, heads, 2 · head_dim]`, and values, `[batch, seq, heads,
    /// head_dim]`.
    fn project_heads(&self, filtered: Tensor<3>, u: Tensor<3>) -> (Tensor<4>, Tensor<4>) {
        let heads = |x: Tensor<3>| {
            let [batch, seq, width] = x.dims();
            x.reshape([batch, seq, self.num_heads, width / self.num_heads])
        };
        (heads(project(&self.query_key, filtered)), heads(project(&self.value, u)))
    }

    fn split_heads(&self, filtered: Tensor<3>, u: Tensor<3>, rotary: &Rotary) -> QueryKeyValue {
        let (query_key, value) = self.project_heads(filtered, u);
        let [_, _, _, head_dim] = value.dims();
        let query = query_key.clone().slice_dim(3, 0..head_dim);
        let key = query_key.slice_dim(3, head_dim..2 * head_dim);
        QueryKeyValue { query: rotary.rotate(query), key: rotary.rotate(key), value }
    }

    fn drops(&self, u: &Tensor<3>) -> bool {
        self.dropout.prob > 0.0 && u.device().is_autodiff()
    }

    /// The fast versions have no dropout, so training with it forms the probabilities here:
    /// `[batch, seq, heads, head_dim]`.
    fn attend_with_dropout(
        &self,
        qkv: QueryKeyValue,
        documents: Option<&DocumentMask>,
    ) -> Tensor<4> {
        let [_, seq, heads, head_dim] = qkv.query.dims();
        let [query, key, value] = [qkv.query, qkv.key, qkv.value].map(|x| x.swap_dims(1, 2));
        let scores = query.matmul(key.transpose()).div_scalar((head_dim as f64).sqrt());
        let future = Tensor::<2, Bool>::tril_mask([seq, seq], 0, &scores.device()).unsqueeze::<4>();
        let scores = scores.cast(FloatDType::F32).mask_fill(future, f32::NEG_INFINITY);
        let scores = match documents {
            Some(documents) => scores.mask_fill(documents.expand(heads), f32::NEG_INFINITY),
            None => scores,
        };
        let probabilities = softmax(scores, 3).cast(value.dtype());
        self.dropout.forward(probabilities).matmul(value).swap_dims(1, 2)
    }
}

impl YuanConfig {
    /// Initial standard deviation of projections back to the residual stream (Megatron's rule).
    pub(crate) fn output_initializer_range(&self) -> f64 {
        self.init_std / (2.0 * self.num_layers() as f64).sqrt()
    }
}

/// Keeps the documents of a packed row apart (`isolate_documents`).
#[derive(Debug, Clone)]
pub struct DocumentMask {
    /// Where the document of each position starts, `[batch, seq]`.
    first_keys: Tensor<2, Int>,
}

impl DocumentMask {
    /// A document starts wherever the position is zero; `position_ids` is `[batch, seq]`.
    pub fn new(position_ids: Tensor<2, Int>) -> Self {
        let [_, seq] = position_ids.dims();
        let places =
            Tensor::<1, Int>::arange(0..seq as i64, &position_ids.device()).unsqueeze::<2>();
        Self { first_keys: (position_ids.equal_scalar(0).int() * places).cummax(1) }
    }

    /// True where query and key are of different documents, the future aside: `[batch, heads, seq,
    /// seq]`.
    fn expand(&self, heads: usize) -> Tensor<4, Bool> {
        let [batch, seq] = self.first_keys.dims();
        let keys =
            Tensor::<1, Int>::arange(0..seq as i64, &self.first_keys.device()).unsqueeze::<4>();
        let first = self.first_keys.clone().unsqueeze_dims::<4>(&[1, 3]);
        keys.lower(first).expand([batch, heads, seq, seq])
    }
}

/// A product on `[batch · seq, d_in]`, whose gradient for the weight is one product too.
pub(crate) fn project(linear: &Linear, x: Tensor<3>) -> Tensor<3> {
    let [batch, seq, d_in] = x.dims();
    let weight = linear.weight.val().cast(x.dtype());
    let d_out = weight.dims()[1];
    ops::dense(x.reshape([batch * seq, d_in]), weight).reshape([batch, seq, d_out])
}
