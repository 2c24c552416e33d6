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

/// A small task for instruction tuning: three persons have three things, and one of the things is
/// asked for. Returns what is learnt and what is held out, where who has what is a pair that no
/// learnt prompt has.
pub fn conversations(count: usize) -> [Questions; 2] {
    let mut drawn = 0_u64;
    let mut draw = |below: usize| {
        // Knuth's linear congruential generator; the upper bits are the good ones.
        drawn =
            drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (drawn >> 33) as usize % below
    };
    let mut questions = [Vec::with_capacity(count), Vec::new()];
    while questions[0].len() < count || questions[1].len() < HELD_OUT {
        let (name, thing, step) = (draw(NAMES.len()), draw(THINGS.len()), 1 + draw(4));
        // Three persons and three things that differ.
        let facts = [0, 1, 2].map(|i| {
            [(name + i * step) % NAMES.len(), (thing + i * (1 + step % 3)) % THINGS.len()]
        });
        let is_held_out = |fact: &[usize; 2]| (3 * fact[0] + fact[1]).is_multiple_of(8);
        let held_out = facts.iter().filter(|fact| is_held_out(fact)).count();
        let asked = facts[draw(3)];
        let told =
            facts.map(|[name, thing]| format!("{} has the {}. ", NAMES[name], THINGS[thing]));
        let prompt = format!("{}Who has the {}?", told.concat(), THINGS[asked[1]]);
        let question = [prompt, format!("{}.", NAMES[asked[0]])];
        match (held_out, is_held_out(&asked)) {
            (0, _) if questions[0].len() < count => questions[0].push(question),
            (_, true) if questions[1].len() < HELD_OUT => questions[1].push(question),
            _ => {}
        }
    }
    questions
}

/// Questions that are held out.
const HELD_OUT: usize = 100;

const NAMES: [&str; 12] = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas", "Karin",
    "Leo",
];

const THINGS: [&str; 12] =
    ["key", "lamp", "book", "map", "coin", "rope", "bell", "cup", "ring", "hat", "drum", "kite"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_out_is_told_in_no_learnt_prompt() {
        let [learnt, held_out] = conversations(2000);
        assert_eq!((learnt.len(), held_out.len()), (2000, 100));
        let told: String = learnt.iter().map(|[prompt, _]| prompt.as_str()).collect();
        for [prompt, answer] in &held_out {
            let thing = prompt.rsplit("has the ").next().unwrap().trim_end_matches('?');
            let fact = format!("{} has the {thing}. ", answer.trim_end_matches('.'));
            assert!(prompt.contains(&fact), "{prompt} {answer}");
            assert!(!told.contains(&fact), "{fact}");
        }
    }
}
