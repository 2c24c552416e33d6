//! Seeds that have nothing to do with each other.

use yuan_data::mix;

/// A seed that two numbers decide. Sums and multiples of them would not do: an answer of one round
/// would have the seed of another answer of the next round.
pub(crate) fn mixed(seed: u64, number: u64) -> u64 {
    mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ number)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use yuan_model::GenerationOptions;

    use super::*;

    #[test]
    fn no_two_answers_of_a_run_share_a_stream() {
        for seed in 0..3 {
            let answers = (0..200).flat_map(|round| {
                let options = GenerationOptions { seed: mixed(seed, round), ..Default::default() };
                (0..256).map(move |answer| options.seed_of(answer))
            });
            assert_eq!(answers.collect::<HashSet<u64>>().len(), 200 * 256);
        }
    }
}
