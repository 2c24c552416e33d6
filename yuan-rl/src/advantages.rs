//! Answers compared with the others to the same prompt.

/// What makes a division by the deviation of equal rewards harmless.
const EPSILON: f32 = 1e-6;

/// `(R − mean) / (std + 1e-6)` within every group of so many answers (GRPO), with the unbiased deviation;
/// 0 where all rewards of a group are equal, or it has one answer.
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
        let count = rewards.len() as f32;
        let mean = rewards.iter().sum::<f32>() / count;
        let squares = rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f32>();
        let deviation = (squares / (count - 1.0).max(1.0)).sqrt();
        rewards.iter().map(|reward| (reward - mean) / (deviation + EPSILON)).collect::<Vec<_>>()
    };
    rewards.chunks(group).flat_map(of_group).collect()
}
