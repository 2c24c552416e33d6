//! Which experts a token visits, and how much each counts.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, FloatDType, Int, Tensor, activation::softmax},
};

use crate::{RouterType, YuanConfig, ops};

/// Scores the experts of one layer for every token, by itself.
#[derive(Module, Debug)]
pub struct Router {
    /// Linear router: `[hidden, experts]`. Attention router: `[hidden, 3 · experts]`, the columns
    /// being a query, a key and a value for every expert.
    pub weight: Param<Tensor<2>>,
    /// `[experts]`, added to the logits when experts are chosen, not when they are weighted, and
    /// not trained by gradients: DeepSeek-V3's balancing without an auxiliary loss moves it
    /// ([`shift_selection_bias`](crate::YuanModel::shift_selection_bias)).
    pub selection_bias: Option<Param<Tensor<1>>>,
    is_attention: bool,
    top_k: usize,
}

/// The experts chosen for every token.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Score of every expert in f32, `[tokens, experts]`.
    pub logits: Tensor<2>,
    /// Chosen experts, best first, `[tokens, top_k]`.
    pub experts: Tensor<2, Int>,
    /// Softmax over the chosen logits in f32, `[tokens, top_k]`; rows sum to one.
    pub weights: Tensor<2>,
}

impl Router {
    /// The router of layer `layer`.
    pub fn new(config: &YuanConfig, layer: usize, device: &Device) -> Self {
        let is_attention = config.router_type == RouterType::Attention;
        let columns = config.experts_per_layer[layer] * if is_attention { 3 } else { 1 };
        let normal = Initializer::Normal { mean: 0.0, std: config.init_std };
        let weight = normal.init([config.hidden_size, columns], device);
        let selection_bias = config.router_selection_bias.then(|| {
            let zeros = Initializer::Zeros.init([config.experts_per_layer[layer]], device);
            zeros.set_require_grad(false)
        });
        Self { weight, selection_bias, is_attention, top_k: config.top_k }
    }

    /// Experts that the router chooses from.
    pub fn num_experts(&self) -> usize {
        self.weight.lazy_shape()[1] / self.blocks()
    }

    /// Blocks of columns that each hold one column per expert: 3 for queries, keys and values.
    pub(crate) fn blocks(&self) -> usize {
        if self.is_attention { 3 } else { 1 }
    }

    /// Experts that each token visits.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Routes `[tokens, hidden]`; see
    /// [`MoeOptions::selection_bias`](super::MoeOptions::selection_bias).
    pub fn forward(&self, tokens: Tensor<2>, selection_bias: Option<Tensor<1>>) -> Routing {
        let logits = self.logits(tokens);
        // Choosing has no gradient: leaving the graph here spares it the steps of the top-k.
        let scores = logits.clone().detach();
        let own_bias = self.selection_bias.as_ref().map(|bias| bias.val().detach());
        let scores = own_bias
            .into_iter()
            .chain(selection_bias)
            .fold(scores, |scores, bias| scores + bias.cast(FloatDType::F32).unsqueeze::<2>());
        let experts = top_k(scores, self.top_k);
        let weights = softmax(logits.clone().gather(1, experts.clone()), 1);
        Routing { logits, experts, weights }
    }

    /// Score of every expert in f32, `[tokens, experts]`.
    fn logits(&self, tokens: Tensor<2>) -> Tensor<2> {
        // In f32 whatever the rest is in: nearly equal scores decide who computes.
        let scores =
            ops::dense(tokens.cast(FloatDType::F32), self.weight.val().cast(FloatDType::F32));
        if !self.is_attention {
            return scores;
        }
        let experts = self.num_experts();
        let [query, key, value] =
            [0, 1, 2].map(|i| scores.clone().slice_dim(1, i * experts..(i + 1) * experts));
        // Attention over the experts with heads of width one; tokens do not interact.
        let affinity = query.unsqueeze_dim::<3>(2) * key.unsqueeze_dim::<3>(1);
        (softmax(affinity, 2) * value.unsqueeze_dim::<3>(1)).sum_dim(2).squeeze_dim(2)
    }
}

/// Indices of the `k` largest entries of every row, largest first; ties: lower index first.
///
/// `k` passes of argmax instead of Burn's `argtopk`, which refuses `k` equal to the width and
/// sorts on the host for some backends.
fn top_k(scores: Tensor<2>, k: usize) -> Tensor<2, Int> {
    let [_, width] = scores.dims();
    let columns = Tensor::<1, Int>::arange(0..width as i64, &scores.device()).unsqueeze::<2>();
    let mut left = scores;
    let mut chosen: Vec<Tensor<2, Int>> = Vec::with_capacity(k);
    for _ in 0..k {
        let best = left.clone().argmax(1);
        left = left.mask_fill(columns.clone().equal(best.clone()), f32::NEG_INFINITY);
        chosen.push(best);
    }
    Tensor::cat(chosen, 1)
}
