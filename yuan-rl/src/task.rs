//! What a model is asked, and what its answers are worth.

use std::{collections::BTreeMap, error::Error};

use serde::{Deserialize, Serialize};

/// A prompt, and what is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What the model is given.
    pub prompt: String,
    /// The standard answer.
    pub answer: String,
}

/// What a model said.
#[derive(Debug, Clone, Copy)]
pub struct Response<'a> {
    /// As text, without what ends it.
    pub text: &'a str,
    /// Its tokens, with what ends it.
    pub tokens: &'a [u32],
    /// Whether the model ended it itself; else it was cut off.
    pub is_complete: bool,
}

/// What a response is worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reward {
    /// What is learnt from.
    pub value: f32,
    /// Whether the response is right: the metrics tell how many are, and prompts are ordered by it.
    pub is_right: bool,
    /// What the value is made of, by name, for the metrics.
    pub parts: BTreeMap<String, f64>,
}

/// Why answers could not be rewarded: a judge that is out of reach, for instance.
pub type TaskError = Box<dyn Error + Send + Sync>;

/// What is to be learnt by reinforcement: prompts, and rewards of the answers to them.
///
/// ```
/// use yuan_rl::{Question, Response, Reward, Task, TaskError};
///
/// /// Short answers are good ones.
/// struct Short;
///
/// impl Task for Short {
///     fn question(&self, number: u64) -> Question {
///         Question { prompt: format!("Say something about {number}."), answer: String::new() }
///     }
///
///     fn rewards(
///         &self,
///         _: &Question,
///         responses: &[Response<'_>],
///     ) -> Result<Vec<Reward>, TaskError> {
///         let reward = |response: &Response<'_>| Reward {
///             value: -(response.tokens.len() as f32),
///             is_right: response.is_complete,
///             parts: Default::default(),
///         };
///         Ok(responses.iter().map(reward).collect())
///     }
/// }
/// ```
pub trait Task: Send + Sync {
    /// The prompt of a number: the same one every time, so that a run that is resumed goes on with
    /// the prompts that the interrupted one would have had.
    fn question(&self, number: u64) -> Question;

    /// Prompts that are only measured on.
    fn held_out(&self) -> Vec<Question> {
        Vec::new()
    }

    /// The rewards of all answers to one prompt, which may depend on each other. Over ranks, each
    /// rewards the answers that it gave.
    ///
    /// # Errors
    ///
    /// An error ends the run.
    fn rewards(
        &self,
        question: &Question,
        responses: &[Response<'_>],
    ) -> Result<Vec<Reward>, TaskError>;
}
