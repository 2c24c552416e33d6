//! Names and layouts of checkpoint tensors: what every parameter of the model is made of.

use std::ops::Range;

use crate::{RouterType, YuanConfig};

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
    /// Path of the parameter in [`YuanModel`](crate::YuanModel).
    pub path: String,
    /// Names of its tensors in a checkpoint: one, or one per expert.
    pub names: Vec<String>,
    /// Shape of each of them.
    pub shape: Vec<usize>,
    /// How they are laid out.
    pub layout: TensorLayout,
    /// Rows of the tensor that are taken, in this order; absent: all. Routers have rows per expert.
    pub rows: Option<Vec<usize>>,
}

impl ParameterSource {
    /// Shape of the parameter.
    pub fn parameter_shape(&self) -> Vec<usize> {
        let rows = self.rows.as_ref().map_or(self.shape[0], Vec::len);
        match self.layout {
            TensorLayout::Same => {
                let mut shape = self.shape.clone();
                shape[0] = rows;
                shape
            }
            TensorLayout::Transposed => vec![self.shape[1], rows],
            TensorLayout::Taps => vec![self.shape[1], 2 * rows],
            TensorLayout::StackedTransposed => vec![self.names.len(), self.shape[1], rows],
        }
    }
}

impl YuanConfig {
    /// Every parameter of the model with the checkpoint tensors that it is made of.
    pub fn parameter_sources(&self) -> Vec<ParameterSource> {
        self.parameter_sources_of(0..self.num_layers(), None)
    }

    /// The parameters of a model of these layers only, with these experts of every layer of the
    /// whole model (absent: all), in their new order.
    ///
    /// # Panics
    ///
    /// If a layer or an expert is not there.
    pub fn parameter_sources_of(
        &self,
        layers: Range<usize>,
        experts: Option<&[Vec<usize>]>,
    ) -> Vec<ParameterSource> {
        let (vocab, hidden) = (self.vocab_size, self.hidden_size);
        let whole = |path: &str, name: &str, shape: &[usize], layout| ParameterSource {
            path: path.into(),
            names: vec![name.into()],
            shape: shape.to_vec(),
            layout,
            rows: None,
        };
        let mut sources = vec![whole(
            "embedding.weight",
            "model.embed_tokens.weight",
            &[vocab, hidden],
            TensorLayout::Same,
        )];
        for (new, old) in layers.enumerate() {
            sources.extend(self.layer_sources(
                new,
                old,
                experts.map(|experts| experts[old].as_slice()),
            ));
        }
        sources.push(whole(
            "final_norm.weight",
            "model.norm.weight",
            &[hidden],
            TensorLayout::Same,
        ));
        sources.push(whole(
            "head.weight",
            "lm_head.weight",
            &[vocab, hidden],
            TensorLayout::Transposed,
        ));
        sources
    }

    fn layer_sources(
        &self,
        new: usize,
        old: usize,
        kept: Option<&[usize]>,
    ) -> Vec<ParameterSource> {
        let (hidden, ffn, experts) =
            (self.hidden_size, self.expert_hidden_size, self.experts_per_layer[old]);
        let (projection, transposed) = (self.attention_projection_size, TensorLayout::Transposed);
        let mut sources = Vec::new();
        let mut add = |path: &str, name: &str, shape: &[usize], layout| {
            sources.push(ParameterSource {
                path: format!("blocks.{new}.{path}"),
                names: vec![format!("model.layers.{old}.{name}")],
                shape: shape.to_vec(),
                layout,
                rows: None,
            });
        };
        add("attention_norm.weight", "input_layernorm.weight", &[hidden], TensorLayout::Same);
        if self.localized_filter {
            let (filter, gate) = ("attention.filter", "self_attn.lf_gate");
            for (conv, d_in, d_out) in
                [("conv1", hidden, hidden / 2), ("conv2", hidden / 2, hidden)]
            {
                let (path, name) = (format!("{filter}.{conv}"), format!("{gate}.{conv}"));
                let shape = [d_out, d_in, 2, 1];
                add(
                    &format!("{path}.weight"),
                    &format!("{name}.weight"),
                    &shape,
                    TensorLayout::Taps,
                );
                if self.filter_bias {
                    add(
                        &format!("{path}.bias"),
                        &format!("{name}.bias"),
                        &[d_out],
                        TensorLayout::Same,
                    );
                }
            }
            let norm = format!("{gate}.output_layernorm.weight");
            add(&format!("{filter}.output_norm.weight"), &norm, &[hidden], TensorLayout::Same);
        }
        let query_key = "self_attn.get_query_key.weight";
        add("attention.query_key.weight", query_key, &[2 * projection, hidden], transposed);
        add("attention.value.weight", "self_attn.v_proj.weight", &[projection, hidden], transposed);
        add(
            "attention.output.weight",
            "self_attn.o_proj.weight",
            &[hidden, projection],
            transposed,
        );
        add("moe_norm.weight", "post_attention_layernorm.weight", &[hidden], TensorLayout::Same);
        let (router, blocks) = match self.router_type {
            RouterType::Attention => ("mlp.router.query_key_value.weight", 3),
            RouterType::Linear => ("mlp.router.weight", 1),
        };
        let mut add_router = |path: &str, name: &str, shape: &[usize], layout, blocks: usize| {
            let rows = |kept: &[usize]| {
                (0..blocks)
                    .flat_map(|block| kept.iter().map(move |e| block * experts + e))
                    .collect()
            };
            sources.push(ParameterSource {
                path: format!("blocks.{new}.{path}"),
                names: vec![format!("model.layers.{old}.{name}")],
                shape: shape.to_vec(),
                layout,
                rows: kept.map(rows),
            });
        };
        add_router("moe.router.weight", router, &[blocks * experts, hidden], transposed, blocks);
        if self.router_selection_bias {
            // The name that DeepSeek-V3's checkpoints have for it; published Yuan models have none.
            let name = "mlp.router.e_score_correction_bias";
            add_router("moe.router.selection_bias", name, &[experts], TensorLayout::Same, 1);
        }
        let all: Vec<usize>;
        let experts = match kept {
            Some(kept) => kept,
            None => {
                all = (0..experts).collect();
                &all
            }
        };
        for (path, name, shape) in
            [("gate_up", "w1", [2 * ffn, hidden]), ("down", "w2", [hidden, ffn])]
        {
            sources.push(ParameterSource {
                path: format!("blocks.{new}.moe.experts.{path}"),
                names: experts
                    .iter()
                    .map(|e| format!("model.layers.{old}.mlp.experts.{name}.{e}.weight"))
                    .collect(),
                shape: shape.to_vec(),
                layout: TensorLayout::StackedTransposed,
                rows: None,
            });
        }
        sources
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{YuanModel, named};

    #[test]
    fn the_sources_are_the_parameters_of_the_model() {
        for config in [
            YuanConfig::tiny(96),
            YuanConfig { filter_bias: true, localized_filter: true, ..YuanConfig::tiny(96) },
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
        let without_filter = YuanConfig { localized_filter: false, ..YuanConfig::tiny(96) };
        let uneven =
            YuanConfig { filter_bias: true, experts_per_layer: vec![8, 3, 2], ..attention.clone() };
        let biased = YuanConfig { router_selection_bias: true, ..uneven.clone() };
        for config in [YuanConfig::tiny(96), attention, without_filter, uneven, biased] {
            let model = YuanModel::new(&config, &Device::default()).unwrap();
            let built: usize =
                named::parameter_names(&model).iter().map(|name| name.shape.num_elements()).sum();
            assert_eq!(built as u64, config.parameter_count().total(), "{config:?}");
        }
    }
}
