//! Where a response states its answer.

use std::ops::Range;

use crate::{FirstAnswer, TaskError, sameness::Said};

/// Finds the places of a text where a complete answer is stated.
///
/// Yuan's authors ask a language model (gpt-oss-20b), which lists the places; a program that has
/// one implements this.
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

/// Searches for the answer itself where it stands alone, however it is spelled: numbers as numbers,
/// words without regard to case and spaces. This library's choice, which needs no model. It misses
/// answers in other words.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExactSearch;

impl Judge for ExactSearch {
    fn places(&self, _: &str, answer: &str, text: &str) -> Result<Vec<Range<usize>>, TaskError> {
        Ok(Said::of(answer).places(text))
    }
}

/// What follows the first answer of a response, by the places that a judge finds in its thinking.
///
/// `answer` is what is searched for: what a right response concludes with, and the standard answer
/// for a wrong one. If a response is right and does not end with a place, what follows the last
/// place counts as one more reflection.
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
