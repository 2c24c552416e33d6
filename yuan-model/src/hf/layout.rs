//! Names and layouts of checkpoint tensors, and how they become parameters.

use burn::tensor::TensorData;

use crate::{ModelError, RouterType, YuanConfig, YuanModel, named};

/// How a parameter is laid out in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorLayout {
    /// As it is here.
    Same,
    /// `[out, in]` there, `[in, out]` here.
    Transposed,
    /// A filter convolution: `[out, in, 2, 1]` there, `[in, 2 · out]` here, previous token first.
    Taps,
    /// One `[out, in]` per expert there, `[experts, in, out]` here.
    StackedTransposed,
}

/// Where one parameter comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterSource {
    /// Path of the parameter in [`YuanModel`].
    pub path: String,
    /// Names of its tensors in a checkpoint: one, or one per expert.
    pub names: Vec<String>,
    /// Shape of each of them.
    pub shape: Vec<usize>,
    /// How they are laid out.
    pub layout: TensorLayout,
}

/// A tensor in host memory, row-major, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

impl YuanConfig {
    /// Every parameter of the model with the checkpoint tensors that it is made of.
    pub fn parameter_sources(&self) -> Vec<ParameterSource> {
        let (vocab, hidden, ffn) = (self.vocab_size, self.hidden_size, self.ffn_hidden_size);
        let projection = self.attention_projection_size;
        let mut sources = vec![source(
            "embedding.weight",
            "model.embed_tokens.weight",
            &[vocab, hidden],
            TensorLayout::Same,
        )];
        for (layer, &experts) in self.experts_per_layer.iter().enumerate() {
            let mut add = |path: &str, name: &str, shape: &[usize], layout| {
                let (path, name) = (format!("blocks.{layer}.{path}"), format!("model.layers.{layer}.{name}"));
                sources.push(source(&path, &name, shape, layout));
            };
            add("attention_norm.weight", "input_layernorm.weight", &[hidden], TensorLayout::Same);
            if self.use_lf_gate {
                let (filter, gate) = ("attention.filter", "self_attn.lf_gate");
                for (conv, d_in, d_out) in [("conv1", hidden, hidden / 2), ("conv2", hidden / 2, hidden)] {
                    let (path, name) = (format!("{filter}.{conv}"), format!("{gate}.{conv}"));
                    let shape = [d_out, d_in, 2, 1];
                    add(&format!("{path}.weight"), &format!("{name}.weight"), &shape, TensorLayout::Taps);
                    if self.use_lfa_bias {
                        add(&format!("{path}.bias"), &format!("{name}.bias"), &[d_out], TensorLayout::Same);
                    }
                }
                let norm = format!("{gate}.output_layernorm.weight");
                add(&format!("{filter}.output_norm.weight"), &norm, &[hidden], TensorLayout::Same);
            }
            let transposed = TensorLayout::Transposed;
            add(
                "attention.query_key.weight",
                "self_attn.get_query_key.weight",
                &[2 * projection, hidden],
                transposed,
            );
            add("attention.value.weight", "self_attn.v_proj.weight", &[projection, hidden], transposed);
            add("attention.output.weight", "self_attn.o_proj.weight", &[hidden, projection], transposed);
            add("moe_norm.weight", "post_attention_layernorm.weight", &[hidden], TensorLayout::Same);
            let (router, rows) = match self.router_type {
                RouterType::Attention => ("mlp.router.query_key_value.weight", 3 * experts),
                RouterType::Linear => ("mlp.router.weight", experts),
            };
            add("moe.router.weight", router, &[rows, hidden], transposed);
            if self.router_selection_bias {
                // The name that DeepSeek-V3's checkpoints have for it; published Yuan models have none.
                let name = "mlp.router.e_score_correction_bias";
                add("moe.router.selection_bias", name, &[experts], TensorLayout::Same);
            }
            for (path, name, shape) in [("gate_up", "w1", [2 * ffn, hidden]), ("down", "w2", [hidden, ffn])] {
                sources.push(ParameterSource {
                    path: format!("blocks.{layer}.moe.experts.{path}"),
                    names: (0..experts)
                        .map(|e| format!("model.layers.{layer}.mlp.experts.{name}.{e}.weight"))
                        .collect(),
                    shape: shape.to_vec(),
                    layout: TensorLayout::StackedTransposed,
                });
            }
        }
        sources.push(source("final_norm.weight", "model.norm.weight", &[hidden], TensorLayout::Same));
        sources.push(source("head.weight", "lm_head.weight", &[vocab, hidden], TensorLayout::Transposed));
        sources
    }
}

