//! Corpus BLEU (Papineni et al. 2002) with the defaults of `sacrebleu`: its tokeniser 13a, groups of
//! up to four words, exponential smoothing.

use std::collections::HashMap;

/// Longest groups of words.
const ORDERS: usize = 4;

/// What one sentence adds to a corpus: matching groups and all groups of one to four words, words of
/// the sentence and of its reference.
pub type Counts = [f64; 2 * ORDERS + 2];

/// Counts of a sentence.
pub fn counts(prediction: &str, reference: &str) -> Counts {
    let (prediction, reference) = (tokens(prediction), tokens(reference));
    let mut counts = [0.0; 2 * ORDERS + 2];
    for order in 1..=ORDERS {
        let [of_prediction, of_reference] =
            [&prediction, &reference].map(|tokens| groups(tokens, order));
        let matching = of_prediction.iter().map(|(group, &count)| {
            of_reference.get(group).map_or(0, |&expected| count.min(expected))
        });
        counts[order - 1] = matching.sum::<usize>() as f64;
        counts[ORDERS + order - 1] = of_prediction.values().sum::<usize>() as f64;
    }
    counts[2 * ORDERS] = prediction.len() as f64;
    counts[2 * ORDERS + 1] = reference.len() as f64;
    counts
}

fn groups(tokens: &[String], order: usize) -> HashMap<&[String], usize> {
    let mut groups = HashMap::new();
    tokens.windows(order).for_each(|group| *groups.entry(group).or_default() += 1);
    groups
}

/// BLEU of a corpus in 0 to 100, from the sum of its sentences' [`counts`].
///
/// # Panics
///
/// If there are not as many sums as counts.
pub fn score(sums: &[f64]) -> f64 {
    let (matching, all) = (&sums[..ORDERS], &sums[ORDERS..2 * ORDERS]);
    let (length, expected) = (sums[2 * ORDERS], sums[2 * ORDERS + 1]);
    if matching.iter().all(|&count| count == 0.0) {
        return 0.0;
    }
    let brevity = if length < expected { (1.0 - expected / length).exp() } else { 1.0 };
    let (mut smooth, mut logs, mut orders) = (1.0, 0.0, 0);
    for (&matching, &all) in matching.iter().zip(all) {
        // Shorter sentences have no groups of this many words.
        if all == 0.0 {
            break;
        }
        let precision = if matching == 0.0 {
            smooth *= 2.0;
            100.0 / (smooth * all)
        } else {
            100.0 * matching / all
        };
        logs += precision.ln();
        orders += 1;
    }
    // Orders that no sentence is long enough for count as nothing.
    if orders < ORDERS { 0.0 } else { brevity * (logs / ORDERS as f64).exp() }
}

/// The words of `mteval-v13a`.
fn tokens(text: &str) -> Vec<String> {
    let text = text
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ")
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
        .replace("&lt;", "<")
        .replace("&gt;", ">");
    let text: Vec<char> = format!(" {text} ").chars().collect();
    let is_symbol =
        |c: char| matches!(c, '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/');
    let text = text.iter().flat_map(|&c| match is_symbol(c) {
        true => vec![' ', c, ' '],
        false => vec![c],
    });
    let is_point = |c: char| matches!(c, '.' | ',');
    // Pairs do not overlap, as in the expressions that the original is made of.
    let text = pairs(text.collect(), |a, b| {
        (!a.is_ascii_digit() && is_point(b)).then(|| vec![a, ' ', b, ' '])
    });
    let text =
        pairs(text, |a, b| (is_point(a) && !b.is_ascii_digit()).then(|| vec![' ', a, ' ', b]));
    let text = pairs(text, |a, b| (a.is_ascii_digit() && b == '-').then(|| vec![a, ' ', b, ' ']));
    let text: String = text.into_iter().collect();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Replaces pairs of neighbours from the left.
fn pairs(text: Vec<char>, replaced: impl Fn(char, char) -> Option<Vec<char>>) -> Vec<char> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(&c) = text.get(at) {
        match text.get(at + 1).and_then(|&next| replaced(c, next)) {
            Some(pair) => {
                out.extend(pair);
                at += 2;
            }
            None => {
                out.push(c);
                at += 1;
            }
        }
    }
    out
}
