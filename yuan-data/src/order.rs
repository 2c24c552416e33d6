//! The order of the rows of an epoch: a permutation that is computed, not stored.

/// A permutation of `0..length` that a key decides: any position is found by a few operations, so a
/// shuffled epoch of any size takes no memory and can be entered anywhere.
///
/// It is a Feistel network over the smallest square of a power of two that holds `length`; positions
/// that fall outside are sent through again (cycle walking), less than four times on average.
///
/// ```
/// use yuan_data::Permutation;
///
/// let order = Permutation::new(1000, 7);
/// let mut seen: Vec<u64> = (0..1000).map(|position| order.at(position)).collect();
/// assert_ne!(seen[..4], [0, 1, 2, 3]);
/// seen.sort_unstable();
/// assert!(seen.into_iter().eq(0..1000), "every row once");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    length: u64,
    half_bits: u32,
    keys: [u64; Self::ROUNDS],
}

impl Permutation {
    /// Four rounds of a good round function cannot be told from a random permutation (Luby and
    /// Rackoff); more are cheap, and small domains need them.
    const ROUNDS: usize = 6;

    /// Of `length` positions.
    pub fn new(length: u64, key: u64) -> Self {
        let bits = u64::BITS - length.saturating_sub(1).leading_zeros();
        let mut state = key;
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        });
        Self { length, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// What stands at `position`.
    ///
    /// # Panics
    ///
    /// If `position` is not below the length.
    pub fn at(&self, position: u64) -> u64 {
        assert!(position < self.length, "position {position} of {}", self.length);
        let mut value = position;
        loop {
            value = self.once(value);
            if value < self.length {
                return value;
            }
        }
    }

    fn once(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// Which of `rows` rows stands at a place of the epochs that follow each other: every row once in
/// each. `key` gives the key of an epoch's order; without it, rows keep their own order.
pub fn row_of_epochs(place: u64, rows: u64, key: Option<impl FnOnce(u64) -> u64>) -> u64 {
    let (epoch, position) = (place / rows, place % rows);
    key.map_or(position, |key| Permutation::new(rows, key(epoch)).at(position))
}

/// The finalizer of `SplitMix64`: every bit of the input changes half of the output's.
pub fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_taken_once() {
        for length in [1, 2, 3, 4, 5, 17, 64, 100, 1023, 4096, 5001] {
            for key in [0, 1, u64::MAX] {
                let order = Permutation::new(length, key);
                let mut seen: Vec<u64> = (0..length).map(|at| order.at(at)).collect();
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..length), "{length} {key}");
            }
        }
        // The largest there can be.
        let order = Permutation::new(u64::MAX, 3);
        assert_ne!(order.at(u64::MAX - 1), order.at(0));
    }

    #[test]
    fn keys_make_orders_that_look_random() {
        let length = 10_000;
        let (one, other) = (Permutation::new(length, 1), Permutation::new(length, 2));
        let same = (0..length).filter(|&at| one.at(at) == other.at(at)).count();
        // One on average, and more than ten once in ten million keys.
        assert!(same < 10, "{same}");
        // Neighbours are no more alike than any two: the mean distance of two random positions is a
        // third of the length, with a deviation of 0.24 % for so many pairs.
        let distance = (1..length).map(|at| one.at(at).abs_diff(one.at(at - 1)));
        let mean = distance.sum::<u64>() as f64 / (length - 1) as f64 / length as f64;
        assert!((mean - 1.0 / 3.0).abs() < 0.01, "{mean}");
    }
}
