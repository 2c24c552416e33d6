//! ROUGE and BLEU against `rouge_score` and `sacrebleu`.

use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::Value;
use yuan_eval::{Statistic, bleu, f1, rouge};

/// What the two programs made of some texts; `YUAN_REFERENCE` names another directory of theirs.
fn reference() -> Value {
    let own = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let directory = std::env::var_os("YUAN_REFERENCE").map_or_else(own, PathBuf::from);
    let text = std::fs::read(directory.join("metrics/rouge_bleu.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap()
}

#[test]
fn reference_rouge_is_that_of_rouge_score() {
    let cases = reference();
    let cases = cases["rouge_score (stemmer on)"].as_array().unwrap();
    assert!(cases.len() > 50);
    for case in cases {
        for n in [1, 2] {
            let found = rouge::n(n, text(case, "prediction"), text(case, "reference"));
            let found = [found.precision, found.recall, found.f];
            let expected = &case[format!("rouge{n}")];
            for (at, found) in found.into_iter().enumerate() {
                let apart = (found - expected[at].as_f64().unwrap()).abs();
                assert!(apart <= 1e-6, "ROUGE-{n}, number {at}: {found} in {case}");
            }
        }
    }
}

#[test]
fn reference_bleu_is_that_of_sacrebleu() {
    let cases = reference();
    let cases = cases["sacrebleu corpus_bleu (defaults)"].as_array().unwrap();
    assert!(cases.len() > 3);
    for case in cases {
        let [predictions, references] = ["predictions", "references"]
            .map(|key| case[key].as_array().unwrap().iter().map(|text| text.as_str().unwrap()));
        let counts = predictions.zip(references).map(|(p, r)| bleu::counts(p, r).to_vec());
        let found = Statistic::Bleu.of(&counts.collect::<Vec<_>>());
        let apart = (found - case["bleu"].as_f64().unwrap()).abs();
        assert!(apart <= 1e-4, "{found}: {case}");
    }
}

#[test]
fn words_are_compared_without_case_articles_and_punctuation() {
    assert_eq!(f1("the cat", "a cat!"), 1.0);
    assert_eq!(f1("", "a cat"), 0.0);
    assert_eq!(f1("cat", ""), 0.0);
    assert_eq!(f1("cat cat dog", "cat"), 0.5);
    assert_eq!(f1("U.S.-based", "u s based"), 1.0);
}

proptest! {
    #[test]
    fn metrics_stay_in_their_bounds_and_know_equal_texts(text: String, other: String) {
        for found in [rouge::n(1, &text, &other).f, rouge::n(2, &text, &other).f, f1(&text, &other)] {
            prop_assert!((0.0..=1.0).contains(&found));
        }
        prop_assert_eq!(f1(&text, &other), f1(&other, &text));
        let found = Statistic::Bleu.of(&[bleu::counts(&text, &other).to_vec()]);
        prop_assert!((0.0..=100.0 + 1e-9).contains(&found), "{found}");
        let same = rouge::n(1, &text, &text).f;
        prop_assert!(same == 1.0 || !text.chars().any(|c| c.is_ascii_alphanumeric()));
    }
}
