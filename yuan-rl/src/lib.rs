//! The reinforcement learning of Yuan3.0 (Flash paper, December 2025, §3, and the Ultra code), as
//! functions without a model: RIRM, the reward that inhibits reflections after the first answer, and
//! RAPO, the loss and the sampling around it.
//!
//! Read in this order: [`Judge`] finds the places where an answer is stated and [`annotate`] makes a
//! [`FirstAnswer`] of them; [`reflection_reward`] is RIRM. [`group_advantages`] compares the answers to
//! one prompt, [`RapoLoss`] is the loss of a batch, [`adaptive_sampling`] chooses the prompts of an update.
//! [`overlong_penalty`], [`repeats`] and [`repetition_penalty`] are what else a reward is made of.
//!
//! Paper and code differ in places; each function says where, and which of them it follows.
//!
//! ```
//! use yuan_rl::{Bounds, FirstAnswer, Revision, reflection_reward};
//!
//! let after = |reflections| FirstAnswer::Followed { reflections };
//! let reward = |first, is_right| reflection_reward(first, is_right, Bounds::ULTRA, Revision::Ultra).total();
//! // Right answers lose by reflecting on, and wrong ones lose more.
//! assert_eq!(reward(FirstAnswer::Ends, true), 3.0);
//! assert_eq!(reward(after(3), true), 2.0);
//! assert_eq!(reward(after(0), false), 0.0);
//! assert_eq!(reward(after(3), false), -1.0);
//! ```

mod advantages;
mod judge;
mod loss;
mod penalties;
mod rirm;
mod sampling;

pub use advantages::group_advantages;
pub use judge::{ExactSearch, Judge, annotate};
pub use loss::{EntropyScope, PolicyLoss, RapoLoss, Tokens};
pub use penalties::{Overlong, RepetitionLimits, overlong_penalty, repeats, repetition_penalty};
pub use rirm::{Bounds, FirstAnswer, ReflectionReward, Revision, reflection_reward};
pub use sampling::{Order, PromptRewards, adaptive_sampling};
