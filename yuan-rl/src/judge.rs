//! Where a response states its answer.

use std::ops::Range;

use crate::{FirstAnswer, TaskError};

/// Finds the places of a text where a complete answer is stated.
///
/// Yuan's authors ask a language model (gpt-oss-20b), which lists the places; a program that has one
/// implements this.
pub trait Judge {
    /// The places in order, as ranges of bytes of `text` that do not overlap.
    ///
    /// # Errors
    ///
    /// If it cannot tell: a model that is out of reach, for instance.
    fn places(
        &self,
        question: &str,
        answer: &str,
        text: &str,
    ) -> Result<Vec<Range<usize>>, TaskError>;
}

/// Searches for the answer itself, letter by letter, where it stands alone: this library's choice, which
/// needs no model. It misses answers in other words.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExactSearch;

impl Judge for ExactSearch {
    fn places(&self, _: &str, answer: &str, text: &str) -> Result<Vec<Range<usize>>, TaskError> {
        let answer = answer.trim();
        if answer.is_empty() {
            return Ok(Vec::new());
        }
        let continues = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        let stands_alone = |at: usize| {
            let (before, after) = (&text[..at], &text[at + answer.len()..]);
            // In 3.14 and 1,000 what follows the point belongs to the number.
            let mut rest = after.chars();
            let is_cut = matches!(rest.next(), Some('.' | ','))
                && rest.next().is_some_and(|c| c.is_ascii_digit());
            let mut last = before.chars().rev();
            let is_rest = matches!(last.next(), Some('.' | ','))
                && last.next().is_some_and(|c| c.is_ascii_digit());
            // A sign or a line of a fraction makes another number of it.
            let is_signed = before.ends_with(['-', '−', '/'])
                && answer.starts_with(|c: char| c.is_ascii_digit());
            let is_divided =
                after.starts_with('/') && answer.ends_with(|c: char| c.is_ascii_digit());
            let is_number = is_signed
                || is_divided
                || (is_cut && answer.ends_with(|c: char| c.is_ascii_digit()))
                || (is_rest && answer.starts_with(|c: char| c.is_ascii_digit()));
            let is_word = continues(before.chars().next_back()) || continues(after.chars().next());
            !(is_number || is_word)
        };
        let found = text.match_indices(answer).map(|(at, _)| at).filter(|&at| stands_alone(at));
        Ok(found.map(|at| at..at + answer.len()).collect())
    }
}

/// What follows the first answer of a response, by the places that a judge finds in its thinking.
///
/// `answer` is what is searched for: what a right response concludes with, and the standard answer for a
/// wrong one. If a response is right and does not end with a place, what follows the last place counts as
/// one more reflection.
///
/// # Errors
///
/// Those of the judge.
///
/// ```
/// use yuan_rl::{ExactSearch, FirstAnswer, annotate};
///
/// let after = |text| annotate(&ExactSearch, "2 + 2?", "4", text, true);
/// assert_eq!(after("2 + 2 is 4")?, FirstAnswer::Ends);
/// assert_eq!(after("It is 4. Check: 4")?, FirstAnswer::Followed { reflections: 1 });
/// assert_eq!(after("It is 4. Let me think.")?, FirstAnswer::Followed { reflections: 1 });
/// assert_eq!(after("It is 14.")?, FirstAnswer::Missing);
/// # Ok::<(), yuan_rl::TaskError>(())
/// ```
pub fn annotate(
    judge: &impl Judge,
    question: &str,
    answer: &str,
    thinking: &str,
    is_right: bool,
) -> Result<FirstAnswer, TaskError> {
    let places = judge.places(question, answer, thinking)?;
    let Some(last) = places.last() else { return Ok(FirstAnswer::Missing) };
    // A full stop or a bracket after it says nothing more.
    let ends = thinking[last.end..].chars().all(|c| !c.is_alphanumeric());
    let more = u32::from(is_right && !ends);
    Ok(match places.len() as u32 - 1 + more {
        0 if ends => FirstAnswer::Ends,
        reflections => FirstAnswer::Followed { reflections },
    })
}
