//! RIRM: the reflection inhibition reward mechanism.

use serde::{Deserialize, Serialize};

/// What follows the place where a response first states its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstAnswer {
    /// It is stated nowhere.
    Missing,
    /// Nothing: the response ends with it.
    Ends,
    /// The answer is stated so many more times, each of which ends a reflection.
    Followed {
        /// v of the papers.
        reflections: u32,
    },
}

/// Reflections that cost nothing, and from which on they cost all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// `v_min`: up to so many cost nothing.
    pub min: u32,
    /// `v_max`: beyond so many nothing more is lost.
    pub max: u32,
}

impl Bounds {
    /// Those of Ultra, for every prompt.
    pub const ULTRA: Self = Self { min: 0, max: 3 };
    /// Those of Flash for prompts that at least half of the responses solve.
    pub const FLASH_EASY: Self = Self { min: 2, max: 10 };

    /// Those of Flash for a prompt: [`FLASH_EASY`](Self::FLASH_EASY) if at least half of its responses
    /// are right, else the fewest and the most reflections of the responses that are given. The paper
    /// gives all of them, the code those that are right.
    ///
    /// ```
    /// use yuan_rl::Bounds;
    ///
    /// assert_eq!(Bounds::of_flash(0.5, &[7, 9]), Bounds::FLASH_EASY);
    /// assert_eq!(Bounds::of_flash(0.25, &[7, 3, 9]), Bounds { min: 3, max: 9 });
    /// ```
    pub fn of_flash(pass_rate: f64, reflections: &[u32]) -> Self {
        match (reflections.iter().min(), reflections.iter().max()) {
            (Some(&min), Some(&max)) if pass_rate < 0.5 => Self { min, max },
            _ => Self::FLASH_EASY,
        }
    }

    /// How far between the bounds a number of reflections lies, from 0 to 1.
    fn share(self, reflections: u32) -> f64 {
        if reflections <= self.min {
            return 0.0;
        }
        if reflections > self.max {
            return 1.0;
        }
        f64::from(reflections - self.min) / f64::from(self.max - self.min)
    }
}

/// Which of the two published versions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Revision {
    /// Yuan3.0 Flash: a wrong response loses one, however often it reflects.
    Flash,
    /// Yuan3.0 Ultra ("revised RIRM"): a wrong response loses by reflecting.
    #[default]
    Ultra,
}

/// The three parts of the reward (Flash paper, Eq. 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReflectionReward {
    /// `R_ans`: 1 if a first answer was found, else −1.
    pub answer: f64,
    /// `R_ver`: what reflections leave.
    pub verification: f64,
    /// `R_acc`: 1 if the response is right, else −1.
    pub accuracy: f64,
}

impl ReflectionReward {
    /// `R_reflect`, the sum of the three: from −3 to 3.
    pub fn total(self) -> f64 {
        self.answer + self.verification + self.accuracy
    }
}

/// The reward of one response.
///
/// | | `R_ans` | `R_ver` | `R_acc` |
/// |---|---|---|---|
/// | no first answer | −1 | −1 | −1 |
/// | ends with it | 1 | ±1 | ±1 |
/// | v reflections follow, right | 1 | 1 − share | 1 |
/// | v reflections follow, wrong | 1 | −share (Ultra), −1 (Flash) | −1 |
///
/// The share is `(v − v_min) / (v_max − v_min)`, 0 up to `v_min` and 1 beyond `v_max`. In the code, −1 is added
/// when format, language or repetition are penalised; see [`repetition_penalty`](crate::repetition_penalty).
pub fn reflection_reward(
    first: FirstAnswer,
    is_right: bool,
    bounds: Bounds,
    revision: Revision,
) -> ReflectionReward {
    let accuracy = if is_right { 1.0 } else { -1.0 };
    match first {
        FirstAnswer::Missing => {
            ReflectionReward { answer: -1.0, verification: -1.0, accuracy: -1.0 }
        }
        FirstAnswer::Ends => ReflectionReward { answer: 1.0, verification: accuracy, accuracy },
        FirstAnswer::Followed { reflections } => {
            let share = bounds.share(reflections);
            let verification = match (is_right, revision) {
                (true, _) => 1.0 - share,
                (false, Revision::Ultra) => 0.0 - share,
                (false, Revision::Flash) => -1.0,
            };
            ReflectionReward { answer: 1.0, verification, accuracy }
        }
    }
}
