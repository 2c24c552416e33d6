//! Loss and gradients of a batch, layer by layer.
//!
//! Every layer has a graph of its own, from its input to its output, and is differentiated for the
//! gradient that came from above. So its parameters' gradients are there while the layers beneath are
//! still to come, and ranks add them up meanwhile.
//!
//! With activation recomputation the forward pass keeps each layer's input and nothing else, and the
//! layer is computed once more, now with its graph, when its turn comes: memory of one layer's
//! activations instead of all layers', for a third more arithmetic. Burn's own checkpointing replays
//! single operations and keeps all products, so it would save little here.

use std::collections::HashSet;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId, list_param_ids},
    optim::GradientsParams,
    tensor::{Device, Tensor},
};
use yuan_model::{
    BalanceLosses, Batch, Inputs, LossOutput, ObjectiveLoss, Precision, YuanModel,
    layers::{LayerOutput, LayerSums, through_layers},
    named, ops,
};

use crate::Freeze;

mod images;

use images::SeenImages;

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
    /// Parts of a multimodal model for which no gradient is wanted.
    pub freeze: Freeze,
}

/// What goes with a pass through a model, forward and back.
pub trait Pass {
    /// These parameters are about to be read for the first time in the pass: what other ranks made of
    /// them may still be on its way until then.
    fn before(&mut self, _parameters: &[ParamId]) {}

    /// Takes gradients as they come; those of one parameter come together.
    fn take(&mut self, gradients: GradientsParams);
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
    let measures = output.measures.into_iter().map(|(name, value)| (name, value.inner())).collect();
    let objective = match output.balance_loss {
        Some(balance) => output.loss + balance,
        None => output.loss,
    };
    let gradients = GradientsParams::from_grads(objective.mul_scalar(share).backward(), model);
    (LossOutput { loss, measures, balance_loss, ..output }, gradients)
}

/// The gradients of the parameters that learn; the others' are dropped.
pub(crate) fn of_learning<M: Module>(
    model: &M,
    gradients: GradientsParams,
    learns: impl Fn(&str) -> bool,
) -> GradientsParams {
    let names = named::parameter_names(model).into_iter();
    let others: HashSet<ParamId> =
        names.filter(|name| !learns(&name.path)).map(|name| name.id).collect();
    if others.is_empty() {
        return gradients;
    }
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

/// Loss of a batch; the gradients of `share` times its objective are handed on layer by layer, the last
/// layer's first.
pub(crate) fn of_layers(
    model: &YuanModel,
    batch: Batch,
    options: LossOptions,
    share: f64,
    pass: &mut dyn Pass,
) -> LossOutput {
    let inputs = model.inputs(batch);
    let frozen = options.freeze.language.then(|| without_language_gradients(model));
    let model = frozen.as_ref().unwrap_or(model);
    if let Some(encoder) = model.images.as_ref().filter(|_| inputs.images().is_some()) {
        pass.before(&list_param_ids(encoder));
    }
    let dtype = options.precision.dtype();
    let again = options.recompute.is_some();
    let images = SeenImages::forward(model, &inputs, dtype, options.freeze, again);
    pass.before(&list_param_ids(&model.embedding));
    let rows = images.as_ref().map(|images| images.rows.clone());
    let embedded = model.embed_inputs(&inputs, rows, dtype);
    let device = embedded.device();
    let layers = Layers { model, inputs: &inputs, balance: options.balance, device: &device };

    let (last, passed, sums) = layers.forward(embedded.clone().inner(), options.recompute, pass);
    let last = leaf(last);
    pass.before(&list_param_ids(&model.final_norm));
    pass.before(&list_param_ids(&model.head));
    let ObjectiveLoss { loss, measures } = model.loss_of_hidden(last.clone(), &inputs);
    let measures = measures.into_iter().map(|(name, value)| (name, value.inner())).collect();
    let output = sums.with_loss(ObjectiveLoss { loss: loss.clone().inner(), measures });
    let mut differentiate = |objective: Tensor<1>, input: &Tensor<3>| {
        let mut gradients = objective.backward();
        let of_input = input.grad_remove(&mut gradients);
        pass.take(GradientsParams::from_grads(gradients, model));
        of_input
    };
    let mut above = differentiate(loss.mul_scalar(share), &last);
    for (index, layer) in passed.into_iter().enumerate().rev() {
        let Layer { input, hidden, balance_loss } = match layer {
            Passed::Kept(layer) => layer,
            Passed::Input { input, seed } => layers.pass(index, input, Some(seed)).0,
        };
        let from_above =
            above.map(|above| ops::continue_backward(hidden, Tensor::from_inner(above)));
        let balance_loss = balance_loss.map(|loss| loss.mul_scalar(share));
        let objective = match (from_above, balance_loss) {
            (Some(above), Some(balance_loss)) => above + balance_loss,
            (above, balance_loss) => match above.or(balance_loss) {
                Some(objective) => objective,
                None => return output,
            },
        };
        above = differentiate(objective, &input);
    }
    // Without images, a frozen language model has nothing left to learn.
    let learns = images.is_some() || !options.freeze.language;
    if let Some(above) = above.filter(|_| learns) {
        let objective = ops::continue_backward(embedded, Tensor::from_inner(above));
        let mut gradients = objective.backward();
        let of_rows = images.as_ref().and_then(|images| images.rows.grad_remove(&mut gradients));
        pass.take(GradientsParams::from_grads(gradients, model));
        if let Some((images, of_rows)) = images.zip(of_rows) {
            pass.take(images.backward(model, of_rows));
        }
    }
    output
}

/// The model with parameters of the language model that want no gradient; that of what it was given
/// flows through it all the same.
fn without_language_gradients(model: &YuanModel) -> YuanModel {
    let mut frozen = model.clone().no_grad();
    frozen.images.clone_from(&model.images);
    frozen
}

/// What every pass over a layer needs.
struct Layers<'a> {
    model: &'a YuanModel,
    inputs: &'a Inputs,
    balance: BalanceLosses,
    device: &'a Device,
}

