//! A task that the program makes itself: sums in steps that can be checked again.

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

use crate::{ExactSearch, Question, Response, Reward, RewardRule, Task, TaskError, seeds::mixed};

/// Sums of two numbers of two digits.
///
/// A model first learns [worked examples](Self::examples), which add digit by digit. Some contain a
/// mistake, and most check their result up to four times. A check may correct a mistake and never
/// spoils a right result:
///
/// ```text
/// 47+38=7+8=15,4+3+1=8:85;7+8=15,4+3+1=8:85;
/// ```
///
/// The number behind the last colon is the answer. Rewards teach the model to be right and, by
/// [RIRM](crate::Scheme::Rirm), to stop when the answer is there.
#[derive(Debug, Clone, Copy, Default)]
pub struct Arithmetic {
    /// What is rewarded.
    pub rule: RewardRule,
    /// Decides which sums are asked for, and in which order.
    pub seed: u64,
}

/// Share of the first passes that are wrong, and of those that check a wrong one.
const WRONG: f64 = 0.35;

/// Held-out sums.
const HELD_OUT: usize = 200;

impl Arithmetic {
    /// Worked examples to learn from before, each a prompt and an answer; no held-out sum is among
    /// them.
    pub fn examples(count: usize, seed: u64) -> Vec<[String; 2]> {
        let mut rng = StdRng::seed_from_u64(seed);
        let example = |_| {
            let (a, b) = learnt_pair(&mut rng);
            let (passes, mut is_wrong) = (1 + rng.random_range(0..5), true);
            let pass = |_| {
                // A check may find a mistake, and never spoils what is right.
                is_wrong = is_wrong && rng.random_bool(WRONG);
                worked(a, b, is_wrong.then(|| rng.random_range(0..3)))
            };
            [prompt(a, b), (0..passes).map(pass).collect()]
        };
        (0..count).map(example).collect()
    }

    /// The answer that a response concludes with, if it has one.
    ///
    /// ```
    /// use yuan_rl::Arithmetic;
    ///
    /// assert_eq!(Arithmetic::conclusion("7+8=15,4+3+1=8:86;7+8=15,4+3+1=8:85;"), Some("85"));
    /// assert_eq!(Arithmetic::conclusion("7+8=15,"), None);
    /// ```
    pub fn conclusion(response: &str) -> Option<&str> {
        let (_, last) = response.rsplit_once(':')?;
        let answer = last.strip_suffix(';')?;
        let is_number = !answer.is_empty() && answer.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then_some(answer)
    }
}

impl Task for Arithmetic {
    fn question(&self, number: u64) -> Question {
        let (a, b) = learnt_pair(&mut StdRng::seed_from_u64(mixed(self.seed, number)));
        question(a, b)
    }

    fn held_out(&self) -> Vec<Question> {
        let all = (10..100).flat_map(|a| (10..100).map(move |b| (a, b)));
        let mut held_out: Vec<Question> =
            all.filter(|&(a, b)| is_held_out(a, b)).map(|(a, b)| question(a, b)).collect();
        // Not those of the smallest numbers alone.
        held_out.sort_by_key(|question| yuan_model::fnv1a(&question.prompt).swap_bytes());
        held_out.truncate(HELD_OUT);
        held_out
    }

    fn rewards(
        &self,
        question: &Question,
        responses: &[Response<'_>],
    ) -> Result<Vec<Reward>, TaskError> {
        let is_right = |response: &Response<'_>| {
            response.is_complete && Self::conclusion(response.text) == Some(&*question.answer)
        };
        let right: Vec<Option<&str>> =
            responses.iter().map(|r| is_right(r).then_some(&*question.answer)).collect();
        self.rule.rewards(&ExactSearch, question, responses, &right)
    }
}

fn prompt(a: u32, b: u32) -> String {
    format!("{a}+{b}=")
}

fn question(a: u32, b: u32) -> Question {
    Question { prompt: prompt(a, b), answer: (a + b).to_string() }
}

