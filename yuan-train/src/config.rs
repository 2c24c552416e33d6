//! What a run is: everything that decides its losses, saved beside its checkpoints.

use serde::{Deserialize, Deserializer, Serialize};
use yuan_model::{BalanceLosses, Precision};

use crate::{AdamWConfig, LaepConfig, StepWork, TrainError, Trigger};

pub(crate) mod freeze;
pub(crate) mod laep;
pub(crate) mod learns;
pub(crate) mod schedule;

use freeze::Freeze;
use learns::Learns;
use schedule::Schedule;

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
    /// How the learning rate goes on after the warm-up.
    #[serde(default)]
    pub schedule: Schedule,
    /// Which parameters learn.
    #[serde(default)]
    pub learns: Learns,
    /// Parts of a multimodal model that stay as they are.
    #[serde(default)]
    pub freeze: Freeze,
    /// Settings of the optimizer.
    #[serde(flatten)]
    pub optimizer: AdamWConfig,
    /// Largest global norm of the gradient.
    pub clip_norm: f64,
    /// Decides initial weights, order of the data and dropout.
    pub seed: u64,
    /// Steps between validations; absent: only at the end.
    #[serde(default, deserialize_with = "laep::zero_is_absent")]
    pub validate_every: Option<u64>,
    /// Micro-batches of one validation.
    pub validation_batches: usize,
    /// Steps between checkpoints; absent: only at the end.
    #[serde(default, deserialize_with = "laep::zero_is_absent")]
    pub checkpoint_every: Option<u64>,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// Whether checkpoints are written while training goes on, from a copy on the host.
    #[serde(default)]
    pub async_checkpoint: bool,
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
    /// ([`BalanceBias`](crate::BalanceBias)); absent: they stay.
    #[serde(default, deserialize_with = "zero_rate_is_absent")]
    pub bias_update_rate: Option<f64>,
}

/// Tokens of a micro-batch: devices count them in 32 bits.
const MOST_TOKENS: usize = i32::MAX as usize;

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
            schedule: Schedule::Cosine,
            learns: Learns::All,
            freeze: Freeze::default(),
            optimizer: AdamWConfig::default(),
            clip_norm: 1.0,
            seed: 0,
            validate_every: Some(20),
            validation_batches: 8,
            checkpoint_every: Some(60),
            keep_checkpoints: 2,
            async_checkpoint: false,
            laep: LaepConfig::default(),
            balance: BalanceLosses::default(),
            precision: Precision::F32,
            recompute: false,
            max_skipped: most_skipped(),
            bias_update_rate: None,
        }
    }
}

