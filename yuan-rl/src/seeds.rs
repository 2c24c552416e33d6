//! Seeds that have nothing to do with each other.

/// A seed that two numbers decide: the finaliser of `SplitMix64`, over each of them. Sums and multiples would
/// meet: neighbouring rounds have neighbouring sequences.
pub(crate) fn mixed(seed: u64, number: u64) -> u64 {
    finish(finish(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ number)
}

fn finish(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
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
