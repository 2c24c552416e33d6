//! Questions with answers that a program can compare, from a file.

use serde::{Deserialize, Serialize};

use crate::{
    ExactSearch, Question, Response, Reward, RewardRule, Task, TaskError, sameness::Said,
    seeds::mixed,
};

/// Questions whose answers are right when they conclude with the standard answer.
///
/// A file of them has a JSON object a line: `{"prompt": "What is 6 times 7?", "answer": "42"}`.
#[derive(Debug, Clone)]
pub struct Questions {
    learnt: Vec<Question>,
    held_out: Vec<Question>,
    rule: RewardRule,
    seed: u64,
}

/// A line of a file.
#[derive(Serialize, Deserialize)]
struct Line {
    prompt: String,
    answer: String,
}

/// One question in so many is held out, decided by its prompt.
const HELD_OUT: u64 = 20;

/// Held-out questions at most: they are all answered every time.
const MOST_HELD_OUT: usize = 200;

impl Questions {
    /// From the text of a file, whose answers are rewarded by a rule; `seed` decides the order.
    /// About a twentieth of the questions, 200 at most, is held out.
    ///
    /// # Errors
    ///
    /// Names the line that is no question, or says that there is none to learn.
    ///
    /// ```
    /// use yuan_rl::{Questions, RewardRule, Task};
    ///
    /// let lines = r#"{"prompt": "6 times 7?", "answer": "42"}"#;
    /// let questions = Questions::from_lines(lines, RewardRule::default(), 0)?;
    /// assert_eq!(questions.question(0).answer, "42");
    /// assert!(Questions::from_lines("{}", RewardRule::default(), 0).is_err());
    /// # Ok::<(), String>(())
    /// ```
    pub fn from_lines(text: &str, rule: RewardRule, seed: u64) -> Result<Self, String> {
        let (mut learnt, mut held_out) = (Vec::new(), Vec::new());
        // Some editors write a byte order mark.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let number = number + 1;
            let Line { prompt, answer } = serde_json::from_str(line).map_err(|error| {
                // The line as JSON is always line 1.
                let reason = error.to_string().replace(" at line 1 column ", " at column ");
                format!(
                    "line {number}: {reason}; expected {{\"prompt\": …, \"answer\": …}}, both texts"
                )
            })?;
            if prompt.trim().is_empty() || answer.trim().is_empty() {
                return Err(format!("line {number}: prompt and answer must not be empty"));
            }
            let question = Question { prompt, answer: answer.trim().to_owned() };
            let is_known = held_out.iter().any(|known: &Question| known.prompt == question.prompt);
            let is_held_out = yuan_model::fnv1a(&question.prompt).is_multiple_of(HELD_OUT);
            match is_held_out && held_out.len() < MOST_HELD_OUT {
                // Asked twice, it is held out all the same.
                _ if is_known => {}
                true => held_out.push(question),
                false => learnt.push(question),
            }
        }
        if learnt.is_empty() {
            // A single question is learnt, whatever its prompt is.
            learnt.extend(held_out.pop());
        }
        if held_out.is_empty() {
            // Something has to be measured on, where there is more than one prompt.
            let prompts = learnt.iter().map(|question| question.prompt.clone());
            let chosen = prompts.min_by_key(|prompt| yuan_model::fnv1a(prompt)).unwrap_or_default();
            let (measured, rest): (Vec<Question>, Vec<Question>) =
                learnt.iter().cloned().partition(|question| question.prompt == chosen);
            if !rest.is_empty() {
                (held_out, learnt) = (measured.into_iter().take(1).collect(), rest);
            }
        }
        match learnt.is_empty() {
            true => Err("it has no question".into()),
            false => Ok(Self { learnt, held_out, rule, seed }),
        }
    }

    /// All questions: those to learn, then the held-out ones.
    pub fn all(&self) -> impl Iterator<Item = &Question> {
        self.learnt.iter().chain(&self.held_out)
    }

    /// Questions to learn.
    pub fn len(&self) -> usize {
        self.learnt.len()
    }

    /// Whether there is none, which [`from_lines`](Self::from_lines) refuses.
    pub fn is_empty(&self) -> bool {
        self.learnt.is_empty()
    }
}

