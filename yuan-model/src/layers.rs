//! What goes into the layers of a model and what they return.
//!
//! Everything that runs the layers goes through [`through_layers`]: a forward pass, one over a
//! cache, the loss, and the recomputation of layers for their gradients.

use std::sync::Arc;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::{Objective, ObjectiveLoss, ranks::DeviceRows};

/// Rows of tokens with what to predict at each of them.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[batch, seq]`
    pub input_ids: Tensor<2, Int>,
    /// The token that follows each input, `[batch, seq]`.
    pub labels: Tensor<2, Int>,
    /// Position of each token in its document, `[batch, seq]`.
    pub position_ids: Tensor<2, Int>,
    /// Which labels are learnt; none: all of them.
    pub mask: Option<LossMask>,
    /// Over ranks: the part of the learnt labels of all their rows that these rows have, by which
    /// the mean over them is multiplied.
    pub share: Option<f64>,
    /// The images of the rows, if there are any.
    pub images: Option<BatchImages>,
    /// Numbers that come with each label, such as advantages, `[batch, seq]` each: the objective reads
    /// them.
    pub signals: Vec<Tensor<2>>,
    /// What is minimised; none: the mean cross-entropy.
    pub objective: Option<Arc<dyn Objective>>,
}

/// The images of a batch.
#[derive(Debug, Clone)]
pub struct BatchImages {
    /// Their tiles one after the other, normalised, `[tiles, channels, side, side]`.
    pub tiles: Tensor<4>,
    /// Where the rows of the tiles stand, in order, counted over all tokens of the batch; the tokens
    /// there only keep the places.
    pub places: Vec<usize>,
}

/// Which labels of a batch are learnt, and which of its tokens only fill the rows up.
#[derive(Debug, Clone)]
pub struct LossMask {
    /// 1 where the label is learnt and 0 elsewhere, `[batch, seq]`.
    pub learnt: Tensor<2>,
    /// True where a token only fills its row up, `[batch, seq]`: it is not counted as a load. None
    /// if no token does.
    pub padding: Option<Tensor<2, Bool>>,
    /// Learnt labels of each row, `[batch]`, on the host: parts of a batch weigh as many as they
    /// have, without a look at the device.
    pub learnt_per_row: Vec<u64>,
}

impl LossMask {
    /// From what is learnt of each row, and what only fills it up; all rows are equally long.
    pub fn new(learnt: &[Vec<bool>], padding: &[Vec<bool>], device: &Device) -> Self {
        let shape = [learnt.len(), learnt.first().map_or(0, Vec::len)];
        let ones: Vec<f32> = learnt.concat().into_iter().map(f32::from).collect();
        let padding = padding.concat();
        let padding = padding
            .contains(&true)
            .then(|| Tensor::from_data(TensorData::new(padding, shape), device));
        let count = |row: &Vec<bool>| row.iter().filter(|learnt| **learnt).count() as u64;
        Self {
            learnt: Tensor::from_data(TensorData::new(ones, shape), device),
            padding,
            learnt_per_row: learnt.iter().map(count).collect(),
        }
    }

    /// Learnt labels of all rows.
    pub fn count(&self) -> u64 {
        self.learnt_per_row.iter().sum()
    }
}

impl Batch {
    /// Rows of which every label is learnt, each tensor `[batch, seq]`.
    pub fn new(
        input_ids: Tensor<2, Int>,
        labels: Tensor<2, Int>,
        position_ids: Tensor<2, Int>,
    ) -> Self {
        Self {
            input_ids,
            labels,
            position_ids,
            mask: None,
            share: None,
            images: None,
            signals: Vec::new(),
            objective: None,
        }
    }

    /// The same rows, of which only some labels are learnt.
    #[must_use]
    pub fn with_mask(self, mask: LossMask) -> Self {
        Self { mask: Some(mask), ..self }
    }

    /// The same rows, with images among their tokens.
    #[must_use]
    pub fn with_images(self, images: BatchImages) -> Self {
        Self { images: Some(images), ..self }
    }

    /// The same rows, of which an objective makes what is minimised.
    #[must_use]
    pub fn with_objective(self, objective: Arc<dyn Objective>) -> Self {
        Self { objective: Some(objective), ..self }
    }

    /// The rows of one rank, which have this part of the learnt labels of all ranks' rows: the loss
    /// is its part of the mean over all of them.
    #[must_use]
    pub fn with_share(self, share: f64) -> Self {
        Self { share: Some(share), ..self }
    }
}

