//! What is right about an item, and what an answer scores.

use crate::{
    Statistic, bleu,
    convfinqa::Calculation,
    mmtab::{self, Structure},
    overlap::best_f1,
    rouge,
};

/// What is right about an item.
#[derive(Debug, Clone, PartialEq)]
pub enum Gold {
    /// Any of some texts, by the words that an answer shares with it.
    Words {
        /// The texts.
        references: Vec<String>,
        /// An answer that says that it finds nothing stands for the sentence that says so.
        knows_refusals: bool,
    },
    /// A sentence of a document; see [`Words`](Self::Words), and how many come close.
    Sentence(String),
    /// A number that is calculated, or the calculation.
    Calculation(Calculation),
    /// A summary, by ROUGE.
    Summary(String),
    /// A list of values in `{"answer": …}`, in any order.
    List(Vec<String>),
    /// One of several options, in `{"answer": …}`.
    Choice(String),
    /// A text, by BLEU over all items.
    Text(String),
    /// What a table is made of.
    Structure(Structure),
}

/// The sentence that stands for all refusals.
pub(crate) const REFUSAL: &str = "Sorry. I cannot find the answer based on the context.";

/// What an answer says that finds nothing, in lower case.
const REFUSALS: [&str; 37] = [
    "cannot find",
    "can't find",
    "not able to",
    "unable to",
    "does not provide",
    "cannot provide",
    "cannot answer",
    "couldnot answer",
    "can't answer",
    "couldn't answer",
    "cannot be found",
    "cannot be determined",
    "do not have",
    "couldn't find",
    "no information",
    "does not mention",
    "doesn't mention",
    "not explicitly mentioned",
    "not explicitly explain",
    "can not find",
    "could not find",
    "does not specify",
    "doesn't provide",
    "doesn't specify",
    "there is no",
    "not mentioned",
    "don't have",
    "don't know",
    "does not include",
    "doesn't include",
    "does not contain",
    "doesn't contain",
    "not provided",
    "does not indicate",
    "doesn't indicate",
    "does not disclose",
    "doesn't disclose",
];

impl Gold {
    /// Names of its metrics, and how items become a score.
    pub fn metrics(&self) -> &'static [(&'static str, Statistic)] {
        use Statistic::{Bleu, F1, Mean};
        match self {
            Self::Words { .. } => &[("F1", Mean)],
            Self::Sentence(_) => &[("F1", Mean), ("F1 above 0.8", Mean)],
            Self::Calculation(_) | Self::List(_) | Self::Choice(_) => &[("accuracy", Mean)],
            Self::Summary(_) => &[("ROUGE-1", Mean), ("ROUGE-2", Mean)],
            Self::Text(_) => &[("BLEU", Bleu)],
            Self::Structure(Structure::Size { .. }) => &[("rows", Mean), ("columns", Mean)],
            Self::Structure(Structure::Cells(_) | Structure::Places(_)) => &[("accuracy", Mean)],
            Self::Structure(Structure::Merged(_)) => &[("F1", F1)],
            Self::Structure(Structure::Lines { .. }) => &[("rows F1", F1), ("columns F1", F1)],
        }
    }

    /// What an answer adds to the sums of each metric; an item without an answer is scored with an
    /// empty one.
    pub fn score(&self, answer: &str) -> Vec<Vec<f64>> {
        let mean = |points: f64| vec![points, 1.0];
        let is_right = |right: bool| vec![mean(f64::from(u8::from(right)))];
        match self {
            Self::Words { references, knows_refusals } => {
                let lower = answer.to_lowercase();
                let refuses = *knows_refusals && REFUSALS.iter().any(|said| lower.contains(said));
                vec![mean(best_f1(if refuses { REFUSAL } else { answer }, references))]
            }
            Self::Sentence(reference) => {
                let f1 = best_f1(answer, std::slice::from_ref(reference));
                vec![mean(f1), mean(f64::from(u8::from(f1 > 0.8)))]
            }
            Self::Calculation(calculation) => is_right(calculation.is_in(answer)),
            Self::Summary(reference) => {
                [1, 2].map(|n| mean(rouge::n(n, answer, reference).f)).to_vec()
            }
            Self::List(expected) => is_right(mmtab::is_list(answer, expected)),
            Self::Choice(expected) => is_right(mmtab::is_choice(answer, expected)),
            Self::Text(reference) => vec![bleu::counts(answer, reference).to_vec()],
            Self::Structure(structure) => structure.score(answer),
        }
    }

    /// What is right, in words, for a reader.
    pub fn shown(&self) -> String {
        match self {
            Self::Words { references, .. } => references.join(" | "),
            Self::Sentence(text) | Self::Summary(text) | Self::Choice(text) | Self::Text(text) => {
                text.clone()
            }
            Self::Calculation(calculation) => calculation.result(),
            Self::List(values) => values.join(", "),
            Self::Structure(structure) => structure.shown(),
        }
    }
}
