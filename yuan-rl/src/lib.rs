//! The reinforcement learning of Yuan3.0 (Flash paper, December 2025, §3, and the Ultra code):
//! RIRM, the reward that inhibits reflections after the first answer, and RAPO, the loss and the
//! sampling around it, first as functions without a model, then as a loop.
//!
//! The functions, in this order: [`Judge`] finds the places where an answer is stated and
//! [`annotate`] makes a [`FirstAnswer`] of them; [`reflection_reward`] is RIRM.
//! [`group_advantages`] compares the answers to one prompt, [`RapoLoss`] is the loss of a batch,
//! [`adaptive_sampling`] chooses the prompts of an update. [`overlong_penalty`], [`repeats`] and
//! [`repetition_penalty`] are what else a reward is made of.
//!
//! The loop: a [`Task`] has prompts and rewards, for which [`RewardRule`] applies RIRM;
//! [`Rollouts`] makes the rows of every step of a [`Trainer`](yuan_train::Trainer) with the model
//! that learns from them, and [`HeldOut`] measures it. Checkpoints, ranks, resuming and LAEP are
//! the trainer's.
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
mod answers;
mod arithmetic;
mod config;
mod held_out;
mod judge;
mod loss;
mod objective;
mod penalties;
mod prompt_tokenizer;
mod questions;
mod rirm;
mod rollouts;
mod run;
mod sameness;
mod sampling;
mod scheme;
mod seeds;
mod task;

pub use advantages::group_advantages;
pub use arithmetic::Arithmetic;
pub use config::RlConfig;
pub use held_out::HeldOut;
pub use judge::{ExactSearch, Judge, annotate};
pub use loss::{EntropyScope, PolicyLoss, RapoLoss, Tokens};
pub use penalties::{Overlong, RepetitionLimits, overlong_penalty, repeats, repetition_penalty};
pub use prompt_tokenizer::PromptTokenizer;
pub use questions::{Questions, conclusion};
pub use rirm::{Bounds, FirstAnswer, ReflectionReward, Revision, reflection_reward};
pub use rollouts::Rollouts;
pub use run::{RlSettings, TaskKind, trainer, trainer_on_rank};
pub use sampling::{Order, PromptRewards, adaptive_sampling};
pub use scheme::{RewardRule, Scheme};
pub use task::{Question, Response, Reward, Task, TaskError};
