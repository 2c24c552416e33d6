//! Scores that Yuan's authors published (arXiv 2601.14327, §5, and the README of Yuan3.0 Ultra).

use crate::Benchmark;

/// A published score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Published {
    /// The set; none for the mean of all.
    pub set: Option<&'static str>,
    /// The metric.
    pub metric: &'static str,
    /// Of Yuan3.0 Ultra.
    pub ultra: f64,
    /// The best of the other models in the same table, and its name.
    pub best_other: (f64, &'static str),
}

const fn of(
    set: Option<&'static str>,
    metric: &'static str,
    ultra: f64,
    best_other: (f64, &'static str),
) -> Published {
    Published { set, metric, ultra, best_other }
}

impl Published {
    /// What was published of a set by a metric; of the mean of all, if no set is named.
    pub fn find(benchmark: Benchmark, set: Option<&str>, metric: &str) -> Option<&'static Self> {
        published(benchmark).iter().find(|number| number.set == set && number.metric == metric)
    }
}

const CHATRAG: [Published; 11] = [
    of(None, "mean", 68.2, (53.6, "Kimi K2.5")),
    of(Some("doc2dial"), "F1", 55.8, (35.3, "Claude Opus 4.6")),
    of(Some("quac"), "F1", 54.5, (30.9, "Kimi K2.5")),
    of(Some("qrecc"), "F1", 57.3, (49.9, "Kimi K2.5")),
    of(Some("coqa"), "F1", 94.6, (82.5, "Kimi K2.5")),
    of(Some("doqa"), "F1", 63.4, (37.3, "Claude Opus 4.6")),
    of(Some("convfinqa"), "accuracy", 79.8, (86.5, "Claude Opus 4.6")),
    of(Some("sqa"), "F1", 91.0, (86.7, "o3")),
    of(Some("topiocqa"), "F1", 72.4, (50.8, "Kimi K2.5")),
    of(Some("hybridial"), "F1", 72.9, (51.1, "Kimi K2.5")),
    of(Some("inscit"), "F1", 40.0, (34.4, "Kimi K2.5")),
];

const SUMMEVAL: [Published; 5] = [
    of(None, "mean", 62.8, (59.3, "DeepSeek-V3")),
    of(Some("all"), "ROUGE-1", 59.1, (33.3, "DeepSeek-V3.2")),
    of(Some("all"), "ROUGE-2", 41.0, (11.9, "DeepSeek-V3.2")),
    of(Some("all"), "BERTScore", 91.1, (86.3, "DeepSeek-V3")),
    of(Some("all"), "SummaC", 45.4, (68.2, "DeepSeek-V3")),
];

const MMTAB: [Published; 8] = [
    of(None, "mean", 62.3, (66.2, "Kimi K2.5")),
    of(Some("TABMWP"), "accuracy", 91.8, (95.9, "Kimi K2.5")),
    of(Some("WTQ"), "accuracy", 77.9, (79.6, "Gemini 3.1 Pro")),
    of(Some("HiTab"), "accuracy", 67.6, (77.8, "GPT-5.1")),
    of(Some("TAT-QA"), "accuracy", 74.9, (62.4, "Kimi K2.5")),
    of(Some("FeTaQA"), "BLEU", 39.2, (12.0, "Claude Opus 4.6")),
    of(Some("TabFact"), "accuracy", 90.4, (90.6, "Kimi K2.5")),
    of(Some("InfoTabs"), "accuracy", 89.7, (81.8, "Kimi K2.5")),
];

const DOCMATIX: [Published; 1] = [of(None, "mean", 67.4, (56.8, "GPT-4o"))];

/// What was published of a benchmark.
pub fn published(benchmark: Benchmark) -> &'static [Published] {
    match benchmark {
        Benchmark::ChatRag => &CHATRAG,
        Benchmark::SummEval => &SUMMEVAL,
        Benchmark::MmTab => &MMTAB,
        Benchmark::Docmatix => &DOCMATIX,
    }
}
