//! Rotary position embedding: halves paired, on the first r dimensions of each head; and its YaRN
//! variant.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{YuanConfig, ops};

/// Rotations that a dimension must complete within the original length to count as fast.
const BETA_FAST: f64 = 32.0;
/// Rotations below which a dimension counts as slow.
const BETA_SLOW: f64 = 1.0;

impl YuanConfig {
    /// `θ_j = base^(−2j/r)`, or its YaRN form; one entry per pair of rotated dimensions.
    pub fn rotary_frequencies(&self) -> Vec<f64> {
        let width = self.rotary_width();
        match &self.yarn {
            None => frequencies(width, self.rotary_base),
            Some(yarn) => {
                yarn_frequencies(width, self.rotary_base, self.max_seq_len, yarn.scale_factor)
            }
        }
    }
}

/// `θ_j = base^(−2j/width)` for `j < width / 2`.
pub fn frequencies(width: usize, base: f64) -> Vec<f64> {
    (0..width / 2).map(|j| base.powf(-2.0 * j as f64 / width as f64)).collect()
}

/// `θ'_j = θ_j / (γ_j · scale + 1 − γ_j)` with the ramp γ of [`yarn_ramp`].
///
/// Upstream blends the periods, not the frequencies as in the YaRN paper.
pub fn yarn_frequencies(width: usize, base: f64, original_length: usize, scale: f64) -> Vec<f64> {
    let ramp = yarn_ramp(width, base, original_length);
    let blend = |(theta, gamma): (f64, f64)| theta / (gamma * scale + (1.0 - gamma));
    frequencies(width, base).into_iter().zip(ramp).map(blend).collect()
}

/// γ: 0 for dimensions that turn often within `original_length`, 1 for those that hardly turn.
pub fn yarn_ramp(width: usize, base: f64, original_length: usize) -> Vec<f64> {
    let dimension = |rotations: f64| {
        let period = original_length as f64 / (rotations * std::f64::consts::TAU);
        width as f64 * period.ln() / (2.0 * base.ln())
    };
    let low = dimension(BETA_FAST).floor().max(0.0);
    let high = dimension(BETA_SLOW).ceil().min(width as f64 - 1.0);
    let high = if high == low { high + 0.001 } else { high };
    (0..width / 2).map(|j| ((j as f64 - low) / (high - low)).clamp(0.0, 1.0)).collect()
}

/// Cosines and sines for the positions of one batch, shared by all layers.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `[batch or 1, seq, 1, r / 2]`
    cos: Tensor<4>,
    /// `[batch or 1, seq, 1, r / 2]`
    sin: Tensor<4>,
}

impl Rotary {
    /// Angles for `position_ids`, `[batch, seq]`, or for `0..seq` alike in every row.
    pub fn new(
        config: &YuanConfig,
        position_ids: Option<Tensor<2, Int>>,
        seq: usize,
        device: &Device,
    ) -> Self {
        let frequencies: Vec<f32> = config.rotary_frequencies().iter().map(|&f| f as f32).collect();
        let position_ids = position_ids
            .unwrap_or_else(|| Tensor::<1, Int>::arange(0..seq as i64, device).unsqueeze::<2>())
            .float();
        let position_ids = match config.position_divisor {
            Some(factor) => position_ids.mul_scalar(1.0 / factor),
            None => position_ids,
        };
        Self::from_frequencies(&frequencies, position_ids)
    }

    /// Angles `position · frequency`, formed in f32; `positions` is `[batch, seq]`.
    pub fn from_frequencies(frequencies: &[f32], positions: Tensor<2>) -> Self {
        let pairs = frequencies.len();
        let device = positions.device();
        let frequencies =
            Tensor::<1>::from_data(TensorData::new(frequencies.to_vec(), [pairs]), &device);
        let angles = positions.unsqueeze_dims::<4>(&[2, 3]) * frequencies.unsqueeze::<4>();
        Self { cos: angles.clone().cos(), sin: angles.sin() }
    }

    /// Cosines, `[batch or 1, seq, 1, r / 2]`.
    pub fn cos(&self) -> Tensor<4> {
        self.cos.clone()
    }

    /// Sines, `[batch or 1, seq, 1, r / 2]`.
    pub fn sin(&self) -> Tensor<4> {
        self.sin.clone()
    }

    /// Rotates the first r dimensions of every head of `[batch, seq, heads, head_dim]`.
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let (cos, sin) = (self.cos().cast(x.dtype()), self.sin().cast(x.dtype()));
        ops::rotate(x, cos, sin)
    }
}
