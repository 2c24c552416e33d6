//! ROUGE-N (Lin 2004) as Google's `rouge_score` computes it with its stemmer on.

use std::collections::HashMap;

use crate::stem;

/// Precision, recall and their harmonic mean, in 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rouge {
    /// Share of the prediction that is in the reference.
    pub precision: f64,
    /// Share of the reference that is in the prediction.
    pub recall: f64,
    /// 2 · precision · recall / (precision + recall)
    pub f: f64,
}

/// Runs of letters and digits in lower case; words of more than three letters are stemmed.
fn tokens(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(|word| if word.len() > 3 { stem(word) } else { word.to_owned() }).collect()
}

fn counts(tokens: &[String], n: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    tokens.windows(n).for_each(|gram| *counts.entry(gram).or_default() += 1);
    counts
}

/// How much of the groups of `n` neighbouring words a prediction and a reference have in common.
///
/// # Panics
///
/// If `n` is 0.
pub fn n(n: usize, prediction: &str, reference: &str) -> Rouge {
    let (prediction, reference) = (tokens(prediction), tokens(reference));
    let (of_prediction, of_reference) = (counts(&prediction, n), counts(&reference, n));
    let common = of_reference
        .iter()
        .map(|(gram, &count)| of_prediction.get(gram).map_or(0, |&predicted| count.min(predicted)));
    let common = common.sum::<usize>() as f64;
    let share = |tokens: &[String]| common / (tokens.len() + 1).saturating_sub(n).max(1) as f64;
    let (precision, recall) = (share(&prediction), share(&reference));
    let f = if common > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 };
    Rouge { precision, recall, f }
}