/// A layer's graph: from its input, which begins it, to what it made of it.
struct Layer {
    input: Tensor<3>,
    hidden: Tensor<3>,
    balance_loss: Option<Tensor<1>>,
}

/// What the forward pass leaves of a layer.
#[expect(clippy::large_enum_variant, reason = "there is one of them for each layer")]
enum Passed {
    /// Its graph.
    Kept(Layer),
    /// What it was given, to compute it again, and what seeds its dropout.
    Input { input: Tensor<3>, seed: u64 },
}

impl Layers<'_> {
    /// All layers, with a graph for each or, where they are computed again, with none; the residual
    /// stream goes in and comes out without one.
    fn forward(
        &self,
        start: Tensor<3>,
        recompute: Option<u64>,
        pass: &mut dyn Pass,
    ) -> (Tensor<3>, Vec<Passed>, LayerSums) {
        let num_layers = self.model.blocks.len();
        // Parameters that want no gradient leave no graph, whose memory Burn would free no earlier
        // than at the next backward pass; dropout is on all the same.
        let without_graph = recompute.map(|_| self.model.clone().no_grad());
        let mut passed = Vec::with_capacity(num_layers);
        let (last, mut sums) = through_layers(num_layers, start, |index, x| {
            pass.before(&list_param_ids(&self.model.blocks[index]));
            let seed = recompute
                .map(|seed| seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            let output = match (&without_graph, seed) {
                (Some(model), Some(seed)) => {
                    passed.push(Passed::Input { input: x.clone(), seed });
                    let layers = Layers { model, ..*self };
                    layers.output(index, Tensor::from_inner(x), Some(seed))
                }
                _ => {
                    let (layer, output) = self.pass(index, x, None);
                    passed.push(Passed::Kept(layer));
                    output
                }
            };
            LayerOutput { hidden: output.hidden.inner(), ..output }
        });
        sums.balance_loss = sums.balance_loss.map(Tensor::inner);
        (last, passed, sums)
    }

    /// One layer with its graph.
    fn pass(&self, index: usize, input: Tensor<3>, seed: Option<u64>) -> (Layer, LayerOutput) {
        let input = leaf(input);
        let output = self.output(index, input.clone(), seed);
        let (hidden, balance_loss) = (output.hidden.clone(), output.balance_loss.clone());
        (Layer { input, hidden, balance_loss }, output)
    }

    fn output(&self, index: usize, x: Tensor<3>, seed: Option<u64>) -> LayerOutput {
        if let Some(seed) = seed {
            // Dropout has to draw alike in both passes.
            self.device.seed(seed);
        }
        self.model.layer(index, x, self.inputs, self.balance)
    }
}

/// A tensor as the start of a graph of its own.
fn leaf(x: Tensor<3>) -> Tensor<3> {
    Tensor::from_inner(x).require_grad()
}
