//! Activation recomputation: memory of one layer's activations instead of all layers'.
//!
//! The forward pass keeps each layer's input and nothing else. Backwards, a layer is computed once more from its input,
//! now with a graph, and differentiated for the gradient that came from above: a third more arithmetic. Burn's own
//! checkpointing replays single operations and keeps all products, so it would save little here.

use burn::{
    module::Module,
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{FloatDType, Tensor},
};
use yuan_model::{
    Block, YuanModel,
    attention::DocumentMask,
    loss::masked_mean,
    moe::{MoeOptions, MoeOutput},
    rope::Rotary,
};

use super::{Batch, LossOptions, LossOutput};

/// Loss of a batch and the gradients of `share` times its objective; `seed` decides dropout, which has to draw alike in
/// both passes over a layer.
pub(super) fn loss_and_gradients(
    model: &YuanModel,
    batch: Batch,
    options: LossOptions,
    share: f64,
    seed: u64,
) -> (LossOutput, GradientsParams) {
    let ([_, seq], device) = (batch.input_ids.dims(), batch.input_ids.device());
    let documents =
        model.config().reset_attention_mask.then(|| DocumentMask::new(batch.position_ids.clone()));
    let rotary = Rotary::new(model.config(), Some(batch.position_ids), seq, &device);
    let moe = || MoeOptions { balance: options.balance, ..MoeOptions::default() };
    let forward = |layer: usize, block: &Block, x: Tensor<3>| -> MoeOutput {
        device.seed(seed.wrapping_add((layer as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        block.forward(x, &rotary, documents.as_ref(), moe())
    };
    let leaf = |x: &Tensor<3>| Tensor::from_inner(x.clone()).require_grad();

    let embedded = model.embed(batch.input_ids, Some(options.precision.dtype()));
    let mut x = embedded.clone().inner();
    let (mut inputs, mut tokens_per_expert) = (Vec::new(), Vec::new());
    let mut balance_losses = Vec::new();
    // Parameters that want no gradient leave no graph, whose memory Burn would free no earlier than at the next
    // backward pass; dropout is on all the same.
    let without_graph = model.blocks.clone().no_grad();
    for (layer, block) in without_graph.iter().enumerate() {
        let output = forward(layer, block, Tensor::from_inner(x.clone()));
        inputs.push(std::mem::replace(&mut x, output.hidden.inner()));
        tokens_per_expert.push(output.tokens_per_expert);
        balance_losses.extend(output.balance_loss.map(Tensor::inner));
    }
    let balance_loss = balance_losses.into_iter().reduce(|sum, more| sum + more);

    let mut gradients = GradientsAccumulator::new();
    let last = leaf(&x);
    let hidden = model.final_norm.forward(last.clone());
    let loss = masked_mean(model.token_losses(hidden, batch.labels), None);
    let value = loss.clone().inner();
    let mut grads = loss.mul_scalar(share).backward();
    let mut from_above = last.grad_remove(&mut grads);
    gradients.accumulate(model, GradientsParams::from_grads(grads, model));
    for ((layer, block), input) in model.blocks.iter().enumerate().zip(inputs).rev() {
        let Some(grad) = from_above.take() else { break };
        let input = leaf(&input);
        let output = forward(layer, block, input.clone());
        // The gradient of this sum for the output is what came from above.
        let objective = (output.hidden * Tensor::from_inner(grad)).sum().cast(FloatDType::F32);
        let objective = match output.balance_loss {
            Some(balance) => objective + balance.mul_scalar(share),
            None => objective,
        };
        let mut grads = objective.backward();
        from_above = input.grad_remove(&mut grads);
        gradients.accumulate(model, GradientsParams::from_grads(grads, model));
    }
    if let Some(grad) = from_above {
        let grads = (embedded * Tensor::from_inner(grad)).sum().backward();
        gradients.accumulate(model, GradientsParams::from_grads(grads, model));
    }
    let output = LossOutput { loss: value, balance_loss, tokens_per_expert, rows_per_device: Vec::new() };
    (output, gradients.grads())
}
