//! The image tower: patches to tokens, and attention among the tokens of a tile.

use burn::{
    module::{Initializer, Module, Param},
    nn::{Linear, LinearConfig},
    tensor::{Device, FloatDType, Tensor, TensorData},
};

use super::{VisionConfig, VisionNormType, cubic::cubic};
use crate::{ConfigError, attention::project, norm::RmsNorm, ops};

/// An `InternViT` tower.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use yuan_model::vision::{VisionConfig, VisionTower};
///
/// let config = VisionConfig {
///     hidden_size: 32,
///     intermediate_size: 64,
///     num_hidden_layers: 2,
///     num_attention_heads: 4,
///     image_size: 28,
///     patch_size: 7,
///     ..VisionConfig::intern_vit_300m()
/// };
/// let tower = VisionTower::new(&config, &Device::flex())?;
/// let tiles = Tensor::zeros([2, 3, 28, 28], &Device::flex());
/// // A class token and 4 × 4 patches.
/// assert_eq!(tower.forward(tiles).dims(), [2, 17, 32]);
/// # Ok::<(), yuan_model::ConfigError>(())
/// ```
#[derive(Module, Debug)]
pub struct VisionTower {
    /// `[channels · patch · patch, width]`, with a bias.
    pub patch: Linear,
    /// The token before the patches, `[1, 1, width]`.
    pub class_embedding: Param<Tensor<3>>,
    /// Positions of the class token and of the patches of a tile, `[1, 1 + grid², width]`.
    pub position_embedding: Param<Tensor<3>>,
    /// The blocks, first one first.
    pub blocks: Vec<VisionBlock>,
    #[module(skip)]
    config: VisionConfig,
}

/// `γ ⊙ (x − mean(x)) / sqrt(var(x) + ε) + β` over the last axis, computed in f32.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// γ, `[width]`, initially one.
    pub gamma: Param<Tensor<1>>,
    /// β, `[width]`, initially zero.
    pub beta: Param<Tensor<1>>,
    epsilon: f64,
}

impl LayerNorm {
    fn new(width: usize, epsilon: f64, device: &Device) -> Self {
        let (gamma, beta) = (Initializer::Ones, Initializer::Zeros);
        Self { gamma: gamma.init([width], device), beta: beta.init([width], device), epsilon }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [gamma, beta] =
            [&self.gamma, &self.beta].map(|param| param.val().cast(FloatDType::F32));
        on_rows(x, |x| ops::layer_norm(x, gamma, beta, self.epsilon))
    }
}

/// A norm by its kind.
#[derive(Module, Debug)]
pub struct VisionNorm {
    /// With mean and bias.
    pub layer: Option<LayerNorm>,
    /// By the root of the mean square.
    pub rms: Option<RmsNorm>,
}

impl VisionNorm {
    fn new(config: &VisionConfig, device: &Device) -> Self {
        let (width, epsilon) = (config.hidden_size, config.layer_norm_eps);
        match config.norm_type {
            VisionNormType::LayerNorm => {
                Self { layer: Some(LayerNorm::new(width, epsilon, device)), rms: None }
            }
            VisionNormType::RmsNorm => {
                Self { layer: None, rms: Some(RmsNorm::new(width, epsilon, device)) }
            }
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match (&self.layer, &self.rms) {
            (Some(norm), _) => norm.forward(x),
            (None, Some(norm)) => norm.forward(x),
            (None, None) => x,
        }
    }
}

/// One block: `x + ls1 ⊙ Attention(norm1(x))`, then `x + ls2 ⊙ MLP(norm2(x))`.
#[derive(Module, Debug)]
pub struct VisionBlock {
    /// Norm before attention.
    pub norm1: VisionNorm,
    /// Queries, keys and values one after the other, `[width, 3 · width]`.
    pub qkv: Linear,
    /// Norm of all heads' queries together, if there is one.
    pub q_norm: Option<RmsNorm>,
    /// Norm of all heads' keys together, if there is one.
    pub k_norm: Option<RmsNorm>,
    /// `[width, width]`
    pub proj: Linear,
    /// Norm before the perceptron.
    pub norm2: VisionNorm,
    /// `[width, inner]`
    pub fc1: Linear,
    /// `[inner, width]`
    pub fc2: Linear,
    /// Layer scale of attention, `[width]`.
    pub ls1: Param<Tensor<1>>,
    /// Layer scale of the perceptron, `[width]`.
    pub ls2: Param<Tensor<1>>,
    #[module(skip)]
    heads: usize,
}

impl VisionBlock {
    fn new(config: &VisionConfig, device: &Device) -> Self {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let linear = |from: usize, to: usize, bias: bool| {
            LinearConfig::new(from, to)
                .with_bias(bias)
                .with_initializer(Initializer::Normal { mean: 0.0, std: 0.02 })
                .init(device)
        };
        let norm =
            || config.qk_normalization.then(|| RmsNorm::new(width, config.layer_norm_eps, device));
        let scale =
            || Initializer::Constant { value: config.initializer_factor }.init([width], device);
        Self {
            norm1: VisionNorm::new(config, device),
            qkv: linear(width, 3 * width, config.qkv_bias),
            q_norm: norm(),
            k_norm: norm(),
            proj: linear(width, width, true),
            norm2: VisionNorm::new(config, device),
            fc1: linear(width, inner, true),
            fc2: linear(inner, width, true),
            ls1: scale(),
            ls2: scale(),
            heads: config.num_attention_heads,
        }
    }

    /// `[tiles, tokens, width]` → the same.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let attended = self.attend(self.norm1.forward(x.clone()));
        let x = add_scaled(x, attended, &self.ls1);
        let inner = on_rows(linear(&self.fc1, self.norm2.forward(x.clone())), ops::gelu);
        add_scaled(x, linear(&self.fc2, inner), &self.ls2)
    }