impl Task for Questions {
    /// Every epoch visits every question once, in an order of its own.
    fn question(&self, number: u64) -> Question {
        let key = |epoch: u64| mixed(self.seed, epoch);
        let at = yuan_data::row_of_epochs(number, self.learnt.len() as u64, Some(key));
        self.learnt[at as usize].clone()
    }

    fn held_out(&self) -> Vec<Question> {
        self.held_out.clone()
    }

    fn rewards(
        &self,
        question: &Question,
        responses: &[Response<'_>],
    ) -> Result<Vec<Reward>, TaskError> {
        let mut right = Vec::with_capacity(responses.len());
        for response in responses {
            let concluded = Some(conclusion(response.text)).filter(|_| response.is_complete);
            right.push(
                concluded.filter(|concluded| Said::of(concluded) == Said::of(&question.answer)),
            );
        }
        self.rule.rewards(&ExactSearch, question, responses, &right)
    }
}

/// What a response concludes with: what follows the last `**Final Answer**`, else what the last
/// `\boxed{…}` holds, as in upstream's code; else its last line.
///
/// ```
/// use yuan_rl::conclusion;
///
/// assert_eq!(conclusion("It is 41.\n**Final Answer**: 42"), "42");
/// assert_eq!(conclusion(r"So \boxed{\frac{1}{2}} it is."), r"\frac{1}{2}");
/// assert_eq!(conclusion("6 times 7\n42\n"), "42");
/// ```
pub fn conclusion(response: &str) -> &str {
    if let Some((_, rest)) = response.rsplit_once("**Final Answer**") {
        let rest = rest.trim_start_matches([':', ' ', '\n']);
        return boxed(rest).unwrap_or(rest).trim();
    }
    let last = || response.trim_end().rsplit('\n').next().unwrap_or("").trim();
    boxed(response).map_or_else(last, str::trim)
}

/// What the last box holds, with the braces in it.
fn boxed(text: &str) -> Option<&str> {
    let (_, rest) = text.rsplit_once("\\boxed{")?;
    let mut depth = 1;
    for (at, character) in rest.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&rest[..at]);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_question_is_asked_once_an_epoch_and_the_held_out_ones_never() {
        let line = |n: u64| format!("{{\"prompt\": \"what is {n}?\", \"answer\": \"{n}\"}}\n");
        let text: String = (0..400).map(line).collect();
        let questions = Questions::from_lines(&text, RewardRule::default(), 0).unwrap();
        let held_out: Vec<String> = questions.held_out().into_iter().map(|q| q.prompt).collect();
        assert!((5..50).contains(&held_out.len()), "{}", held_out.len());
        let learnt = questions.len() as u64;
        for epoch in 0..2 {
            let asked = epoch * learnt..(epoch + 1) * learnt;
            let mut asked: Vec<String> = asked.map(|n| questions.question(n).prompt).collect();
            assert!(asked.iter().all(|prompt| !held_out.contains(prompt)));
            asked.sort();
            asked.dedup();
            assert_eq!(asked.len() as u64, learnt);
        }
    }

    #[test]
    fn a_line_that_is_no_question_is_named() {
        let error = |text: &str| Questions::from_lines(text, RewardRule::default(), 0).unwrap_err();
        let good = "{\"prompt\": \"a\", \"answer\": \"b\"}\n";
        assert!(error(&format!("{good}{{\"prompt\": 1}}")).starts_with("line 2: "));
        assert!(error("{\"prompt\": \"a\", \"answer\": \" \"}").contains("must not be empty"));
        assert_eq!(error("\n\n"), "it has no question");
    }
}
