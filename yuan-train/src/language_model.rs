//! What the loop trains: the small traits a model implements, and Yuan's implementation.
//!
//! To be pruned as well, a model implements [`PrunableExperts`](yuan_model::PrunableExperts).

use burn::{
    module::Module,
    optim::GradientsParams,
    tensor::{Device, Int, Tensor},
};
use yuan_model::{
    BalanceLosses, ConfigError, DeviceMesh,
    named::{self, StoredParameter},
};

use crate::{TrainError, config::Precision};

pub use yuan_model::Batch;

mod by_layer;
mod on_device;
mod on_mesh;

/// Loss of a batch and where its tokens went.
#[derive(Debug, Clone)]
pub struct LossOutput {
    /// Mean next-token cross-entropy, `[1]`.
    pub loss: Tensor<1>,
    /// What is minimised beside it: the weighted balancing losses, `[1]`, if any is on.
    pub balance_loss: Option<Tensor<1>>,
    /// Per layer: tokens that each expert received, `[num_experts]`.
    pub tokens_per_expert: Vec<Tensor<1, Int>>,
    /// Per layer: rows that each device of a mesh computed in its experts, summed over copies;
    /// empty on one device.
    pub rows_per_device: Vec<Vec<u64>>,
}

/// How a loss is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossOptions {
    /// Coefficients of the balancing losses.
    pub balance: BalanceLosses,
    /// Type of activations and products.
    pub precision: Precision,
    /// Keep the inputs of the layers only and compute each layer again for its gradients; the
    /// number seeds dropout.
    pub recompute: Option<u64>,
}

/// Where a model lives: on one device or on many.
pub trait Place: Clone + std::fmt::Debug {
    /// All devices; the first is where batches come from and where losses and norms are added up.
    fn devices(&self) -> Vec<Device>;
}

impl Place for Device {
    fn devices(&self) -> Vec<Device> {
        vec![self.clone()]
    }
}

impl Place for DeviceMesh {
    fn devices(&self) -> Vec<Device> {
        DeviceMesh::devices(self).to_vec()
    }
}

/// A model that the [`Trainer`](crate::Trainer) can train and restore.
pub trait LanguageModel: Module {
    /// One device, or a mesh of them.
    type Place: Place;

    /// Loss of a batch, and the balancing losses that are asked for.
    ///
    /// # Errors
    ///
    /// If a device fails, or the batch does not fit the devices.
    fn loss(&self, batch: Batch, options: LossOptions) -> Result<LossOutput, TrainError>;

    /// Loss of a batch without a graph, and the gradients of `share` times what is minimised.
    ///
    /// A model that can save memory by [`recompute`](LossOptions::recompute) does so here.
    ///
    /// # Errors
    ///
    /// As [`loss`](Self::loss).
    fn loss_and_gradients(
        &self,
        batch: Batch,
        options: LossOptions,
        share: f64,
    ) -> Result<(LossOutput, GradientsParams), TrainError> {
        whole_graph(self, batch, options, share)
    }

    /// The parameters as they are saved, and what holds them: by default each by itself.
    fn stored_parameters(&self) -> Vec<StoredParameter> {
        named::stored_parameters(self)
    }

    /// Everything needed to build a model of this shape anew, as JSON.
    fn config_json(&self) -> String;

    /// Builds a model from what [`config_json`](Self::config_json) wrote, with fresh weights.
    ///
    /// # Errors
    ///
    /// If the text is no configuration of this kind of model.
    fn from_config_json(text: &str, place: &Self::Place) -> Result<Self, ConfigError>;
}

/// A model whose routers choose by score plus a bias that balancing without an auxiliary loss
/// moves.
pub trait SelectionBias: Sized {
    /// Whether the model has such biases.
    fn has_selection_bias(&self) -> bool;

    /// Adds a number to the bias of every expert of every layer.
    fn shift_selection_bias(self, shifts: &[Vec<f32>]) -> Self;
}

/// One forward pass with a graph of all layers, and one backward.
fn whole_graph<M: LanguageModel>(
    model: &M,
    batch: Batch,
    options: LossOptions,
    share: f64,
) -> Result<(LossOutput, GradientsParams), TrainError> {
    let output = model.loss(batch, options)?;
    let (loss, balance_loss) =
        (output.loss.clone().inner(), output.balance_loss.clone().map(Tensor::inner));
    let objective = output.balance_loss.into_iter().fold(output.loss, |sum, balance| sum + balance);
    let gradients = GradientsParams::from_grads(objective.mul_scalar(share).backward(), model);
    Ok((LossOutput { loss, balance_loss, ..output }, gradients))
}
