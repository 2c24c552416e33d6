//! The benchmarks by which Yuan3.0 is judged (arXiv 2601.14327, §5): `ChatRAG`, `SummEval`, `MMTab` and
//! Docmatix, from published files to prompts and from answers to scores. No model is needed: any
//! program may answer.
//!
//! A [`Benchmark`] reads its files and shows each [`Item`]: what is asked, and what is [right](Gold).
//! [`Answers`] are lines of JSON with the items' ids. [`Scored`] puts the two together: an item
//! without an answer counts as wrong. Every score is a function of sums over items
//! ([`Statistic`]), which gives it an interval, and a difference between two models one too
//! ([`Comparison`]).
//!
//! ```
//! use yuan_eval::{f1, rouge};
//!
//! assert_eq!(f1("the cat", "A cat!"), 1.0);
//! assert_eq!(rouge::n(1, "cats sat", "the cat sat").f, 0.8);
//! ```

mod answers;
mod benchmark;
pub mod bleu;
mod chatrag;
mod compare;
mod convfinqa;
mod docmatix;
mod error;
mod gold;
mod item;
mod mmtab;
mod overlap;
mod porter;
mod published;
mod read;
mod relaxed;
pub mod rouge;
mod score;
mod statistic;
mod summeval;

pub use answers::{Answer, AnswerWriter, Answers, OutsideScores};
pub use benchmark::{Benchmark, Profile};
pub use compare::{Comparison, Difference};
pub use error::EvalError;
pub use gold::Gold;
pub use item::{Item, Message};
pub use overlap::f1;
pub use porter::stem;
pub use published::{Published, published};
pub use score::{Average, ItemScore, Scored, SetScore, Worst};
pub use statistic::Statistic;