impl TrainConfig {
    /// Tokens of one optimizer step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch_size * self.seq_len * self.accumulation
    }

    /// Learning rate of a step, counted from 0: linear warm-up, then what the
    /// [schedule](Self::schedule) says.
    ///
    /// It is a function of the step alone, so a resumed run needs no scheduler state.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let (peak, lowest) = (self.learning_rate, self.min_learning_rate);
        let height = self.schedule.height(step, self.warmup_steps, self.steps);
        match height {
            1.0 => peak,
            height => lowest + (peak - lowest) * height,
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// Names the setting that is out of range.
    pub fn validate(&self) -> Result<(), TrainError> {
        let counts = [
            ("steps", self.steps),
            ("batch_size", self.batch_size as u64),
            ("seq_len", self.seq_len as u64),
            ("accumulation", self.accumulation as u64),
            ("validation_batches", self.validation_batches as u64),
            ("keep_checkpoints", self.keep_checkpoints as u64),
            ("validate_every", self.validate_every.unwrap_or(1)),
            ("checkpoint_every", self.checkpoint_every.unwrap_or(1)),
        ];
        for (name, value) in counts {
            if value == 0 {
                return Err(TrainError::Zero { name });
            }
        }
        let tokens = self.batch_size.checked_mul(self.seq_len);
        if tokens.is_none_or(|tokens| tokens > MOST_TOKENS) {
            return Err(TrainError::TooManyTokens { rows: self.batch_size, row: self.seq_len });
        }
        let optimizer = &self.optimizer;
        let positive = [
            ("learning_rate", self.learning_rate),
            ("epsilon", optimizer.epsilon),
            ("clip_norm", self.clip_norm),
        ];
        for (name, value) in positive {
            require(value > 0.0 && value.is_finite(), name, value, "must be positive")?;
        }
        for (name, value) in [("beta_1", optimizer.beta_1), ("beta_2", optimizer.beta_2)] {
            require((0.0..1.0).contains(&value), name, value, "must be in [0, 1)")?;
        }
        let (lowest, peak) = (self.min_learning_rate, self.learning_rate);
        let expected = format!("must be between 0 and learning_rate = {peak}");
        require((0.0..=peak).contains(&lowest), "min_learning_rate", lowest, expected)?;
        self.schedule.validate(self.warmup_steps, self.steps)?;
        let coefficients = [
            ("weight_decay", optimizer.weight_decay),
            ("the auxiliary loss's coefficient", self.balance.auxiliary),
            ("the sequence-wise loss's coefficient", self.balance.sequence),
            ("the router z-loss's coefficient", self.balance.router_z),
            ("bias_update_rate", self.bias_update_rate.unwrap_or(0.0)),
        ];
        for (name, value) in coefficients {
            require(value >= 0.0 && value.is_finite(), name, value, "must not be negative")?;
        }
        self.laep.validate()
    }

    /// Refuses settings that prune or rearrange experts, for models that cannot.
    pub(crate) fn refuse_pruning(&self) -> Result<(), TrainError> {
        match self.laep.trigger == Trigger::Never && self.laep.rearrange_every.is_none() {
            true => Ok(()),
            false => Err(TrainError::CannotPrune),
        }
    }

    /// Refuses settings that balance by selection biases, for models that have none.
    pub(crate) fn refuse_bias_balancing(&self) -> Result<(), TrainError> {
        match self.bias_update_rate {
            None => Ok(()),
            Some(_) => Err(TrainError::NoSelectionBias),
        }
    }

    /// What one step computes, for a prediction of its speed.
    pub fn work(&self) -> StepWork {
        StepWork {
            batch_size: self.batch_size,
            seq_len: self.seq_len,
            accumulation: self.accumulation,
            precision: self.precision,
            recompute: self.recompute,
        }
    }
}

/// Refuses a value with a sentence.
fn require(
    holds: bool,
    name: &'static str,
    value: f64,
    expected: impl Into<String>,
) -> Result<(), TrainError> {
    if holds {
        return Ok(());
    }
    Err(TrainError::OutOfRange { name, value, expected: expected.into() })
}

fn zero_rate_is_absent<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    Ok(Option::deserialize(from)?.filter(|&rate| rate != 0.0))
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
        let optimizer = AdamWConfig { beta_2: 1.0, ..AdamWConfig::default() };
        let bad = TrainConfig { optimizer, ..TrainConfig::default() };
        assert_eq!(bad.validate().unwrap_err().to_string(), "beta_2 = 1 must be in [0, 1)");
    }

    #[test]
    fn settings_of_earlier_versions_mean_what_they_meant() {
        let mut old = serde_json::to_value(TrainConfig::default()).unwrap();
        assert_eq!(old["beta_2"], 0.95, "the optimizer's settings stay beside the others");
        for key in ["validate_every", "checkpoint_every", "bias_update_rate"] {
            old[key] = 0.into();
        }
        old["laep"]["rearrange_every"] = 0.into();
        old["laep"]["limits"]["top_k"] = 2.into();
        let read: TrainConfig = serde_json::from_value(old).unwrap();
        let expected =
            TrainConfig { validate_every: None, checkpoint_every: None, ..TrainConfig::default() };
        assert_eq!(read, expected);
    }
}
