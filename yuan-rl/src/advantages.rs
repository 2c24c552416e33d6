//! Answers compared with the others to the same prompt.

/// What makes a division by the deviation of nearly equal rewards harmless.
const EPSILON: f64 = 1e-6;

/// `(R − mean) / (std + 1e-6)` within every group of so many answers (GRPO), with the unbiased deviation;
/// 0 where all rewards of a group are equal, or it has one answer (for which upstream's code gives the
/// reward itself).
///
/// ```
/// let advantages = yuan_rl::group_advantages(&[1.0, -1.0, 2.0, 2.0], 2);
/// assert!((advantages[0] - 0.70710).abs() < 1e-4 && advantages[2] == 0.0);
/// ```
///
/// # Panics
///
/// If `group` is 0, or the rewards are no number of groups.
pub fn group_advantages(rewards: &[f32], group: usize) -> Vec<f32> {
    assert!(rewards.len().is_multiple_of(group), "{} rewards in groups of {group}", rewards.len());
    let of_group = |rewards: &[f32]| {
        if rewards.iter().all(|reward| *reward == rewards[0]) {
            return vec![0.0; rewards.len()];
        }
        let rewards: Vec<f64> = rewards.iter().map(|&reward| reward.into()).collect();
        let count = rewards.len() as f64;
        let mean = rewards.iter().sum::<f64>() / count;
        let squares = rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f64>();
        let deviation = (squares / (count - 1.0)).sqrt();
        let advantage = |reward: &f64| ((reward - mean) / (deviation + EPSILON)) as f32;
        rewards.iter().map(advantage).collect::<Vec<f32>>()
    };
    rewards.chunks(group).flat_map(of_group).collect()
}
