//! Questions with answers that a program can compare, from a file.

use serde::{Deserialize, Serialize};

use crate::{ExactSearch, Question, Response, Reward, RewardRule, Task};

/// Questions whose answers are right when they conclude with the standard answer.
///
/// A file of them has a JSON object a line: `{"prompt": "What is 6 times 7?", "answer": "42"}`.
#[derive(Debug, Clone)]
pub struct Questions {
    learnt: Vec<Question>,
    held_out: Vec<Question>,
    rule: RewardRule,
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
    /// From the text of a file, whose answers are rewarded by a rule. About a twentieth of the questions,
    /// 200 at most, is held out.
    ///
    /// # Errors
    ///
    /// Names the line that is no question, or says that there is none to learn.
    ///
    /// ```
    /// use yuan_rl::{Questions, RewardRule, Task};
    ///
    /// let lines = r#"{"prompt": "6 times 7?", "answer": "42"}"#;
    /// let questions = Questions::from_lines(lines, RewardRule::default())?;
    /// assert_eq!(questions.question(0).answer, "42");
    /// assert!(Questions::from_lines("{}", RewardRule::default()).is_err());
    /// # Ok::<(), String>(())
    /// ```
    pub fn from_lines(text: &str, rule: RewardRule) -> Result<Self, String> {
        let (mut learnt, mut held_out) = (Vec::new(), Vec::new());
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let number = number + 1;
            let Line { prompt, answer } = serde_json::from_str(line).map_err(|error| {
                format!(
                    "line {number}: {error}; expected {{\"prompt\": …, \"answer\": …}}, both texts"
                )
            })?;
            if prompt.trim().is_empty() || answer.trim().is_empty() {
                return Err(format!("line {number}: prompt and answer must not be empty"));
            }
            let is_held_out = yuan_model::fnv1a(&prompt).is_multiple_of(HELD_OUT);
            let question = Question { prompt, answer: answer.trim().to_owned() };
            match is_held_out && held_out.len() < MOST_HELD_OUT {
                true => held_out.push(question),
                false => learnt.push(question),
            }
        }
        if learnt.is_empty() {
            // A single question is learnt, whatever its prompt is.
            std::mem::swap(&mut learnt, &mut held_out);
        }
        match learnt.is_empty() {
            true => Err("it has no question".into()),
            false => Ok(Self { learnt, held_out, rule }),
        }
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
        let key = |epoch: u64| 0x9e37_79b9_7f4a_7c15 ^ epoch;
        let at = yuan_data::row_of_epochs(number, self.learnt.len() as u64, Some(key));
        self.learnt[at as usize].clone()
    }

    fn held_out(&self) -> Vec<Question> {
        self.held_out.clone()
    }

    fn rewards(&self, question: &Question, responses: &[Response<'_>]) -> Vec<Reward> {
        let is_right = |response: &Response<'_>| {
            response.is_complete && is_same(conclusion(response.text), &question.answer)
        };
        let are_right: Vec<bool> = responses.iter().map(is_right).collect();
        self.rule.rewards(&ExactSearch, question, responses, &are_right)
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

/// Whether two answers say the same: the same words but for case, spaces and a full stop, or the same
/// number.
fn is_same(given: &str, standard: &str) -> bool {
    let plain = |text: &str| -> String {
        let words: Vec<&str> = text.split_whitespace().collect();
        words.join(" ").trim_end_matches('.').to_lowercase()
    };
    let number = |text: &str| {
        let text = text.replace([',', '$', '%'], "");
        text.trim().parse::<f64>().ok().filter(|number| number.is_finite())
    };
    let (given, standard) = (plain(given), plain(standard));
    match (number(&given), number(&standard)) {
        (Some(one), Some(other)) => one == other,
        _ => given == standard,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_compared_as_words_or_as_numbers() {
        for (given, standard, same) in [
            ("Paris.", "paris", true),
            ("1,000", "1000.0", true),
            ("50%", "50", true),
            ("4", "42", false),
            ("", "42", false),
            ("the  red   one", "The red one", true),
        ] {
            assert_eq!(is_same(given, standard), same, "{given} and {standard}");
        }
        // A box that never closes is none.
        assert_eq!(conclusion("\\boxed{4"), "\\boxed{4");
    }

    #[test]
    fn every_question_is_asked_once_an_epoch_and_the_held_out_ones_never() {
        let line = |n: u64| format!("{{\"prompt\": \"what is {n}?\", \"answer\": \"{n}\"}}\n");
        let text: String = (0..400).map(line).collect();
        let questions = Questions::from_lines(&text, RewardRule::default()).unwrap();
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
        let error = |text: &str| Questions::from_lines(text, RewardRule::default()).unwrap_err();
        let good = "{\"prompt\": \"a\", \"answer\": \"b\"}\n";
        assert!(error(&format!("{good}{{\"prompt\": 1}}")).starts_with("line 2: "));
        assert!(error("{\"prompt\": \"a\", \"answer\": \" \"}").contains("must not be empty"));
        assert_eq!(error("\n\n"), "it has no question");
    }
}