impl ParameterSource {
    /// Joins the tensors of a checkpoint into the parameter.
    ///
    /// # Panics
    ///
    /// If there are not as many tensors as [`names`](Self::names), of the given shape.
    pub fn assemble(&self, tensors: &[HostTensor]) -> TensorData {
        assert_eq!(tensors.len(), self.names.len(), "{}: one tensor per name", self.path);
        for tensor in tensors {
            assert_eq!(tensor.shape, self.shape, "{}: shape of a source tensor", self.path);
        }
        let (shape, values): (Vec<usize>, Vec<f32>) = match self.layout {
            TensorLayout::Same => (self.shape.clone(), tensors[0].values.clone()),
            TensorLayout::Transposed => {
                let [out, d_in] = [self.shape[0], self.shape[1]];
                (vec![d_in, out], transposed(&tensors[0].values, out, d_in))
            }
            TensorLayout::Taps => {
                let [out, d_in] = [self.shape[0], self.shape[1]];
                let source = &tensors[0].values;
                let tap = |i: usize, column: usize| source[((column % out) * d_in + i) * 2 + column / out];
                let values = (0..d_in).flat_map(|i| (0..2 * out).map(move |column| tap(i, column)));
                (vec![d_in, 2 * out], values.collect())
            }
            TensorLayout::StackedTransposed => {
                let [out, d_in] = [self.shape[0], self.shape[1]];
                let values = tensors.iter().flat_map(|tensor| transposed(&tensor.values, out, d_in));
                (vec![tensors.len(), d_in, out], values.collect())
            }
        };
        TensorData::new(values, shape)
    }
}

impl YuanModel {
    /// Fills the model from tensors under Hugging Face's names.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tensors`] lists every tensor that is missing or has the wrong shape.
    pub fn with_hf_tensors(
        self,
        mut tensor: impl FnMut(&str) -> Option<HostTensor>,
    ) -> Result<Self, ModelError> {
        let mut wrong = Vec::new();
        let sources = self.config().parameter_sources();
        let filled = named::write_parameters(self, |path, _| {
            let source = sources.iter().find(|source| source.path == path)?;
            let mut tensors = Vec::with_capacity(source.names.len());
            for name in &source.names {
                match tensor(name) {
                    Some(tensor) if tensor.shape == source.shape => tensors.push(tensor),
                    Some(tensor) => {
                        wrong.push(format!("`{name}` is {:?}, expected {:?}", tensor.shape, source.shape));
                    }
                    None => wrong.push(format!("`{name}` is missing")),
                }
            }
            (tensors.len() == source.names.len()).then(|| source.assemble(&tensors))
        });
        if wrong.is_empty() { Ok(filled) } else { Err(ModelError::Tensors(wrong)) }
    }
}

fn source(path: &str, name: &str, shape: &[usize], layout: TensorLayout) -> ParameterSource {
    ParameterSource { path: path.into(), names: vec![name.into()], shape: shape.to_vec(), layout }
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn the_sources_are_the_parameters_of_the_model() {
        for config in [
            YuanConfig::tiny(96),
            YuanConfig { use_lfa_bias: true, use_lf_gate: true, ..YuanConfig::tiny(96) },
            YuanConfig { router_selection_bias: true, ..YuanConfig::tiny(96) },
        ] {
            let model = YuanModel::new(&config, &Device::default()).unwrap();
            let paths: Vec<String> =
                named::parameter_names(&model).into_iter().map(|name| name.path).collect();
            let sources: Vec<String> =
                config.parameter_sources().into_iter().map(|source| source.path).collect();
            assert_eq!(paths, sources);
        }
    }

    #[test]
    fn the_formula_counts_what_is_built() {
        let attention = YuanConfig { router_type: RouterType::Attention, ..YuanConfig::tiny(96) };
        let without_filter = YuanConfig { use_lf_gate: false, ..YuanConfig::tiny(96) };
        let uneven = YuanConfig { use_lfa_bias: true, experts_per_layer: vec![8, 3, 2], ..attention.clone() };
        let biased = YuanConfig { router_selection_bias: true, ..uneven.clone() };
        for config in [YuanConfig::tiny(96), attention, without_filter, uneven, biased] {
            let model = YuanModel::new(&config, &Device::default()).unwrap();
            let built: usize =
                named::parameter_names(&model).iter().map(|name| name.shape.num_elements()).sum();
            assert_eq!(built as u64, config.parameter_count().total(), "{config:?}");
        }
    }
}
