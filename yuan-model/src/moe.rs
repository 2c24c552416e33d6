//! Mixture of experts: route, dispatch, compute, combine. No token is ever dropped.

use burn::{
    module::Module,
    tensor::{Bool, Device, Int, Tensor},
};

use crate::{
    YuanConfig, ops,
    ranks::{DeviceRows, LayerRanks},
};

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
    /// The experts of this layer, stacked; of several ranks, those of this one.
    pub experts: Experts,
    /// How the experts are spread over ranks, if they are.
    #[module(skip)]
    pub(crate) ranks: Option<LayerRanks>,
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
    /// True where a token is a row of an image, `[batch, seq]`: these are counted apart as well.
    pub of_images: Option<Tensor<2, Bool>>,
}

/// Result of one mixture-of-experts layer.
#[derive(Debug, Clone)]
pub struct MoeOutput {
    /// `[batch, seq, hidden]`
    pub hidden: Tensor<3>,
    /// Tokens that each expert received, padding excluded, `[num_experts]`; a token counts once per
    /// expert.
    pub tokens_per_expert: Tensor<1, Int>,
    /// Those of them that are rows of images, `[num_experts]`, if there are images.
    pub image_tokens_per_expert: Option<Tensor<1, Int>>,
    /// Over ranks: rows that each rank of a row computed in its experts.
    pub rows_per_rank: Option<DeviceRows>,
    /// Weighted sum of the balancing losses that are on, `[1]`; over ranks, of all their tokens.
    pub balance_loss: Option<Tensor<1>>,
}

impl MoeLayer {
    /// The experts and router of layer `layer`.
    pub fn new(config: &YuanConfig, layer: usize, device: &Device) -> Self {
        Self {
            router: Router::new(config, layer, device),
            experts: Experts::new(config, layer, device),
            ranks: None,
        }
    }

    /// Experts of this layer.
    pub fn num_experts(&self) -> usize {
        self.router.num_experts()
    }

    /// Sends every token of `[batch, seq, hidden]` through its chosen experts and adds them up by
    /// weight.
    ///
    /// # Panics
    ///
    /// If the device fails, or a rank is gone.
    pub fn forward(&self, hidden: Tensor<3>, options: MoeOptions) -> MoeOutput {
        let shape = hidden.dims();
        let (routed, rows) = self.route(hidden, options.selection_bias);
        let tokens = routed.tokens(shape[0], options.padding.as_ref());
        let balance_loss = self.balance_loss(options.balance, &tokens);
        let flat = |mask: Tensor<2, Bool>| mask.reshape([shape[0] * shape[1]]);
        let tokens_per_expert = match options.padding {
            Some(padding) => routed.dispatch.tokens_per_expert_where(flat(padding).bool_not()),
            None => routed.dispatch.tokens_per_expert(),
        };
        let of_images = options.of_images.map(flat);
        let image_tokens_per_expert =
            of_images.map(|counted| routed.dispatch.tokens_per_expert_where(counted));
        let spread = self.ranks.as_ref().filter(|ranks| ranks.ranks().expert() > 1);
        let (rows, rows_per_rank) = match spread {
            None => {
                let counts = || routed.dispatch.rows_per_expert();
                let counts = || counts().unwrap_or_else(|error| panic!("{error}"));
                (self.experts.forward(rows, counts), None)
            }
            Some(ranks) => {
                let sent = ranks.send(rows, routed.dispatch.tokens_per_expert());
                let arrival = sent.unwrap_or_else(|error| panic!("{error}"));
                let rows_per_expert = arrival.rows_per_expert.clone();
                let computed = self.experts.forward(arrival.rows.clone(), || rows_per_expert);
                let rows_per_rank = Some(arrival.rows_per_rank.clone());
                (arrival.send_back(computed), rows_per_rank)
            }
        };
        let hidden = routed.combine(rows, shape);
        MoeOutput {
            hidden,
            tokens_per_expert,
            image_tokens_per_expert,
            rows_per_rank,
            balance_loss,
        }
    }

    /// The balancing losses of all tokens, those of other ranks included.
    fn balance_loss(&self, balance: BalanceLosses, tokens: &RoutedTokens<'_>) -> Option<Tensor<1>> {
        let sums = balance.sums(tokens)?;
        let sums = match &self.ranks {
            Some(ranks) => ops::all_reduce(sums, ranks.ranks().world()),
            None => sums,
        };
        Some(balance.of_sums(sums, self.num_experts()))
    }

    /// Chooses the experts of every token of `[batch, seq, hidden]`; also the tokens sorted by
    /// expert, `[tokens · top_k, hidden]`.
    pub(crate) fn route(
        &self,
        hidden: Tensor<3>,
        selection_bias: Option<Tensor<1>>,
    ) -> (Routed, Tensor<2>) {
        let [batch, seq, width] = hidden.dims();
        let tokens = hidden.reshape([batch * seq, width]);
        let routing = self.router.forward(tokens.clone(), selection_bias);
        let dispatch = Dispatch::new(routing.experts.clone(), self.num_experts());
        let rows = dispatch.scatter(tokens);
        (Routed { routing, dispatch }, rows)
    }
}

/// Where the tokens of one layer went.
pub(crate) struct Routed {
    pub(crate) routing: Routing,
    pub(crate) dispatch: Dispatch,
}

impl Routed {
    pub(crate) fn tokens<'a>(
        &'a self,
        batch: usize,
        padding: Option<&'a Tensor<2, Bool>>,
    ) -> RoutedTokens<'a> {
        RoutedTokens {
            logits: &self.routing.logits,
            experts: &self.routing.experts,
            batch,
            padding,
        }
    }

    /// Adds up what the experts made of every token: their rows in sorted order → `[batch, seq,
    /// hidden]`.
    pub(crate) fn combine(self, rows: Tensor<2>, shape: [usize; 3]) -> Tensor<3> {
        self.dispatch.combine(rows, self.routing.weights).reshape(shape)
    }
}
