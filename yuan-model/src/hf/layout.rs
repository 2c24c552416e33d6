//! Names and layouts of checkpoint tensors: what every parameter of the model is made of.

use std::ops::Range;

use super::vision::image_sources;
use crate::{RouterType, YuanConfig};

/// How a parameter is laid out in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorLayout {
    /// As it is here.
    Same,
    /// `[out, in, …]` there, `[in · …, out]` here; the patch embedding is stored as a convolution.
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
    /// A whole parameter, as one tensor.
    pub(super) fn whole(path: &str, name: &str, shape: &[usize], layout: TensorLayout) -> Self {
        let (path, names, shape) = (path.into(), vec![name.into()], shape.to_vec());
        Self { path, names, shape, layout, rows: None }
    }

    /// Elements of a row of its tensor; of a filter convolution, those of one tap.
    pub(super) fn columns(&self) -> usize {
        match self.layout {
            TensorLayout::Taps => self.shape[1],
            _ => self.shape[1..].iter().product(),
        }
    }

    /// Shape of the parameter.
    pub fn parameter_shape(&self) -> Vec<usize> {
        let rows = self.rows.as_ref().map_or(self.shape[0], Vec::len);
        match self.layout {
            TensorLayout::Same => {
                let mut shape = self.shape.clone();
                shape[0] = rows;
                shape
            }
            TensorLayout::Transposed => vec![self.columns(), rows],
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
        let whole = ParameterSource::whole;
        let mut sources = vec![whole(
            "embedding.weight",
            "model.embed_tokens.weight",
            &[vocab, hidden],
            TensorLayout::Same,
        )];
        for (new, old) in layers.enumerate() {
            sources.extend(LayerSources::of(
                self,
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
        if let Some(images) = &self.images {
            sources.extend(image_sources(images, self));
        }
        sources
    }
}

/// The sources of one layer's parameters, in the order of the model.
struct LayerSources<'a> {
    config: &'a YuanConfig,
    /// Index of the layer in the model that is built.
    new: usize,
    /// Its index in the files.
    old: usize,
    /// Old indices of the experts that are taken; all of them if absent.
    kept: Option<&'a [usize]>,
    sources: Vec<ParameterSource>,
}

impl<'a> LayerSources<'a> {
    fn of(
        config: &'a YuanConfig,
        new: usize,
        old: usize,
        kept: Option<&'a [usize]>,
    ) -> Vec<ParameterSource> {
        let mut layer = Self { config, new, old, kept, sources: Vec::new() };
        let width = [config.hidden_size];
        layer.add("attention_norm.weight", "input_layernorm.weight", &width, TensorLayout::Same);
        if config.localized_filter {
            layer.add_filter();
        }
        layer.add_projections();
        layer.add("moe_norm.weight", "post_attention_layernorm.weight", &width, TensorLayout::Same);
        layer.add_router();
        layer.add_experts();
        layer.sources
    }

    fn add(&mut self, path: &str, name: &str, shape: &[usize], layout: TensorLayout) {
        let path = format!("blocks.{}.{path}", self.new);
        let name = format!("model.layers.{}.{name}", self.old);
        self.sources.push(ParameterSource::whole(&path, &name, shape, layout));
    }

    fn add_filter(&mut self) {
        let (filter, gate) = ("attention.filter", "self_attn.lf_gate");
        let hidden = self.config.hidden_size;
        for (conv, d_in, d_out) in [("conv1", hidden, hidden / 2), ("conv2", hidden / 2, hidden)] {
            let (path, name) = (format!("{filter}.{conv}"), format!("{gate}.{conv}"));
            let (weight, taps) = ([d_out, d_in, 2, 1], TensorLayout::Taps);
            self.add(&format!("{path}.weight"), &format!("{name}.weight"), &weight, taps);
            if self.config.filter_bias {
                let (path, name) = (format!("{path}.bias"), format!("{name}.bias"));
                self.add(&path, &name, &[d_out], TensorLayout::Same);
            }
        }
        let (path, name) =
            (format!("{filter}.output_norm.weight"), format!("{gate}.output_layernorm.weight"));
        self.add(&path, &name, &[hidden], TensorLayout::Same);
    }

    fn add_projections(&mut self) {
        let (hidden, projection) = (self.config.hidden_size, self.config.attention_projection_size);
        let projections = [
            ("query_key", "get_query_key", [2 * projection, hidden]),
            ("value", "v_proj", [projection, hidden]),
            ("output", "o_proj", [hidden, projection]),
        ];
        for (path, name, shape) in projections {
            let (path, name) =
                (format!("attention.{path}.weight"), format!("self_attn.{name}.weight"));
            self.add(&path, &name, &shape, TensorLayout::Transposed);
        }
    }

    /// Rows of the router are experts, in as many blocks as the router has: the kept ones are read.
    fn add_router(&mut self) {
        let experts = self.config.experts_per_layer[self.old];
        let (name, blocks) = match self.config.router_type {
            RouterType::Attention => ("mlp.router.query_key_value.weight", 3),
            RouterType::Linear => ("mlp.router.weight", 1),
        };
        let shape = [blocks * experts, self.config.hidden_size];
        self.add("moe.router.weight", name, &shape, TensorLayout::Transposed);
        self.keep_rows(blocks, experts);
        if self.config.router_selection_bias {
            // The name that DeepSeek-V3's checkpoints have for it; published Yuan models have none.
            let name = "mlp.router.e_score_correction_bias";
            self.add("moe.router.selection_bias", name, &[experts], TensorLayout::Same);
            self.keep_rows(1, experts);
        }
    }

    /// Of the source that was added last, only the rows of kept experts are read.
    fn keep_rows(&mut self, blocks: usize, experts: usize) {
        let (Some(kept), Some(source)) = (self.kept, self.sources.last_mut()) else { return };
        let mut rows = Vec::with_capacity(blocks * kept.len());
        for block in 0..blocks {
            rows.extend(kept.iter().map(|expert| block * experts + expert));
        }
        source.rows = Some(rows);
    }

    /// Every expert has tensors of its own in the files; here they are stacked.
    fn add_experts(&mut self) {
        let (hidden, width) = (self.config.hidden_size, self.config.expert_hidden_size);
        let experts = match self.kept {
            Some(kept) => kept.to_vec(),
            None => (0..self.config.experts_per_layer[self.old]).collect(),
        };
        for (path, name, shape) in
            [("gate_up", "w1", [2 * width, hidden]), ("down", "w2", [hidden, width])]
        {
            let mut names = Vec::with_capacity(experts.len());
            for expert in &experts {
                names.push(format!("model.layers.{}.mlp.experts.{name}.{expert}.weight", self.old));
            }
            self.sources.push(ParameterSource {
                path: format!("blocks.{}.moe.experts.{path}", self.new),
                names,
                shape: shape.to_vec(),
                layout: TensorLayout::StackedTransposed,
                rows: None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{
        YuanModel, named,
        vision::{ImageConfig, VisionNormType},
    };

    #[test]
    fn the_sources_are_the_parameters_of_the_model() {
        let mut other_norms = ImageConfig::tiny(3);
        other_norms.tower.norm_type = VisionNormType::RmsNorm;
        (other_norms.tower.qk_normalization, other_norms.tower.qkv_bias) = (true, false);
        for config in [
            YuanConfig::tiny(96),
            YuanConfig { filter_bias: true, localized_filter: true, ..YuanConfig::tiny(96) },
            YuanConfig { router_selection_bias: true, ..YuanConfig::tiny(96) },
            YuanConfig { images: Some(ImageConfig::tiny(3)), ..YuanConfig::tiny(96) },
            YuanConfig { images: Some(other_norms), ..YuanConfig::tiny(96) },
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
        let seeing = YuanConfig { images: Some(ImageConfig::tiny(3)), ..YuanConfig::tiny(96) };
        for config in [YuanConfig::tiny(96), attention, without_filter, uneven, biased, seeing] {
            let model = YuanModel::new(&config, &Device::default()).unwrap();
            let built: usize =
                named::parameter_names(&model).iter().map(|name| name.shape.num_elements()).sum();
            assert_eq!(built as u64, config.parameter_count().total(), "{config:?}");
        }
    }
}
