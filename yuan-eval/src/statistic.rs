//! Scores as functions of sums over items, and how certain they are.

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::bleu;

/// How the numbers of items become a score, in 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Statistic {
    /// Points by possible points: a mean where each item has one.
    Mean,
    /// Right ones, predicted ones and expected ones, over all items together.
    F1,
    /// The counts of [`bleu`].
    Bleu,
    /// The sum of the negative logarithms of the tokens' probabilities, and the tokens: the perplexity,
    /// for which 0 to 100 does not hold.
    Perplexity,
}

/// Times that items are drawn again for an interval.
const RESAMPLES: usize = 1000;

impl Statistic {
    /// How many numbers an item has.
    pub fn width(self) -> usize {
        match self {
            Self::Mean | Self::Perplexity => 2,
            Self::F1 => 3,
            Self::Bleu => 10,
        }
    }

    /// The score of a sum over items.
    ///
    /// # Panics
    ///
    /// If there are not as many sums as the statistic takes.
    pub fn value(self, sums: &[f64]) -> f64 {
        let share = |part: f64, whole: f64| if whole > 0.0 { 100.0 * part / whole } else { 0.0 };
        match (self, sums) {
            (Self::Mean, &[points, possible]) => share(points, possible),
            (Self::F1, &[right, predicted, expected]) => share(2.0 * right, predicted + expected),
            (Self::Perplexity, &[nats, tokens]) => (nats / tokens.max(1.0)).exp(),
            // Of no items there are no sums.
            (_, []) => 0.0,
            (Self::Bleu, sums) => bleu::score(sums),
            (statistic, sums) => panic!("{} sums for {statistic:?}", sums.len()),
        }
    }

    /// Scores of as many items, drawn from these with replacement, again and again; a seed decides the
    /// draws.
    pub(crate) fn resampled(self, items: &[Vec<f64>], seed: u64) -> Vec<f64> {
        resamples(items.len(), seed, |drawn| self.value(&sum(drawn.iter().map(|&at| &*items[at]))))
    }

    /// The same of what `b` scores more than `a`, where both are given the same items.
    pub(crate) fn resampled_difference(self, [a, b]: [&[Vec<f64>]; 2], seed: u64) -> Vec<f64> {
        let of = |items: &[Vec<f64>], drawn: &[usize]| {
            self.value(&sum(drawn.iter().map(|&at| &*items[at])))
        };
        resamples(a.len(), seed, |drawn| of(b, drawn) - of(a, drawn))
    }

    /// The score of items.
    pub fn of(self, items: &[Vec<f64>]) -> f64 {
        self.value(&sum(items.iter().map(Vec::as_slice)))
    }
}

fn sum<'a>(items: impl Iterator<Item = &'a [f64]>) -> Vec<f64> {
    let mut sums: Vec<f64> = Vec::new();
    for item in items {
        sums.resize(item.len(), 0.0);
        sums.iter_mut().zip(item).for_each(|(sum, number)| *sum += number);
    }
    sums
}

/// What comes of items that are drawn again and again, the same ones every time.
fn resamples(count: usize, seed: u64, of: impl Fn(&[usize]) -> f64) -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut drawn = vec![0; count];
    let mut draw = || {
        drawn.iter_mut().for_each(|item| *item = rng.random_range(0..count));
        of(&drawn)
    };
    if count == 0 { Vec::new() } else { (0..RESAMPLES).map(|_| draw()).collect() }
}

/// Where the middle 95 % of some values lie.
pub(crate) fn middle(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        values.get((share * values.len() as f64) as usize).or(values.last()).copied().unwrap_or(0.0)
    };
    [at(0.025), at(0.975)]
}
