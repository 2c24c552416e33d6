//! Which row of which data set comes next: a function of the number of the row.

use xxhash_rust::xxh3::xxh3_64;

use crate::{
    DataError, TokenFile,
    order::{mix, row_of_epochs},
};

/// Shares of several sets in one sequence: which set has the next place, and how many it had before,
/// computed from the number of the place.
///
/// The first set gets the places at which the rounded product of its share and the number of places
/// grows; the second gets its part of the others in the same way, and so on. The counts are
/// therefore never more than a few places away from the shares, at any point of the sequence.
///
/// ```
/// use yuan_data::Shares;
///
/// let shares = Shares::new(&[3.0, 1.0])?;
/// let sets: Vec<usize> = (0..8).map(|place| shares.locate(place).0).collect();
/// assert_eq!(sets, [0, 0, 1, 0, 0, 0, 1, 0]);
/// # Ok::<(), yuan_data::DataError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    /// Of what the sets before left, in units of 2⁻³².
    fractions: Vec<u64>,
}

impl Shares {
    const ONE: u64 = 1 << 32;

    /// Shares in proportion to the weights.
    ///
    /// # Errors
    ///
    /// If there is no weight, or one is not a positive number.
    pub fn new(weights: &[f64]) -> Result<Self, DataError> {
        if weights.is_empty() {
            return Err(DataError::Setting("a mixture needs at least one data set".into()));
        }
        if let Some(bad) = weights.iter().find(|weight| !(**weight > 0.0 && weight.is_finite())) {
            return Err(DataError::Setting(format!(
                "the weight {bad} of a data set must be a positive number"
            )));
        }
        let mut rest: f64 = weights.iter().sum();
        let mut fractions = Vec::with_capacity(weights.len());
        for weight in weights {
            fractions.push(((weight / rest * Self::ONE as f64).round() as u64).min(Self::ONE));
            rest -= weight;
        }
        // What rounding left of the last one.
        fractions[weights.len() - 1] = Self::ONE;
        Ok(Self { fractions })
    }

    /// The set that has this place, and how many places it had before.
    pub fn locate(&self, place: u64) -> (usize, u64) {
        let mut rest = place;
        for (set, &fraction) in self.fractions.iter().enumerate() {
            let before = count(rest, fraction);
            if count(rest + 1, fraction) > before {
                return (set, before);
            }
            rest -= before;
        }
        unreachable!("the last set takes what the others leave")
    }

    /// How many of the first `places` each set has.
    pub fn counts(&self, places: u64) -> Vec<u64> {
        let mut rest = places;
        let own = |&fraction: &u64| {
            let own = count(rest, fraction);
            rest -= own;
            own
        };
        self.fractions.iter().map(own).collect()
    }
}

/// The rounded share of so many places.
fn count(places: u64, fraction: u64) -> u64 {
    let half = u128::from(Shares::ONE / 2);
    ((u128::from(places) * u128::from(fraction) + half) >> 32) as u64
}

/// Token files mixed by weight, cut into rows.
///
/// A row of a set is `row_len` tokens and the one that follows them. Every set has epochs of its
/// own: all its rows once, in an order that the seed, its name and the epoch decide, before any a
/// second time. Which row comes at a place is computed from the place alone, so a run goes on
/// anywhere, with another batch size or on other devices.
#[derive(Debug)]
pub struct Mixture {
    row_len: usize,
    seed: Option<u64>,
    shares: Shares,
    sets: Vec<MixedSet>,
}

#[derive(Debug)]
struct MixedSet {
    name: String,
    tokens: TokenFile,
    rows: u64,
}

/// One row of a mixture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MixtureRow {
    /// The set it is from.
    pub set: usize,
    /// Its tokens, one more than the row is long: the last one is only predicted.
    pub tokens: Vec<u32>,
}

