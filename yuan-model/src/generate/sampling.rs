//! From scores to one token, in the order in which the `transformers` library applies its settings.

use rand::Rng;

use super::error::GenerateError;

/// How the next token is chosen: repetition penalty, temperature, top-k, top-p, then a draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the scores; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only this many of the likeliest tokens (and those level with the last of them); absent: all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability; 1: all.
    pub top_p: f64,
    /// Divides positive scores of tokens that occurred, multiplies negative ones (CTRL, arXiv
    /// 1909.05858); 1: off.
    pub repetition_penalty: f64,
}

impl Sampling {
    /// Always the likeliest token (of equals, the one with the lower id).
    pub const fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, repetition_penalty: 1.0 }
    }

    /// Draws by the model's own probabilities.
    pub const fn unchanged() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: 1.0, repetition_penalty: 1.0 }
    }

    /// Checks the settings, before anything is computed by them.
    ///
    /// # Errors
    ///
    /// Names the first that is out of its range.
    pub fn validate(&self) -> Result<(), GenerateError> {
        let settings = [
            ("temperature", self.temperature, self.temperature >= 0.0, "0 or more"),
            ("top_k", self.top_k.unwrap_or(1) as f64, self.top_k != Some(0), "at least 1"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0,
                "above 0",
            ),
        ];
        match settings.into_iter().find(|(_, value, allowed, _)| !allowed || !value.is_finite()) {
            Some((name, value, _, expected)) => {
                Err(GenerateError::Sampling { name, value, expected })
            }
            None => Ok(()),
        }
    }

    /// The next token; `seen` says which tokens occurred. None if a score is NaN or +∞, or all are
    /// −∞.
    pub(super) fn choose(&self, logits: &[f32], seen: &[bool], rng: &mut impl Rng) -> Option<u32> {
        let mut scores: Vec<f64> = logits.iter().map(|&score| f64::from(score)).collect();
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if !best.is_finite() || scores.iter().any(|score| score.is_nan()) {
            return None;
        }
        if self.repetition_penalty != 1.0 {
            for (score, _) in scores.iter_mut().zip(seen).filter(|(_, seen)| **seen) {
                *score = if *score > 0.0 {
                    *score / self.repetition_penalty
                } else {
                    *score * self.repetition_penalty
                };
            }
        }
        if self.temperature == 0.0 {
            return likeliest(&scores);
        }
        let mut candidates: Vec<(u32, f64)> = scores
            .iter()
            .enumerate()
            .map(|(token, &score)| (token as u32, score / self.temperature))
            .collect();
        if let Some(k) = self.top_k.filter(|&k| k < candidates.len()) {
            let (_, last, _) = candidates.select_nth_unstable_by(k - 1, |a, b| b.1.total_cmp(&a.1));
            let last = last.1;
            candidates.retain(|(_, score)| *score >= last);
        }
        if self.top_k.is_some() || self.top_p < 1.0 {
            // Ties in the order of the ids, so that a draw does not depend on how the sort works.
            candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        }
        let best = candidates.iter().map(|(_, score)| *score).fold(f64::NEG_INFINITY, f64::max);
        let mut total = 0.0;
        for (_, score) in &mut candidates {
            *score = (*score - best).exp();
            total += *score;
        }
        let mut mass = 0.0;
        let within = candidates.iter().position(|(_, p)| {
            mass += p;
            mass >= self.top_p * total
        });
        candidates.truncate(within.map_or(candidates.len(), |last| last + 1));
        draw(&candidates, rng)
    }
}

fn likeliest(scores: &[f64]) -> Option<u32> {
    let better = |best: Option<(usize, f64)>, (token, &score): (usize, &f64)| match best {
        Some((_, highest)) if score <= highest => best,
        _ => Some((token, score)),
    };
    scores.iter().enumerate().fold(None, better).map(|(token, _)| token as u32)
}

