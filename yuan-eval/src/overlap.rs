//! F1 over words, as ChatRAG-Bench computes it.

use std::collections::HashMap;

/// Words in lower case without articles; every punctuation character separates them.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let is_separator = |c: char| c.is_whitespace() || c.is_ascii_punctuation();
    let words = lower.split(is_separator).filter(|word| !word.is_empty());
    words.filter(|word| !matches!(*word, "a" | "an" | "the")).map(str::to_owned).collect()
}

/// The harmonic mean of the share of a guess's words that are in the reference, and of the
/// reference's that are in the guess; in 0 to 1.
///
/// ```
/// assert_eq!(yuan_eval::f1("It was in March 2020.", "March 2020"), 4.0 / 7.0);
/// ```
pub fn f1(guess: &str, reference: &str) -> f64 {
    let (guess, reference) = (words(guess), words(reference));
    let mut left: HashMap<&str, usize> = HashMap::new();
    reference.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let mut common = 0;
    for word in &guess {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    2.0 * f64::from(common) / (guess.len() + reference.len()) as f64
}

/// The best F1 over the references that are not empty.
pub(crate) fn best_f1(guess: &str, references: &[String]) -> f64 {
    let references = references.iter().filter(|reference| !reference.trim().is_empty());
    references.map(|reference| f1(guess, reference)).fold(0.0, f64::max)
}
