//! What a run of reinforcement learning is, beside the settings of its training.

use serde::{Deserialize, Serialize};
use yuan_model::{GenerationOptions, generate::Sampling};
use yuan_train::{TrainConfig, TrainError};

use crate::{Order, RapoLoss, RepetitionLimits};

/// Settings of the rollouts and of what is learnt from them.
///
/// Those of an update are the [`TrainConfig`]'s: its rows are the answers to
/// [`mini_batch`](Self::mini_batch) prompts, in micro-batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RlConfig {
    /// Prompts that are answered before the model changes.
    pub prompts: usize,
    /// Answers to each prompt: G.
    pub answers: usize,
    /// Prompts of an update.
    pub mini_batch: usize,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// The loss of an update.
    pub loss: RapoLoss,
    /// In which order prompts are learnt from.
    pub order: Order,
    /// Answers that are cut off count nothing, and yet stay in the denominator of the loss (overlong
    /// filter).
    pub filter_cut_off: bool,
    /// When an answer that repeats itself is ended; none: never.
    pub repetition: Option<RepetitionLimits>,
    /// Batches of prompts in a row that may teach nothing, because all answers to a prompt are rewarded
    /// alike.
    pub attempts: u64,
    /// Answers that are drawn at the same time, all to one prompt at least; what does not fit waits, to
    /// bound memory.
    pub at_once: usize,
    /// Prompts are turns of a conversation, written by the model's chat template.
    pub chat: bool,
    /// Steps between measurements on held-out prompts; none: only at the beginning and the end.
    pub measure_every: Option<u64>,
}

/// Answers of a round or an update at most: they are in memory together. The papers' are 6,144.
const MOST_ANSWERS: usize = 1 << 20;

impl Default for RlConfig {
    /// For a toy. The papers' answers are 8 as here; their prompts 768 (Ultra) and 512 (Flash), their
    /// mini-batches 96 and 64, their answers 16,384 tokens at most.
    fn default() -> Self {
        Self {
            prompts: 32,
            answers: 8,
            mini_batch: 8,
            max_new_tokens: 128,
            loss: RapoLoss::default(),
            order: Order::default(),
            filter_cut_off: true,
            repetition: Some(RepetitionLimits::default()),
            attempts: 10,
            at_once: 256,
            chat: false,
            measure_every: Some(10),
        }
    }
}

impl RlConfig {
    /// Answers that an update learns from: rows of all its micro-batches.
    pub fn rows_per_step(&self) -> usize {
        self.mini_batch.saturating_mul(self.answers)
    }

    /// How answers are drawn: by the model's own probabilities, which are those that an update changes.
    pub fn generation(&self, stop_tokens: Vec<u32>, seed: u64) -> GenerationOptions {
        GenerationOptions {
            max_new_tokens: self.max_new_tokens,
            sampling: Sampling::unchanged(),
            stop_tokens,
            seed,
            ..GenerationOptions::default()
        }
    }

    /// Checks the settings, and that those of the training fit them.
    ///
    /// # Errors
    ///
    /// Names the setting that is out of range.
    pub fn validate(&self, training: &TrainConfig) -> Result<(), TrainError> {
        let counts = [
            ("prompts", self.prompts as u64),
            ("mini_batch", self.mini_batch as u64),
            ("max_new_tokens", self.max_new_tokens as u64),
            ("attempts", self.attempts),
            ("at_once", self.at_once as u64),
            ("measure_every", self.measure_every.unwrap_or(1)),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, value)| *value == 0) {
            return Err(TrainError::Zero { name });
        }
        let too_many = |name, count: Option<usize>| match count {
            Some(count) if count <= MOST_ANSWERS => Ok(()),
            count => Err(TrainError::OutOfRange {
                name,
                value: count.map_or(f64::INFINITY, |count| count as f64),
                expected: format!("must be at most {MOST_ANSWERS}: take fewer"),
            }),
        };
        too_many("answers to all prompts", self.prompts.checked_mul(self.answers))?;
        too_many("answers of an update", self.mini_batch.checked_mul(self.answers))?;
        let refuse = |name, value: f64, expected: String| {
            Err(TrainError::OutOfRange { name, value, expected })
        };
        if self.mini_batch > self.prompts {
            let expected = format!("must be at most the {} prompts of a round", self.prompts);
            return refuse("mini_batch", self.mini_batch as f64, expected);
        }
        if self.answers < 2 {
            let within = "must be at least 2: answers are compared with the others to their prompt";
            return refuse("answers", self.answers as f64, within.into());
        }
        let RapoLoss { clip_low, clip_high, share, .. } = self.loss;
        if !(0.0..1.0).contains(&clip_low) {
            return refuse("clip_low", clip_low, "must be in [0, 1)".into());
        }
        if !(clip_high >= 0.0 && clip_high.is_finite()) {
            return refuse("clip_high", clip_high, "must not be negative".into());
        }
        if !(share > 0.0 && share <= 1.0) {
            return refuse("share", share, "must be above 0 and at most 1".into());
        }
        if let Some(limits) = self.repetition
            && [limits.part, limits.times, limits.every].contains(&0)
        {
            return Err(TrainError::Zero { name: "part, times and every of repetition" });
        }
        let rows = training.batch_size.saturating_mul(training.accumulation);
        if rows != self.rows_per_step() {
            let expected = format!(
                "must be the {} answers to the {} prompts of an update: batch_size times \
                 accumulation",
                self.rows_per_step(),
                self.mini_batch
            );
            return refuse("rows of a step", rows as f64, expected);
        }
        if self.max_new_tokens >= training.seq_len {
            let expected =
                format!("must be below seq_len = {}, which holds the prompt too", training.seq_len);
            return refuse("max_new_tokens", self.max_new_tokens as f64, expected);
        }
        Ok(())
    }
}
