//! The experts of one layer: SwiGLU networks with stacked weights.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, Tensor},
};

use crate::{YuanConfig, ops};

/// `y = silu(x W_gate) ⊙ (x W_up) · W_down` for every expert, its weights stacked along the first
/// axis.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[experts, hidden, 2 · ffn]`: gate beside up.
    pub gate_up: Param<Tensor<3>>,
    /// `[experts, ffn, hidden]`
    pub down: Param<Tensor<3>>,
}

impl Experts {
    /// The experts of layer `layer`; the projections back start smaller by `sqrt(2L)`.
    pub fn new(config: &YuanConfig, layer: usize, device: &Device) -> Self {
        Self::some(config, config.experts_per_layer[layer], device)
    }

    /// So many experts: those of a layer that one of several devices holds.
    pub(crate) fn some(config: &YuanConfig, experts: usize, device: &Device) -> Self {
        let (hidden, ffn) = (config.hidden_size, config.expert_hidden_size);
        let normal = |std| Initializer::Normal { mean: 0.0, std };
        Self {
            gate_up: normal(config.init_std).init([experts, hidden, 2 * ffn], device),
            down: normal(config.output_initializer_range()).init([experts, ffn, hidden], device),
        }
    }

    /// Rows sorted by expert, `[rows, hidden]` → `[rows, hidden]`; `rows_per_expert` says whose
    /// they are.
    ///
    /// It is asked late: the device has something to do while the host waits for the counts.
    pub fn forward(
        &self,
        rows: Tensor<2>,
        rows_per_expert: impl FnOnce() -> Vec<usize>,
    ) -> Tensor<2> {
        let dtype = rows.dtype();
        let (gate_up, down) = (self.gate_up.val().cast(dtype), self.down.val().cast(dtype));
        let rows_per_expert = rows_per_expert();
        let hidden = ops::swiglu(ops::grouped_matmul(rows, gate_up, &rows_per_expert));
        ops::grouped_matmul(hidden, down, &rows_per_expert)
    }
}