/// What one layer returns.
#[derive(Debug, Clone)]
pub struct LayerOutput {
    /// The residual stream after the layer, `[batch, seq, hidden]`.
    pub hidden: Tensor<3>,
    /// Tokens that each expert received, padding excluded, `[num_experts]`; a token counts once per
    /// expert.
    pub tokens_per_expert: Tensor<1, Int>,
    /// Those of them that are rows of images, `[num_experts]`, if there are images.
    pub image_tokens_per_expert: Option<Tensor<1, Int>>,
    /// Over ranks: rows that each rank of a row computed in its experts.
    pub rows_per_device: Option<DeviceRows>,
    /// Weighted sum of the balancing losses that are on, `[1]`.
    pub balance_loss: Option<Tensor<1>>,
}

/// Loss of a batch and where its tokens went.
#[derive(Debug, Clone)]
pub struct LossOutput {
    /// Mean next-token cross-entropy over the learnt labels of the batch, in nats per token, `[1]`, or
    /// what its objective makes of them.
    pub loss: Tensor<1>,
    /// What else the objective tells, `[1]` each.
    pub measures: Vec<(&'static str, Tensor<1>)>,
    /// What is minimised beside it: the weighted balancing losses of all layers, `[1]`, if any is
    /// on.
    pub balance_loss: Option<Tensor<1>>,
    /// Per layer: tokens that each expert received, `[num_experts]`; over ranks, those of the rows
    /// of this one.
    pub tokens_per_expert: Vec<Tensor<1, Int>>,
    /// Per layer: those of them that are rows of images; empty without images.
    pub image_tokens_per_expert: Vec<Tensor<1, Int>>,
    /// Per layer: rows that each rank of a row computed in its experts; empty on one device.
    pub rows_per_device: Vec<DeviceRows>,
}

impl LossOutput {
    /// A loss, `[1]`, and the tokens that each expert of each layer received, `[num_experts]`, on
    /// one device and without balancing losses.
    pub fn new(loss: Tensor<1>, tokens_per_expert: Vec<Tensor<1, Int>>) -> Self {
        Self {
            loss,
            measures: Vec::new(),
            balance_loss: None,
            tokens_per_expert,
            image_tokens_per_expert: Vec::new(),
            rows_per_device: Vec::new(),
        }
    }
}

/// What all layers together left behind, beside the residual stream.
#[derive(Debug, Default)]
pub struct LayerSums {
    /// Per layer: tokens that each expert received, `[num_experts]`.
    pub tokens_per_expert: Vec<Tensor<1, Int>>,
    /// Per layer: those of them that are rows of images; empty without images.
    pub image_tokens_per_expert: Vec<Tensor<1, Int>>,
    /// Per layer: rows of the ranks that share it.
    pub rows_per_device: Vec<DeviceRows>,
    /// Sum of the balancing losses of the layers, `[1]`, if any is on.
    pub balance_loss: Option<Tensor<1>>,
}

impl LayerSums {
    /// With the loss of what the last layer left.
    pub fn with_loss(self, ObjectiveLoss { loss, measures }: ObjectiveLoss) -> LossOutput {
        let Self { tokens_per_expert, image_tokens_per_expert, rows_per_device, balance_loss } =
            self;
        LossOutput {
            loss,
            measures,
            balance_loss,
            tokens_per_expert,
            image_tokens_per_expert,
            rows_per_device,
        }
    }
}

/// Runs the residual stream `x`, `[batch, seq, hidden]`, through layers `0..num_layers` and gathers
/// what they return.
pub fn through_layers(
    num_layers: usize,
    mut x: Tensor<3>,
    mut layer: impl FnMut(usize, Tensor<3>) -> LayerOutput,
) -> (Tensor<3>, LayerSums) {
    let mut sums = LayerSums::default();
    for index in 0..num_layers {
        let output = layer(index, x);
        x = output.hidden;
        sums.tokens_per_expert.push(output.tokens_per_expert);
        sums.image_tokens_per_expert.extend(output.image_tokens_per_expert);
        sums.rows_per_device.extend(output.rows_per_device);
        sums.balance_loss = match (sums.balance_loss, output.balance_loss) {
            (Some(sum), Some(more)) => Some(sum + more),
            (sum, more) => sum.or(more),
        };
    }
    (x, sums)
}