    fn attend(&self, x: Tensor<3>) -> Tensor<3> {
        let width = x.dims()[2];
        let qkv = linear(&self.qkv, x);
        let part = |index: usize| qkv.clone().slice_dim(2, index * width..(index + 1) * width);
        let qkv = match (&self.q_norm, &self.k_norm) {
            (Some(q_norm), Some(k_norm)) => {
                let (query, key) = (q_norm.forward(part(0)), k_norm.forward(part(1)));
                Tensor::cat(vec![query, key, part(2)], 2)
            }
            _ => qkv,
        };
        linear(&self.proj, ops::full_attention(qkv, self.heads))
    }
}

impl VisionTower {
    /// A tower with fresh weights.
    ///
    /// # Errors
    ///
    /// If the configuration contradicts itself.
    pub fn new(config: &VisionConfig, device: &Device) -> Result<Self, ConfigError> {
        config.validate()?;
        let width = config.hidden_size;
        let normal = Initializer::Normal { mean: 0.0, std: 1.0 };
        Ok(Self {
            patch: LinearConfig::new(config.num_channels * config.patch_size.pow(2), width)
                .init(device),
            class_embedding: normal.init([1, 1, width], device),
            position_embedding: normal.init([1, config.grid().pow(2) + 1, width], device),
            blocks: (0..config.num_hidden_layers)
                .map(|_| VisionBlock::new(config, device))
                .collect(),
            config: config.clone(),
        })
    }

    /// What the tower is.
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// Tokens of tiles `[tiles, channels, height, width]` before the first block: `[tiles, 1 + patches,
    /// width]`, the class token first, patches row by row. The type of the pixels is the one that the
    /// tower computes in.
    ///
    /// # Panics
    ///
    /// If a side is no number of patches.
    pub fn embed(&self, pixels: Tensor<4>) -> Tensor<3> {
        let [tiles, channels, height, width] = pixels.dims();
        let patch = self.config.patch_size;
        assert!(
            height.is_multiple_of(patch) && width.is_multiple_of(patch),
            "{width} x {height} pixels are no number of patches of {patch}"
        );
        let (rows, columns) = (height / patch, width / patch);
        let patches = pixels
            .reshape([tiles, channels, rows, patch, columns, patch])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([tiles, rows * columns, channels * patch * patch]);
        let dtype = FloatDType::from(patches.dtype());
        let class = self.class_embedding.val().cast(dtype);
        let class = class.expand([tiles, 1, self.config.hidden_size]);
        let tokens = Tensor::cat(vec![class, linear(&self.patch, patches)], 1);
        tokens + self.positions(rows, columns).cast(dtype)
    }

    /// Positions of a grid of patches, `[1, 1 + rows · columns, width]`: those of a tile, or stretched
    /// to another grid.
    fn positions(&self, rows: usize, columns: usize) -> Tensor<3> {
        let (grid, width) = (self.config.grid(), self.config.hidden_size);
        let learnt = self.position_embedding.val();
        if (rows, columns) == (grid, grid) {
            return learnt;
        }
        let device = learnt.device();
        let stretch = |to: usize| -> Tensor<2> {
            let weights = cubic_weights(grid, to);
            Tensor::from_data(TensorData::new(weights, [to, grid]), &device)
        };
        let class = learnt.clone().slice_dim(1, 0..1);
        let table = learnt.slice_dim(1, 1..grid * grid + 1).reshape([grid, grid * width]);
        let table = stretch(rows).matmul(table).reshape([rows, grid, width]);
        let table = table.swap_dims(0, 1).reshape([grid, rows * width]);
        let table = stretch(columns).matmul(table).reshape([columns, rows, width]);
        let table = table.swap_dims(0, 1).reshape([1, rows * columns, width]);
        Tensor::cat(vec![class, table], 1)
    }

    /// Tokens after the last block, `[tiles, 1 + patches, width]`.
    ///
    /// # Panics
    ///
    /// As [`embed`](Self::embed).
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.blocks.iter().fold(self.embed(pixels), |x, block| block.forward(x))
    }
}

/// A product with a bias, if there is one, in the type of `x`.
fn linear(linear: &Linear, x: Tensor<3>) -> Tensor<3> {
    let dtype = FloatDType::from(x.dtype());
    let product = project(linear, x);
    match &linear.bias {
        Some(bias) => on_rows(product, |x| ops::add_bias(x, bias.val().cast(dtype))),
        None => product,
    }
}

/// `x + branch ⊙ scale`.
fn add_scaled(x: Tensor<3>, branch: Tensor<3>, scale: &Param<Tensor<1>>) -> Tensor<3> {
    let scale = scale.val().cast(FloatDType::from(x.dtype()));
    let branch = branch.flatten(0, 1);
    on_rows(x, |x| ops::add_scaled(x, branch, scale))
}

/// An operation on the tokens of all tiles, `[tiles, tokens, width]`, as rows.
fn on_rows(x: Tensor<3>, operation: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<3> {
    let [tiles, tokens, width] = x.dims();
    operation(x.reshape([tiles * tokens, width])).reshape([tiles, tokens, width])
}

/// Weights of cubic convolution (Keys 1981, a = −0.75) from `from` values to `to`, by the middles of
/// both, values behind an end being the last one: `[to, from]`.
fn cubic_weights(from: usize, to: usize) -> Vec<f32> {
    const A: f64 = -0.75;
    let mut weights = vec![0.0; to * from];
    for place in 0..to {
        let at = (place as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let first = at.floor() as i64 - 1;
        for index in first..first + 4 {
            let source = index.clamp(0, from as i64 - 1) as usize;
            weights[place * from + source] += cubic(A, at - index as f64) as f32;
        }
    }
    weights
}
