//! What a run is: everything that decides its losses, saved beside its checkpoints.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use burn::tensor::FloatDType;
use yuan_model::BalanceLosses;

use crate::{TrainError, callback::LaepConfig};

/// Settings of a pre-training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Tokens of a row.
    pub seq_len: usize,
    /// Micro-batches whose gradients are averaged into one step.
    pub accumulation: usize,
    /// Peak learning rate, reached after the warm-up.
    pub learning_rate: f64,
    /// Learning rate at the end of the run.
    pub min_learning_rate: f64,
    /// Steps of linear warm-up from zero.
    pub warmup_steps: u64,
    /// Decay of AdamW's first moment.
    pub beta_1: f64,
    /// Decay of AdamW's second moment.
    pub beta_2: f64,
    /// AdamW's ε.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices; norms and biases have none.
    pub weight_decay: f64,
    /// Largest global norm of the gradient.
    pub clip_norm: f64,
    /// Decides initial weights, order of the data and dropout.
    pub seed: u64,
    /// Steps between validations; 0: only at the end.
    pub validate_every: u64,
    /// Micro-batches of one validation.
    pub validation_batches: usize,
    /// Steps between checkpoints; 0: only at the end.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// Layer-adaptive expert pruning.
    pub laep: LaepConfig,
    /// Coefficients of the losses that pull the experts towards equal load.
    #[serde(default)]
    pub balance: BalanceLosses,
    /// Type of activations and products; parameters, their moments and what is sensitive stay in
    /// f32.
    #[serde(default)]
    pub precision: Precision,
    /// Keep the inputs of the layers only and compute each layer again for its gradients: less
    /// memory, a third more arithmetic.
    #[serde(default)]
    pub recompute: bool,
    /// Batches in a row whose loss or gradient is no number: up to so many are left out, then the
    /// run ends.
    #[serde(default = "most_skipped")]
    pub max_skipped: u64,
    /// How far the routers' selection biases move after a step
    /// ([`BalanceBias`](crate::callback::BalanceBias)).
    #[serde(default)]
    pub bias_update_rate: f64,
}

/// Type of activations and products.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits everywhere.
    #[default]
    F32,
    /// 16 bits with the range of 32: parameters and moments stay in f32, as do router, norms,
    /// softmax and loss.
    Bf16,
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            other => Err(format!("f32 or bf16, not {other}")),
        }
    }
}

impl Precision {
    /// The type to compute in.
    pub fn dtype(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
        }
    }
}

fn most_skipped() -> u64 {
    5
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 240,
            batch_size: 8,
            seq_len: 256,
            accumulation: 1,
            learning_rate: 1e-3,
            min_learning_rate: 1e-4,
            warmup_steps: 20,
            beta_1: 0.9,
            beta_2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            seed: 0,
            validate_every: 20,
            validation_batches: 8,
            checkpoint_every: 60,
            keep_checkpoints: 2,
            laep: LaepConfig::default(),
            balance: BalanceLosses::default(),
            precision: Precision::F32,
            recompute: false,
            max_skipped: most_skipped(),
            bias_update_rate: 0.0,
        }
    }
}

impl TrainConfig {
    /// Tokens of one optimizer step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch_size * self.seq_len * self.accumulation
    }

    /// Learning rate of a step, counted from 0: linear warm-up, then half a cosine.
    ///
    /// It is a function of the step alone, so a resumed run needs no scheduler state.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let rest = (self.steps.saturating_sub(self.warmup_steps)).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / rest).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// Names the setting that is out of range.
    pub fn validate(&self) -> Result<(), TrainError> {
        let refuse = |message: String| Err(TrainError::Setting(message));
        let counts = [
            ("steps", self.steps),
            ("batch_size", self.batch_size as u64),
            ("seq_len", self.seq_len as u64),
            ("accumulation", self.accumulation as u64),
            ("validation_batches", self.validation_batches as u64),
            ("keep_checkpoints", self.keep_checkpoints as u64),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return refuse(format!("{name} must be at least 1"));
        }
        let positive = [
            ("learning_rate", self.learning_rate),
            ("epsilon", self.epsilon),
            ("clip_norm", self.clip_norm),
        ];
        if let Some((name, value)) =
            positive.iter().find(|(_, value)| !(*value > 0.0 && value.is_finite()))
        {
            return refuse(format!("{name} = {value} must be positive"));
        }
        let shares = [("beta_1", self.beta_1), ("beta_2", self.beta_2)];
        if let Some((name, value)) = shares.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            return refuse(format!("{name} = {value} must be in [0, 1)"));
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return refuse(format!("weight_decay = {} must not be negative", self.weight_decay));
        }
        if !(0.0..=self.learning_rate).contains(&self.min_learning_rate) {
            return refuse(format!(
                "min_learning_rate = {} must be between 0 and learning_rate = {}",
                self.min_learning_rate, self.learning_rate
            ));
        }
        let coefficients = [
            ("the auxiliary loss's coefficient", self.balance.auxiliary),
            ("the sequence-wise loss's coefficient", self.balance.sequence),
            ("the router z-loss's coefficient", self.balance.router_z),
            ("bias_update_rate", self.bias_update_rate),
        ];
        if let Some((name, value)) =
            coefficients.iter().find(|(_, value)| !(*value >= 0.0 && value.is_finite()))
        {
            return refuse(format!("{name} = {value} must not be negative"));
        }
        self.laep.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_then_falls_along_half_a_cosine() {
        let config = TrainConfig {
            steps: 110,
            warmup_steps: 10,
            learning_rate: 1.0,
            min_learning_rate: 0.2,
            ..TrainConfig::default()
        };
        let at = |step| config.learning_rate_at(step);
        assert!((at(0) - 0.1).abs() < 1e-12 && (at(9) - 1.0).abs() < 1e-12);
        assert!((at(10) - 1.0).abs() < 1e-12);
        assert!((at(60) - 0.6).abs() < 1e-12, "half way down");
        assert!((at(35) - (0.2 + 0.8 * 0.853_553_390_593_273_8)).abs() < 1e-12);
        assert!((at(110) - 0.2).abs() < 1e-12 && (at(500) - 0.2).abs() < 1e-12);
        assert!((0..109).all(|step| step < 9 || at(step + 1) <= at(step)));
    }

    #[test]
    fn a_bad_setting_is_named() {
        let bad = TrainConfig { batch_size: 0, ..TrainConfig::default() };
        assert_eq!(bad.validate().unwrap_err().to_string(), "batch_size must be at least 1");
        let bad = TrainConfig { learning_rate: f64::NAN, ..TrainConfig::default() };
        assert_eq!(bad.validate().unwrap_err().to_string(), "learning_rate = NaN must be positive");
        let bad = TrainConfig { beta_2: 1.0, ..TrainConfig::default() };
        assert_eq!(bad.validate().unwrap_err().to_string(), "beta_2 = 1 must be in [0, 1)");
    }
}
