//! Mixture of experts: route, dispatch, compute, combine. No token is ever dropped.

use burn::{
    module::Module,
    tensor::{Bool, Device, Int, Tensor},
};

use crate::YuanConfig;

pub mod balance;
mod dispatch;
mod experts;
mod router;

pub use balance::{BalanceLosses, RoutedTokens};
pub use dispatch::Dispatch;
pub use experts::Experts;
pub use router::{Router, Routing};

/// The mixture-of-experts part of one layer.
#[derive(Module, Debug)]
pub struct MoeLayer {
    /// Scores the experts for every token.
    pub router: Router,
    /// The experts of this layer, stacked.
    pub experts: Experts,
}

/// What may influence routing and its counts from outside.
#[derive(Debug, Clone, Default)]
pub struct MoeOptions {
    /// Added to the logits when experts are chosen, not when they are weighted, `[num_experts]`.
    ///
    /// −∞ hides an expert, which tells what pruning it would do before it is done; DeepSeek-V3's
    /// balancing without an auxiliary loss is a bias of this kind too.
    pub selection_bias: Option<Tensor<1>>,
    /// True where a token is padding, `[batch, seq]`: it is computed but not counted.
    pub padding: Option<Tensor<2, Bool>>,
    /// Losses that pull towards equal load.
    pub balance: BalanceLosses,
}

/// Result of one mixture-of-experts layer.
#[derive(Debug, Clone)]
pub struct MoeOutput {
    /// `[batch, seq, hidden]`
    pub hidden: Tensor<3>,
    /// Tokens that each expert received, padding excluded, `[num_experts]`; a token counts once per expert.
    pub tokens_per_expert: Tensor<1, Int>,
    /// Weighted sum of the balancing losses that are on, `[1]`.
    pub balance_loss: Option<Tensor<1>>,
}

impl MoeLayer {
    /// The experts and router of layer `layer`.
    pub fn new(config: &YuanConfig, layer: usize, device: &Device) -> Self {
        Self { router: Router::new(config, layer, device), experts: Experts::new(config, layer, device) }
    }

    /// Experts of this layer.
    pub fn num_experts(&self) -> usize {
        self.router.num_experts()
    }

    /// Sends every token of `[batch, seq, hidden]` through its chosen experts and adds them up by weight.
    pub fn forward(&self, hidden: Tensor<3>, options: MoeOptions) -> MoeOutput {
        let [batch, seq, width] = hidden.dims();
        let tokens = hidden.reshape([batch * seq, width]);
        let routing = self.router.forward(tokens.clone(), options.selection_bias);
        let balance_loss = options.balance.of(&RoutedTokens {
            logits: &routing.logits,
            experts: &routing.experts,
            batch,
            padding: options.padding.as_ref(),
        });
        let dispatch = Dispatch::new(routing.experts.clone(), self.num_experts());
        let tokens_per_expert = match options.padding {
            Some(padding) => dispatch.tokens_per_expert_where(padding.reshape([batch * seq]).bool_not()),
            None => dispatch.tokens_per_expert(),
        };
        let rows = self.experts.forward(dispatch.scatter(tokens), || dispatch.rows_per_expert());
        let hidden = dispatch.combine(rows, routing.weights).reshape([batch, seq, width]);
        MoeOutput { hidden, tokens_per_expert, balance_loss }
    }
}
