//! The benchmarks, and whose way of asking and scoring is meant.

use std::{collections::HashMap, fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{EvalError, Item, chatrag, docmatix, mmtab, summeval};

/// Whose prompts and rules are used, where they differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Those of the authors of the benchmark.
    #[default]
    Authors,
    /// Those of Yuan's authors, quirks included.
    Yuan,
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "authors" => Ok(Self::Authors),
            "yuan" => Ok(Self::Yuan),
            other => Err(format!("`{other}` is neither authors nor yuan")),
        }
    }
}

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Benchmark {
    /// ChatRAG-Bench: conversations about documents.
    ChatRag,
    /// Summaries of seven kinds of texts.
    SummEval,
    /// Questions about images of tables.
    MmTab,
    /// Questions about pages of documents.
    Docmatix,
}

/// A metric of a set, and how much of a mean it is.
type Part = (&'static str, &'static str, f64);

impl Benchmark {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::ChatRag, Self::SummEval, Self::MmTab, Self::Docmatix];

    /// Its name as a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::ChatRag => "chatrag",
            Self::SummEval => "summeval",
            Self::MmTab => "mmtab",
            Self::Docmatix => "docmatix",
        }
    }

    /// Shows every item of the files in a directory, in their order; with a limit, only so many of
    /// each set, its first ones.
    ///
    /// # Errors
    ///
    /// If none of its files is there, one is not in the published format, or `show` fails.
    pub fn for_each(
        self,
        data: &Path,
        profile: Profile,
        limit: Option<u64>,
        mut show: impl FnMut(Item) -> Result<(), EvalError>,
    ) -> Result<(), EvalError> {
        let mut taken = HashMap::<String, u64>::new();
        let mut show = |item: Item| {
            let Some(limit) = limit else { return show(item) };
            let count = taken.entry(item.set.clone()).or_default();
            *count += 1;
            if *count > limit { Ok(()) } else { show(item) }
        };
        match self {
            Self::ChatRag => chatrag::for_each(data, profile, &mut show),
            Self::SummEval => summeval::for_each(data, &mut show),
            Self::MmTab => mmtab::for_each(data, &mut show),
            Self::Docmatix => docmatix::for_each(data, &mut show),
        }
    }

    /// What of an answer is scored.
    pub(crate) fn cut(self, answer: &str, profile: Profile) -> String {
        const END: &str = "<|end_of_sentence|>";
        const THOUGHT: &str = "</think>";
        /// What models end with, if it was not taken away.
        const ENDS: [&str; 5] = [END, "<eod>", "</s>", "<|im_end|>", "<|endoftext|>"];
        match self {
            Self::ChatRag if profile == Profile::Yuan => match answer.find(END) {
                Some(end) => answer[..end].to_owned(),
                // Cutting at −1 takes the last character away.
                None => {
                    let mut kept = answer.to_owned();
                    kept.pop();
                    kept
                }
            },
            // Thoughts stay.
            Self::SummEval if profile == Profile::Yuan => [END, "<eod>", THOUGHT]
                .iter()
                .fold(answer.to_owned(), |a, text| a.replace(text, "")),
            _ => {
                let said = answer.rsplit(THOUGHT).next().unwrap_or_default();
                let end = ENDS.iter().filter_map(|end| said.find(end)).min();
                said[..end.unwrap_or(said.len())].trim().to_owned()
            }
        }
    }

    /// What its published mean is made of.
    pub(crate) fn mean_of(self) -> Vec<Part> {
        match self {
            Self::ChatRag => chatrag::SETS
                .iter()
                .map(|&(set, _)| {
                    let metric = if set == "convfinqa" { "accuracy" } else { "F1" };
                    // The three of DoQA are one of ten.
                    (set, metric, if set.starts_with("doqa") { 1.0 / 30.0 } else { 0.1 })
                })
                .collect(),
            Self::SummEval => {
                let weights =
                    [("ROUGE-1", 0.15), ("ROUGE-2", 0.15), ("BERTScore", 0.35), ("SummaC", 0.35)];
                let sets = summeval::SETS.iter().map(|&(set, ..)| set);
                sets.flat_map(|set| weights.map(|(metric, weight)| (set, metric, weight / 7.0)))
                    .collect()
            }
            Self::MmTab => {
                mmtab::MEAN_OF.iter().map(|&(set, metric)| (set, metric, 1.0 / 17.0)).collect()
            }
            Self::Docmatix => vec![("docmatix", "F1", 1.0)],
        }
    }
}

impl Benchmark {
    /// Means of sets that are published: their name, the metric and the sets.
    pub(crate) fn groups(self) -> Vec<(&'static str, &'static str, Vec<&'static str>)> {
        match self {
            Self::ChatRag => {
                vec![("doqa", "F1", vec!["doqa_cooking", "doqa_travel", "doqa_movies"])]
            }
            Self::SummEval => {
                let sets: Vec<&str> = summeval::SETS.iter().map(|&(set, ..)| set).collect();
                let metrics = ["ROUGE-1", "ROUGE-2", "BERTScore", "SummaC"];
                metrics.into_iter().map(|metric| ("all", metric, sets.clone())).collect()
            }
            Self::MmTab | Self::Docmatix => Vec::new(),
        }
    }
}

impl fmt::Display for Benchmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ChatRag => "ChatRAG",
            Self::SummEval => "SummEval",
            Self::MmTab => "MMTab",
            Self::Docmatix => "Docmatix",
        })
    }
}

impl FromStr for Benchmark {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|benchmark| benchmark.name() == text);
        found.ok_or_else(|| {
            format!("`{text}` is no benchmark: expected {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}