fn pair(rng: &mut impl Rng) -> (u32, u32) {
    (rng.random_range(10..100), rng.random_range(10..100))
}

/// About every tenth sum is never learnt. By a hash, so that their digits are like those of the
/// others.
fn is_held_out(a: u32, b: u32) -> bool {
    yuan_model::fnv1a(&prompt(a, b)).is_multiple_of(10)
}

fn learnt_pair(rng: &mut impl Rng) -> (u32, u32) {
    loop {
        let (a, b) = pair(rng);
        if !is_held_out(a, b) {
            return (a, b);
        }
    }
}

/// A sum digit by digit; a mistake makes one of its numbers too large by one: of the ones, of the
/// tens, or of the answer.
fn worked(a: u32, b: u32, mistake: Option<u32>) -> String {
    let off = |place: u32| u32::from(mistake == Some(place));
    let ones = a % 10 + b % 10 + off(0);
    let carry = ones / 10;
    let tens = a / 10 + b / 10 + carry + off(1);
    let answer = 10 * tens + ones % 10 + off(2);
    let carried = if carry > 0 { "+1" } else { "" };
    let [a1, a0, b1, b0] = [a / 10, a % 10, b / 10, b % 10];
    format!("{a0}+{b0}={ones},{a1}+{b1}{carried}={tens}:{answer};")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_worked_digit_by_digit() {
        assert_eq!(worked(47, 38, None), "7+8=15,4+3+1=8:85;");
        assert_eq!(worked(41, 22, None), "1+2=3,4+2=6:63;");
        assert_eq!(worked(99, 99, None), "9+9=18,9+9+1=19:198;");
        for mistake in 0..3 {
            let wrong = worked(47, 38, Some(mistake));
            assert_ne!(Arithmetic::conclusion(&wrong), Some("85"), "{wrong}");
        }
    }

    #[test]
    fn examples_and_prompts_hold_no_held_out_sum() {
        let task = Arithmetic::default();
        let held_out: Vec<String> = task.held_out().into_iter().map(|q| q.prompt).collect();
        assert_eq!(held_out.len(), HELD_OUT);
        let examples = Arithmetic::examples(2000, 1);
        assert!(examples.iter().all(|[prompt, _]| !held_out.contains(prompt)));
        assert!((0..2000).all(|number| !held_out.contains(&task.question(number).prompt)));
        // Most examples end rightly, and some pass over a mistake.
        let sum = |prompt: &str| -> u32 {
            prompt.trim_end_matches('=').split('+').map(|n| n.parse::<u32>().unwrap()).sum()
        };
        let right = examples.iter().filter(|[prompt, answer]| {
            Arithmetic::conclusion(answer) == Some(&sum(prompt).to_string())
        });
        let share = right.count() as f64 / 2000.0;
        assert!((0.8..0.95).contains(&share), "{share}");
    }

    #[test]
    fn rirm_pays_for_stopping_and_the_outcome_does_not() {
        let question = question(47, 38);
        let once = "7+8=15,4+3+1=8:85;";
        let texts = [once.to_owned(), once.repeat(3), "7+8=15,4+3+1=8:84;".into()];
        let rewards = |scheme| {
            let rule = RewardRule { scheme, ..RewardRule::default() };
            let response = |text| Response { text, tokens: &[], is_complete: true };
            let responses: Vec<Response<'_>> =
                texts.iter().map(|text: &String| response(text.as_str())).collect();
            let rewards = Arithmetic { rule, seed: 0 }.rewards(&question, &responses).unwrap();
            rewards.into_iter().map(|reward| reward.value).collect::<Vec<_>>()
        };
        assert_eq!(rewards(crate::Scheme::Outcome), [1.0, 1.0, -1.0]);
        let rirm = rewards(crate::Scheme::Rirm);
        // Two of three reflections cost two thirds of a point; what is never stated costs all.
        for (found, expected) in rirm.iter().zip([3.0, 7.0 / 3.0, -3.0]) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{rirm:?}");
        }
    }
}
