//! Which prompts an update is made of (ADS, adaptive dynamic sampling).

use serde::{Deserialize, Serialize};

/// What the answers to a prompt were rewarded with.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRewards {
    /// Of each answer.
    pub rewards: Vec<f32>,
    /// Share of the answers that are right.
    pub pass_rate: f64,
}

/// In which order prompts are taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Those that most answers solve first, as Ultra is trained.
    #[default]
    EasyToHard,
    /// The other way round.
    HardToEasy,
}

/// Prompts for updates of `mini_batch` prompts each: those whose answers differ in their rewards, in
/// order, and then the first of them once more, until their number is a multiple. Nothing is left if no
/// prompt's answers differ: then new answers are needed (ten times at most, in the code).
///
/// Unlike DAPO's, this sampling generates no more prompts than a batch has.
///
/// ```
/// use yuan_rl::{Order, PromptRewards, adaptive_sampling};
///
/// let prompt = |rewards: [f32; 2], pass_rate| PromptRewards { rewards: rewards.into(), pass_rate };
/// let prompts =
///     [prompt([1.0, 1.0], 1.0), prompt([1.0, 0.0], 0.25), prompt([0.0, 1.0], 0.5), prompt([2.0, 0.0], 0.25)];
/// assert_eq!(adaptive_sampling(&prompts, 2, Order::EasyToHard), [2, 1, 3, 2]);
/// ```
///
/// # Panics
///
/// If `mini_batch` is 0.
pub fn adaptive_sampling(prompts: &[PromptRewards], mini_batch: usize, order: Order) -> Vec<usize> {
    let differ = |prompt: &PromptRewards| prompt.rewards.windows(2).any(|pair| pair[0] != pair[1]);
    let mut chosen: Vec<usize> = (0..prompts.len()).filter(|&at| differ(&prompts[at])).collect();
    // Stable: prompts that are equally hard stay in their order.
    chosen.sort_by(|&a, &b| {
        let by_ease = prompts[b].pass_rate.total_cmp(&prompts[a].pass_rate);
        if order == Order::EasyToHard { by_ease } else { by_ease.reverse() }
    });
    let kept = chosen.len();
    let wanted = kept.div_ceil(mini_batch) * mini_batch;
    (kept..wanted).for_each(|at| chosen.push(chosen[at % kept]));
    chosen
}
