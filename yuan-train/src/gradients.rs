//! Loss and gradients of a batch: with one graph for all layers, or with one graph a layer.
//!
//! A graph a layer is activation recomputation: memory of one layer's activations instead of all
//! layers'. The forward pass keeps each layer's input and nothing else. Backwards, a layer is
//! computed once more from its input, now with a graph, and differentiated for the gradient that
//! came from above: a third more arithmetic. Burn's own checkpointing replays single operations and
//! keeps all products, so it would save little here.

use std::collections::HashSet;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, FloatDType, Gradients, Tensor},
};
use yuan_model::{
    BalanceLosses, Batch, Layered, LossOutput, ModelError, Precision,
    layered::{LayerOutput, through_layers},
    named, ops,
};

use crate::{Learns, TrainError};

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

/// The gradients of `share` times what a loss with a graph says is minimised, and the loss without
/// its graph.
pub(crate) fn of_loss<M: Module>(
    model: &M,
    output: LossOutput,
    share: f64,
) -> (LossOutput, GradientsParams) {
    let balance_loss = output.balance_loss.clone().map(Tensor::inner);
    let loss = output.loss.clone().inner();
    let objective = match output.balance_loss {
        Some(balance) => output.loss + balance,
        None => output.loss,
    };
    let gradients = GradientsParams::from_grads(objective.mul_scalar(share).backward(), model);
    (LossOutput { loss, balance_loss, ..output }, gradients)
}

/// The gradients of the parameters that learn; the others' are dropped.
pub(crate) fn of_learning<M: Module>(
    model: &M,
    gradients: GradientsParams,
    learns: Learns,
) -> GradientsParams {
    if learns == Learns::All {
        return gradients;
    }
    let names = named::parameter_names(model).into_iter();
    let others = names.filter(|name| !learns.includes(&name.path)).map(|name| name.id).collect();
    let mut drop = DropGradients { gradients, others };
    model.visit(&mut drop);
    drop.gradients
}

struct DropGradients {
    gradients: GradientsParams,
    others: HashSet<ParamId>,
}

impl ModuleVisitor for DropGradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.others.contains(&param.id) {
            self.gradients.remove::<D>(param.id);
        }
    }
}

/// Loss of a batch and the gradients of `share` times its objective, by layer if that is asked for.
pub(crate) fn of_layers<M: Layered>(
    model: &M,
    batch: Batch,
    options: LossOptions,
    share: f64,
) -> Result<(LossOutput, GradientsParams), TrainError> {
    let dtype = options.precision.dtype();
    let Some(seed) = options.recompute else {
        let output = model.loss_by_layers(batch, options.balance, dtype)?;
        return Ok(of_loss(model, output, share));
    };
    let inputs = model.inputs(batch)?;
    let embedded = model.embed(&inputs, dtype);
    let devices = embedded.iter().map(Tensor::device).collect();
    let recomputation = Recomputation { inputs, balance: options.balance, devices, seed };
    Ok(recomputation.run(model, embedded, share)?)
}

/// What both passes over a layer need.
struct Recomputation<M: Layered> {
    inputs: M::Inputs,
    balance: BalanceLosses,
    devices: Vec<Device>,
    /// Decides dropout, which has to draw alike in both passes.
    seed: u64,
}

impl<M: Layered> Recomputation<M> {
    fn run(
        &self,
        model: &M,
        embedded: Vec<Tensor<3>>,
        share: f64,
    ) -> Result<(LossOutput, GradientsParams), ModelError> {
        // Parameters that want no gradient leave no graph, whose memory Burn would free no earlier
        // than at the next backward pass; dropout is on all the same.
        let without_graph = model.clone().no_grad();
        let mut inputs_of_layers = Vec::with_capacity(model.num_layers());
        let start = inner(embedded.clone());
        let (last, mut sums) = through_layers(model.num_layers(), start, |layer, x| {
            inputs_of_layers.push(x.clone());
            let x = x.into_iter().map(Tensor::from_inner).collect();
            let output = self.layer(&without_graph, layer, x)?;
            Ok::<_, ModelError>(LayerOutput { hidden: inner(output.hidden), ..output })
        })?;
        drop(without_graph);
        sums.balance_loss = sums.balance_loss.map(Tensor::inner);

        let mut gradients = GradientsAccumulator::new();
        let last = leaves(&last);
        let loss = model.loss_of_hidden(last.clone(), &self.inputs)?;
        let output = sums.with_loss(loss.clone().inner());
        let mut grads = loss.mul_scalar(share).backward();
        let mut from_above = take_gradients(&last, &mut grads);
        gradients.accumulate(model, GradientsParams::from_grads(grads, model));
        for (layer, input) in inputs_of_layers.into_iter().enumerate().rev() {
            let Some(above) = from_above.take() else { break };
            let input = leaves(&input);
            let computed = self.layer(model, layer, input.clone())?;
            let balance = computed.balance_loss.map(|balance| balance.mul_scalar(share));
            let objective = match (self.weighted(computed.hidden, above), balance) {
                (Some(weighted), Some(balance)) => weighted + balance,
                (weighted, balance) => match weighted.or(balance) {
                    Some(objective) => objective,
                    None => break,
                },
            };
            let mut grads = objective.backward();
            from_above = take_gradients(&input, &mut grads);
            gradients.accumulate(model, GradientsParams::from_grads(grads, model));
        }
        if let Some(objective) = from_above.and_then(|above| self.weighted(embedded, above)) {
            gradients.accumulate(model, GradientsParams::from_grads(objective.backward(), model));
        }
        Ok((output, gradients.grads()))
    }

    fn layer(
        &self,
        model: &M,
        layer: usize,
        x: Vec<Tensor<3>>,
    ) -> Result<LayerOutput<Vec<Tensor<3>>>, ModelError> {
        let seed = self.seed.wrapping_add((layer as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for (index, device) in self.devices.iter().enumerate() {
            device.seed(seed.wrapping_add((index as u64).wrapping_mul(0xd1b5_4a32_d192_ed03)));
        }
        model.layer(layer, x, &self.inputs, self.balance)
    }

    /// A sum whose gradient for the outputs `x` is `grads`, which came from above, `[1]`.
    fn weighted(&self, x: Vec<Tensor<3>>, grads: Vec<Tensor<3>>) -> Option<Tensor<1>> {
        let mut total: Option<Tensor<1>> = None;
        for (x, grad) in x.into_iter().zip(grads) {
            let sum = (x * Tensor::from_inner(grad)).sum().cast(FloatDType::F32);
            let sum = ops::transfer(sum, &self.devices[0]);
            total = Some(match total {
                Some(total) => total + sum,
                None => sum,
            });
        }
        total
    }
}

fn inner(x: Vec<Tensor<3>>) -> Vec<Tensor<3>> {
    x.into_iter().map(Tensor::inner).collect()
}

/// The tensors as the start of a graph of their own.
fn leaves(x: &[Tensor<3>]) -> Vec<Tensor<3>> {
    x.iter().map(|x| Tensor::from_inner(x.clone()).require_grad()).collect()
}

/// The gradients of leaves, if they have any.
fn take_gradients(leaves: &[Tensor<3>], grads: &mut Gradients) -> Option<Vec<Tensor<3>>> {
    leaves.iter().map(|leaf| leaf.grad_remove(grads)).collect()
}
