//! From what is right to a reward: RIRM, or right and wrong alone.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    Bounds, FirstAnswer, Judge, Overlong, Question, Response, Revision, Reward, TaskError,
    annotate, overlong_penalty, reflection_reward, repetition_penalty,
};

/// What answers are rewarded for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// 1 for a right answer, −1 for a wrong one.
    Outcome,
    /// The reflection inhibition reward mechanism, revised for Ultra: bounds 0 and 3.
    #[default]
    Rirm,
    /// The same as it was for Flash, with bounds by the prompt ([`Bounds::of_flash`]); the fewest and
    /// the most reflections are those of right answers, as in the code.
    RirmFlash,
}

/// A scheme, and what else an answer can lose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewardRule {
    /// What is rewarded.
    pub scheme: Scheme,
    /// Long answers lose up to 1 ([`overlong_penalty`]). With RIRM nothing is lost by length, as in the
    /// code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlong: Option<Overlong>,
    /// Answers that repeat themselves lose 1 ([`repetition_penalty`]).
    #[serde(default)]
    pub repetition: bool,
}

impl RewardRule {
    /// The rewards of all answers to one question. `right` has what each right one concludes with, and
    /// nothing for the wrong ones.
    ///
    /// Where a response thinks, only its thinking is searched for answers, up to `</think>`; they are
    /// written once more behind it.
    ///
    /// # Errors
    ///
    /// Those of the judge.
    ///
    /// # Panics
    ///
    /// If there are not as many of both.
    pub fn rewards(
        &self,
        judge: &impl Judge,
        question: &Question,
        responses: &[Response<'_>],
        right: &[Option<&str>],
    ) -> Result<Vec<Reward>, TaskError> {
        assert_eq!(
            responses.len(),
            right.len(),
            "responses, and what the right ones conclude with"
        );
        let first = |(response, right): (&Response<'_>, &Option<&str>)| {
            let answer = right.unwrap_or(&question.answer);
            let thinking = thinking_of(response.text);
            annotate(judge, &question.prompt, answer, thinking, right.is_some())
        };
        let firsts = responses.iter().zip(right).map(first).collect::<Result<Vec<_>, _>>()?;
        let are_right: Vec<bool> = right.iter().map(Option::is_some).collect();
        let bounds = self.bounds(&firsts, &are_right);
        let all = responses.iter().zip(are_right).zip(&firsts);
        let rewards = all.map(|((response, is_right), &first)| {
            let mut parts = BTreeMap::new();
            if let Some(reflections) = reflections_of(first) {
                parts.insert("reflections".to_owned(), f64::from(reflections));
            }
            let mut value = match self.scheme {
                Scheme::Outcome => sign(is_right),
                Scheme::Rirm => rirm(first, is_right, bounds, Revision::Ultra, &mut parts),
                Scheme::RirmFlash => rirm(first, is_right, bounds, Revision::Flash, &mut parts),
            };
            if self.repetition {
                let lost = repetition_penalty(response.tokens);
                value += lost;
                parts.insert("repetition".to_owned(), lost);
            }
            if let (Some(limits), Scheme::Outcome) = (self.overlong, self.scheme) {
                let lost = overlong_penalty(response.tokens.len(), limits);
                value += lost;
                parts.insert("overlong".to_owned(), lost);
            }
            Reward { value: value as f32, is_right, parts }
        });
        Ok(rewards.collect())
    }

    fn bounds(&self, firsts: &[FirstAnswer], are_right: &[bool]) -> Bounds {
        if self.scheme != Scheme::RirmFlash {
            return Bounds::ULTRA;
        }
        let right = are_right.iter().filter(|is_right| **is_right).count();
        let of_right = firsts.iter().zip(are_right).filter(|(_, is_right)| **is_right);
        let reflections: Vec<u32> =
            of_right.filter_map(|(&first, _)| reflections_of(first)).collect();
        Bounds::of_flash(right as f64 / are_right.len().max(1) as f64, &reflections)
    }
}

/// What a response thinks before it answers, or all of it.
fn thinking_of(response: &str) -> &str {
    response.split_once("</think>").map_or(response, |(thinking, _)| thinking)
}

fn sign(is_right: bool) -> f64 {
    if is_right { 1.0 } else { -1.0 }
}

fn reflections_of(first: FirstAnswer) -> Option<u32> {
    match first {
        FirstAnswer::Missing => None,
        FirstAnswer::Ends => Some(0),
        FirstAnswer::Followed { reflections } => Some(reflections),
    }
}

fn rirm(
    first: FirstAnswer,
    is_right: bool,
    bounds: Bounds,
    revision: Revision,
    parts: &mut BTreeMap<String, f64>,
) -> f64 {
    let reward = reflection_reward(first, is_right, bounds, revision);
    for (name, part) in [
        ("answer", reward.answer),
        ("verification", reward.verification),
        ("accuracy", reward.accuracy),
    ] {
        parts.insert(name.to_owned(), part);
    }
    reward.total()
}
