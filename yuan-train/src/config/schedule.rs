//! How the learning rate goes on after the warm-up.

use serde::{Deserialize, Serialize};

use crate::TrainError;

/// How the learning rate goes on after the warm-up, between the peak and the lowest rate.
///
/// Every schedule is a function of the step, so that nothing of it is saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Down along half a cosine, to the lowest rate at the end of the run.
    #[default]
    Cosine,
    /// At the peak to the end.
    Constant,
    /// Warm-up, stable, decay: at the peak, then down in a straight line over the last steps. Up to
    /// these, the rates do not depend on the length of the run, so it can be extended from any
    /// checkpoint before them as if it had been longer from the start.
    WarmupStableDecay {
        /// Steps of the descent.
        decay_steps: u64,
    },
}

impl Schedule {
    /// Where the rate is between the lowest (0) and the peak (1), after the warm-up.
    pub(super) fn height(self, step: u64, warmup_steps: u64, steps: u64) -> f64 {
        match self {
            Self::Constant => 1.0,
            Self::Cosine => {
                let rest = steps.saturating_sub(warmup_steps).max(1) as f64;
                let progress = ((step - warmup_steps) as f64 / rest).min(1.0);
                0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
            Self::WarmupStableDecay { decay_steps } => {
                let left = steps.saturating_sub(step);
                if left >= decay_steps { 1.0 } else { left as f64 / decay_steps as f64 }
            }
        }
    }

    pub(super) fn validate(self, warmup_steps: u64, steps: u64) -> Result<(), TrainError> {
        let Self::WarmupStableDecay { decay_steps } = self else { return Ok(()) };
        if decay_steps == 0 {
            return Err(TrainError::Zero { name: "decay_steps" });
        }
        let room = steps.saturating_sub(warmup_steps);
        match decay_steps <= room {
            true => Ok(()),
            false => Err(TrainError::OutOfRange {
                name: "decay_steps",
                value: decay_steps as f64,
                expected: format!("must be at most the {room} steps after the warm-up"),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{Schedule, TrainConfig};

    fn config(schedule: Schedule, steps: u64) -> TrainConfig {
        TrainConfig {
            steps,
            warmup_steps: 10,
            learning_rate: 1.0,
            min_learning_rate: 0.2,
            schedule,
            ..TrainConfig::default()
        }
    }

    #[test]
    fn a_stable_rate_falls_in_a_straight_line_at_the_end_alone() {
        let config = |steps| config(Schedule::WarmupStableDecay { decay_steps: 20 }, steps);
        let at = |step| config(100).learning_rate_at(step);
        assert!((at(4) - 0.5).abs() < 1e-12, "warm-up");
        assert!((10..=80).all(|step| at(step) == 1.0));
        assert!((at(90) - 0.6).abs() < 1e-12, "half way down");
        assert!((at(100) - 0.2).abs() < 1e-12 && (at(500) - 0.2).abs() < 1e-12);
        // A longer run has the same rates up to there.
        assert!((0..80).all(|step| config(1000).learning_rate_at(step) == at(step)));
    }

    #[test]
    fn a_constant_rate_stays() {
        let config = config(Schedule::Constant, 100);
        assert!((10..200).all(|step| config.learning_rate_at(step) == 1.0));
    }

    #[test]
    fn a_descent_that_is_longer_than_the_run_is_refused() {
        let refused = |decay_steps| {
            config(Schedule::WarmupStableDecay { decay_steps }, 100).validate().unwrap_err()
        };
        let error = refused(91).to_string();
        assert_eq!(error, "decay_steps = 91 must be at most the 90 steps after the warm-up");
        assert_eq!(refused(0).to_string(), "decay_steps must be at least 1");
    }

    #[test]
    fn settings_without_a_schedule_fall_along_a_cosine() {
        let mut old = serde_json::to_value(TrainConfig::default()).unwrap();
        old.as_object_mut().unwrap().remove("schedule");
        let read: TrainConfig = serde_json::from_value(old).unwrap();
        assert_eq!(read.schedule, Schedule::Cosine);
        let written = serde_json::to_value(Schedule::WarmupStableDecay { decay_steps: 7 }).unwrap();
        assert_eq!(written, serde_json::json!({"warmup_stable_decay": {"decay_steps": 7}}));
    }
}
