//! The toy of the README: its text, its model and its settings, which are also the defaults of
//! `yuan pretrain`.

use std::path::Path;

use yuan_data::{DataError, Document};
use yuan_laep::{PruneLimits, StabilityTest};
use yuan_model::YuanConfig;
use yuan_train::{LaepConfig, TrainConfig, Trigger};

pub use crate::corpus::read_crate_sources;

/// Text without a data set to download: sources and documentation of the crates that this library
/// was built from, which Cargo has unpacked. `Cargo.lock` pins every byte.
///
/// # Errors
///
/// If Cargo or its registry is not there; a directory of text (`RunData::Text`) serves then.
pub fn corpus() -> Result<Vec<Document>, DataError> {
    read_crate_sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
}

/// A model of 29.9 M parameters: 4 layers of 16 experts, of which every token visits two.
pub fn model() -> YuanConfig {
    YuanConfig::toy(4096)
}

/// 240 steps of 2,048 tokens; the experts are pruned as soon as the loads of all layers are stable.
pub fn train_config() -> TrainConfig {
    TrainConfig {
        validate_every: Some(60),
        laep: LaepConfig {
            window_steps: 10,
            trigger: Trigger::Stable { rounds: 1 },
            stability: StabilityTest { windows: 3, max_change: 0.12, min_rank_correlation: 0.6 },
            limits: PruneLimits {
                beta: 0.19.into(),
                multiple_of: 2,
                min_experts: 8,
                ..PruneLimits::default()
            },
            groups: 2,
            ..LaepConfig::default()
        },
        ..TrainConfig::default()
    }
}

/// Prompts with their answers.
pub type Questions = Vec<[String; 2]>;

/// A small task for instruction tuning: three goods have three prices, and one of the prices is asked
/// for. Returns what is learnt and what is held out: prompts that are not learnt, of the same goods
/// and prices. (If a price of a good were held out instead, a model could learn that it is never
/// true.)
pub fn conversations(count: usize) -> [Questions; 2] {
    let mut drawn = 0_u64;
    let mut draw = |below: usize| {
        // Knuth's linear congruential generator; the upper bits are the good ones.
        drawn =
            drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (drawn >> 33) as usize % below
    };
    let mut three = |below: usize| loop {
        let drawn = [draw(below), draw(below), draw(below)];
        if drawn[0] != drawn[1] && drawn[1] != drawn[2] && drawn[2] != drawn[0] {
            return drawn;
        }
    };
    let mut questions = [Vec::with_capacity(count), Vec::new()];
    while questions[0].len() < count || questions[1].len() < HELD_OUT {
        let (goods, prices, asked) = (three(GOODS.len()), three(9), three(3)[0]);
        let told = [0, 1, 2].map(|i| format!("The {} costs {}.", GOODS[goods[i]], 1 + prices[i]));
        let prompt = format!("{} What does the {} cost?", told.join(" "), GOODS[goods[asked]]);
        let is_held_out = yuan_model::fnv1a(&prompt).is_multiple_of(20);
        let (part, most) = if is_held_out { (1, HELD_OUT) } else { (0, count) };
        if questions[part].len() < most {
            questions[part].push([prompt, told[asked].clone()]);
        }
    }
    questions
}

/// Questions that are held out.
const HELD_OUT: usize = 100;

const GOODS: [&str; 12] =
    ["key", "lamp", "book", "map", "coin", "rope", "bell", "cup", "ring", "hat", "drum", "kite"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_out_is_not_learnt_and_can_be_answered() {
        let [learnt, held_out] = conversations(2000);
        assert_eq!((learnt.len(), held_out.len()), (2000, HELD_OUT));
        for [prompt, answer] in &held_out {
            let good = prompt.rsplit("does the ").next().unwrap().trim_end_matches(" cost?");
            assert!(answer.starts_with(&format!("The {good} costs ")), "{prompt} {answer}");
            assert!(prompt.contains(answer.as_str()), "{prompt} {answer}");
            assert!(learnt.iter().all(|[other, _]| other != prompt), "{prompt}");
        }
    }
}
