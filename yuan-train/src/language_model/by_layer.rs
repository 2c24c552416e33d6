//! Activation recomputation: memory of one layer's activations instead of all layers'.
//!
//! The forward pass keeps each layer's input and nothing else. Backwards, a layer is computed once
//! more from its input, now with a graph, and differentiated for the gradient that came from above:
//! a third more arithmetic. Burn's own checkpointing replays single operations and keeps all
//! products, so it would save little here.

use burn::{
    module::Module,
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, FloatDType, Gradients, Int, Tensor},
};
use yuan_model::{BalanceLosses, ops};

use super::{Batch, LanguageModel, LossOptions, LossOutput, whole_graph};
use crate::TrainError;

/// A model as its layers, on one device or several; a hidden state is one tensor for each.
pub(super) trait Layered: Module {
    /// What every layer is given beside the hidden state.
    type Inputs;

    fn inputs(&self, batch: Batch) -> Result<Self::Inputs, TrainError>;

    fn num_layers(&self) -> usize;

    fn embed(&self, inputs: &Self::Inputs, dtype: FloatDType) -> Vec<Tensor<3>>;

    fn layer(
        &self,
        layer: usize,
        x: Vec<Tensor<3>>,
        inputs: &Self::Inputs,
        balance: BalanceLosses,
    ) -> Result<LayerOutput, TrainError>;

    fn loss_of_hidden(
        &self,
        x: Vec<Tensor<3>>,
        inputs: &Self::Inputs,
    ) -> Result<Tensor<1>, TrainError>;
}

pub(super) struct LayerOutput {
    pub hidden: Vec<Tensor<3>>,
    pub tokens_per_expert: Tensor<1, Int>,
    /// Of every device of a mesh.
    pub rows_per_device: Option<Vec<u64>>,
    pub balance_loss: Option<Tensor<1>>,
}

/// Loss of a batch and the gradients of `share` times its objective, by layer if that is asked for.
pub(super) fn loss_and_gradients<M: LanguageModel + Layered>(
    model: &M,
    batch: Batch,
    options: LossOptions,
    share: f64,
) -> Result<(LossOutput, GradientsParams), TrainError> {
    match options.recompute {
        Some(seed) => recomputed(model, batch, options, share, seed),
        None => whole_graph(model, batch, options, share),
    }
}

/// `seed` decides dropout, which has to draw alike in both passes over a layer.
fn recomputed<M: Layered>(
    model: &M,
    batch: Batch,
    options: LossOptions,
    share: f64,
    seed: u64,
) -> Result<(LossOutput, GradientsParams), TrainError> {
    let inputs = model.inputs(batch)?;
    let embedded = model.embed(&inputs, options.precision.dtype());
    let devices: Vec<Device> = embedded.iter().map(Tensor::device).collect();
    let forward = |model: &M, layer: usize, x: Vec<Tensor<3>>| {
        let of_layer = seed.wrapping_add((layer as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for (index, device) in devices.iter().enumerate() {
            device.seed(of_layer.wrapping_add((index as u64).wrapping_mul(0xd1b5_4a32_d192_ed03)));
        }
        model.layer(layer, x, &inputs, options.balance)
    };
    let leaf = |x: &[Tensor<3>]| -> Vec<Tensor<3>> {
        x.iter().map(|x| Tensor::from_inner(x.clone()).require_grad()).collect()
    };
    let inner =
        |x: Vec<Tensor<3>>| -> Vec<Tensor<3>> { x.into_iter().map(Tensor::inner).collect() };
    // The gradient of this sum for the outputs is what came from above.
    let weighted = |x: Vec<Tensor<3>>, grads: Vec<Tensor<3>>| {
        let sums = x.into_iter().zip(grads).map(|(x, grad)| {
            ops::transfer((x * Tensor::from_inner(grad)).sum().cast(FloatDType::F32), &devices[0])
        });
        sums.reduce(|sum, more| sum + more)
    };

    let mut x = inner(embedded.clone());
    let mut output = LossOutput {
        loss: Tensor::zeros([1], &devices[0].clone().inner()),
        balance_loss: None,
        tokens_per_expert: Vec::new(),
        rows_per_device: Vec::new(),
    };
    let mut kept = Vec::new();
    // Parameters that want no gradient leave no graph, whose memory Burn would free no earlier than
    // at the next backward pass; dropout is on all the same.
    let without_graph = model.clone().no_grad();
    for layer in 0..model.num_layers() {
        let from_inner = x.iter().map(|x| Tensor::from_inner(x.clone())).collect();
        let computed = forward(&without_graph, layer, from_inner)?;
        kept.push(std::mem::replace(&mut x, inner(computed.hidden)));
        output.tokens_per_expert.push(computed.tokens_per_expert);
        output.rows_per_device.extend(computed.rows_per_device);
        if let Some(balance) = computed.balance_loss.map(Tensor::inner) {
            output.balance_loss = Some(match output.balance_loss {
                Some(sum) => sum + balance,
                None => balance,
            });
        }
    }
    drop(without_graph);

    let mut gradients = GradientsAccumulator::new();
    // The gradients of leaves, if they have any.
    let take = |leaves: &[Tensor<3>], grads: &mut Gradients| -> Option<Vec<Tensor<3>>> {
        leaves.iter().map(|leaf| leaf.grad_remove(grads)).collect()
    };
    let last = leaf(&x);
    let loss = model.loss_of_hidden(last.clone(), &inputs)?;
    output.loss = loss.clone().inner();
    let mut grads = loss.mul_scalar(share).backward();
    let mut from_above = take(&last, &mut grads);
    gradients.accumulate(model, GradientsParams::from_grads(grads, model));
    for (layer, input) in kept.into_iter().enumerate().rev() {
        let Some(above) = from_above.take() else { break };
        let input = leaf(&input);
        let computed = forward(model, layer, input.clone())?;
        let balance = computed.balance_loss.map(|balance| balance.mul_scalar(share));
        let Some(objective) =
            weighted(computed.hidden, above).into_iter().chain(balance).reduce(|a, b| a + b)
        else {
            break;
        };
        let mut grads = objective.backward();
        from_above = take(&input, &mut grads);
        gradients.accumulate(model, GradientsParams::from_grads(grads, model));
    }
    if let Some(objective) = from_above.and_then(|above| weighted(embedded, above)) {
        gradients.accumulate(model, GradientsParams::from_grads(objective.backward(), model));
    }
    Ok((output, gradients.grads()))
}