/// Draws by weight.
fn draw(candidates: &[(u32, f64)], rng: &mut impl Rng) -> Option<u32> {
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    // 53 bits: every double in [0, 1) that this can make is equally likely.
    let mut left = (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64 * total;
    for &(token, weight) in candidates {
        if left < weight {
            return Some(token);
        }
        left -= weight;
    }
    candidates.last().map(|(token, _)| *token) // the sum was rounded
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    /// Frequencies of 40,000 draws.
    fn frequencies(sampling: Sampling, logits: &[f32], seen: &[bool]) -> Vec<f64> {
        const DRAWS: usize = 40_000;
        let mut rng = StdRng::seed_from_u64(7);
        let mut counts = vec![0; logits.len()];
        for _ in 0..DRAWS {
            counts[sampling.choose(logits, seen, &mut rng).unwrap() as usize] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / DRAWS as f64).collect()
    }

    fn softmax(scores: &[f64]) -> Vec<f64> {
        let total: f64 = scores.iter().map(|score| score.exp()).sum();
        scores.iter().map(|score| score.exp() / total).collect()
    }

    /// Four standard deviations of a frequency, and nothing at all where nothing is expected.
    fn assert_frequencies(found: &[f64], expected: &[f64]) {
        for (found, expected) in found.iter().zip(expected) {
            let deviation = (expected * (1.0 - expected) / 40_000.0).sqrt();
            assert!((found - expected).abs() <= 4.0 * deviation, "{found} instead of {expected}");
        }
    }

    const LOGITS: [f32; 5] = [0.5, 2.0, -1.0, 1.5, 0.0];

    #[test]
    fn draws_follow_the_softmax_of_the_scores() {
        let scores = LOGITS.map(f64::from);
        assert_frequencies(&frequencies(Sampling::unchanged(), &LOGITS, &[]), &softmax(&scores));
        let cold = Sampling { temperature: 0.5, ..Sampling::unchanged() };
        assert_frequencies(
            &frequencies(cold, &LOGITS, &[]),
            &softmax(&scores.map(|score| score * 2.0)),
        );
    }

    #[test]
    fn top_k_keeps_the_k_likeliest_and_their_equals() {
        let inf = f64::NEG_INFINITY;
        let two = Sampling { top_k: Some(2), ..Sampling::unchanged() };
        assert_frequencies(&frequencies(two, &LOGITS, &[]), &softmax(&[inf, 2.0, inf, 1.5, inf]));
        let level = [1.0, 0.0, 1.0, 1.0];
        assert_frequencies(&frequencies(two, &level, &[]), &[1.0 / 3.0, 0.0, 1.0 / 3.0, 1.0 / 3.0]);
        let more_than_there_are = Sampling { top_k: Some(9), ..Sampling::unchanged() };
        assert_frequencies(
            &frequencies(more_than_there_are, &level, &[]),
            &softmax(&[1.0, 0.0, 1.0, 1.0]),
        );
    }

    #[test]
    fn top_p_keeps_the_fewest_tokens_that_reach_the_probability() {
        // Probabilities: 0.49, 0.30, 0.11, 0.07, 0.02 for the tokens 1, 3, 0, 4, 2.
        let inf = f64::NEG_INFINITY;
        for (top_p, kept) in [
            (0.3, [inf, 2.0, inf, inf, inf]),
            (0.6, [inf, 2.0, inf, 1.5, inf]),
            (0.85, [0.5, 2.0, inf, 1.5, inf]),
        ] {
            let nucleus = Sampling { top_p, ..Sampling::unchanged() };
            assert_frequencies(&frequencies(nucleus, &LOGITS, &[]), &softmax(&kept));
        }
    }

    #[test]
    fn the_repetition_penalty_makes_what_occurred_less_likely_on_either_side_of_zero() {
        let seen = [false, true, true];
        let penalty = Sampling { repetition_penalty: 2.0, ..Sampling::unchanged() };
        assert_frequencies(
            &frequencies(penalty, &LOGITS, &seen),
            &softmax(&[0.5, 1.0, -2.0, 1.5, 0.0]),
        );
        let greedy = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        assert_eq!(greedy.choose(&LOGITS, &seen, &mut StdRng::seed_from_u64(0)), Some(3));
    }

    #[test]
    fn greedy_takes_the_likeliest_and_of_equals_the_first() {
        let mut rng = StdRng::seed_from_u64(0);
        assert_eq!(Sampling::greedy().choose(&LOGITS, &[], &mut rng), Some(1));
        assert_eq!(Sampling::greedy().choose(&[1.0, 3.0, 3.0], &[], &mut rng), Some(1));
    }

    #[test]
    fn scores_that_are_no_numbers_choose_nothing() {
        let mut rng = StdRng::seed_from_u64(0);
        for bad in [[f32::NAN, 1.0], [f32::INFINITY, 1.0], [f32::NEG_INFINITY; 2]] {
            for sampling in [Sampling::greedy(), Sampling::unchanged()] {
                assert_eq!(sampling.choose(&bad, &[], &mut rng), None);
            }
        }
        let hidden = [f32::NEG_INFINITY, 0.0];
        assert_eq!(Sampling::unchanged().choose(&hidden, &[], &mut rng), Some(1));
    }
}