impl Mixture {
    /// Rows of `row_len` tokens of sets by name and weight, shuffled by `seed`, or each set in its
    /// own order without one.
    ///
    /// # Errors
    ///
    /// If there is no set, a weight is not positive, two sets have one name, or a set is too small
    /// for a single row.
    pub fn new(
        row_len: usize,
        seed: Option<u64>,
        sets: Vec<(&str, f64, TokenFile)>,
    ) -> Result<Self, DataError> {
        if row_len == 0 {
            return Err(DataError::Setting("a row needs at least one token".into()));
        }
        let weights: Vec<f64> = sets.iter().map(|(_, weight, _)| *weight).collect();
        let shares = Shares::new(&weights)?;
        let mut mixed: Vec<MixedSet> = Vec::with_capacity(sets.len());
        for (name, _, tokens) in sets {
            if mixed.iter().any(|other| other.name == name) {
                return Err(DataError::Setting(format!("two data sets are called `{name}`")));
            }
            let rows = tokens.num_tokens().saturating_sub(1) / row_len as u64;
            if rows == 0 {
                return Err(DataError::NoText(format!(
                    "{}: {} tokens are too few for one row of {row_len}",
                    tokens.path().display(),
                    tokens.num_tokens()
                )));
            }
            mixed.push(MixedSet { name: name.to_owned(), tokens, rows });
        }
        Ok(Self { row_len, seed, shares, sets: mixed })
    }

    /// Tokens of a row.
    pub fn row_len(&self) -> usize {
        self.row_len
    }

    /// Names of the sets, in the order of [`MixtureRow::set`].
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sets.iter().map(|set| set.name.as_str())
    }

    /// Rows of one epoch of a set.
    pub fn num_rows(&self, set: usize) -> u64 {
        self.sets[set].rows
    }

    /// Rows of each set among the first `places`.
    pub fn counts(&self, places: u64) -> Vec<u64> {
        self.shares.counts(places)
    }

    /// The set at a place of the mixture, and which of its own rows stands there.
    pub fn locate(&self, place: u64) -> (usize, u64) {
        let (set, index) = self.shares.locate(place);
        let MixedSet { name, rows, .. } = &self.sets[set];
        let key = self.seed.map(|seed| {
            let of_set = mix(xxh3_64(name.as_bytes()));
            move |epoch| mix(seed ^ of_set.wrapping_add(mix(epoch)))
        });
        (set, row_of_epochs(index, *rows, key))
    }

    /// The row at a place of the mixture.
    ///
    /// # Errors
    ///
    /// If its file holds what is no token.
    pub fn row(&self, place: u64) -> Result<MixtureRow, DataError> {
        let (set, row) = self.locate(place);
        let tokens = self.sets[set].tokens.read(row * self.row_len as u64, self.row_len + 1)?;
        Ok(MixtureRow { set, tokens })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn places_are_shared_by_weight_and_counted_anywhere(
            weights in prop::collection::vec(0.001_f64..100.0, 1..6),
            start in 0_u64..1 << 40,
        ) {
            let shares = Shares::new(&weights).unwrap();
            let total: f64 = weights.iter().sum();
            // A plain list, counted one by one.
            let mut counts = vec![0; weights.len()];
            for place in 0..10_000 {
                prop_assert_eq!(&shares.counts(place), &counts);
                let (set, before) = shares.locate(place);
                prop_assert_eq!(before, counts[set]);
                counts[set] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                // 0.1 % of the places.
                prop_assert!((*count as f64 - 10_000.0 * weight / total).abs() <= 10.0);
            }
            // Far away, from the numbers alone.
            let (set, before) = shares.locate(start);
            let mut after = shares.counts(start);
            prop_assert_eq!(after[set], before);
            after[set] += 1;
            prop_assert_eq!(shares.counts(start + 1), after);
        }
    }

    #[test]
    fn weights_that_are_none_are_refused() {
        for weights in [&[][..], &[0.0], &[1.0, -1.0], &[f64::NAN], &[f64::INFINITY]] {
            assert!(Shares::new(weights).is_err(), "{weights:?}");
        }
    }
}
