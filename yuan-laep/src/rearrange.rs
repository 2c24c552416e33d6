//! Where the kept experts sit: Algorithm 2, *expert rearranging*.

use serde::{Deserialize, Serialize};

/// Spreads the kept experts over `groups` device groups of equal size and near-equal load.
///
/// Visits the experts by load, descending (ties: lower index first), and gives each to the
/// group with the smallest total load that still has room (ties: lowest group). This is the
/// balanced packing of DeepSeek's EPLB, and LPT scheduling with a bound on the group size.
///
/// `load[e]` is the load of expert `e`; `kept` lists distinct experts in any order.
///
/// # Panics
///
/// If `groups` is zero or does not divide the number of kept experts.
pub fn rearrange(load: &[u64], kept: &[usize], groups: usize) -> Vec<Vec<usize>> {
    assert!(groups > 0 && kept.len().is_multiple_of(groups), "{} experts in {groups} groups", kept.len());
    let capacity = kept.len() / groups;
    let mut order = kept.to_vec();
    order.sort_by_key(|&expert| (std::cmp::Reverse(load[expert]), expert));
    let mut filled: Vec<(u128, Vec<usize>)> = vec![(0, Vec::with_capacity(capacity)); groups];
    for expert in order {
        let with_room = filled.iter_mut().filter(|(_, members)| members.len() < capacity);
        // `min_by_key` returns the first of equal groups. As many places as experts: one has room.
        let (total, members) = with_room.min_by_key(|(total, _)| *total).expect("a group with room");
        *total += u128::from(load[expert]);
        members.push(expert);
    }
    filled.into_iter().map(|(_, members)| members).collect()
}

/// How evenly groups are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GroupBalance {
    /// Load of the busiest group over the mean load of a group; 1 is perfect.
    pub max_over_mean: f64,
    /// No arrangement can be better than `max(1, busiest expert / mean group load)`.
    pub lower_bound: f64,
}

impl GroupBalance {
    /// Balance of the given groups; perfect when there is no load at all.
    pub fn of(load: &[u64], groups: &[Vec<usize>]) -> Self {
        let totals: Vec<u128> =
            groups.iter().map(|members| members.iter().map(|&e| u128::from(load[e])).sum()).collect();
        let sum: u128 = totals.iter().sum();
        if sum == 0 {
            return Self { max_over_mean: 1.0, lower_bound: 1.0 };
        }
        let mean = sum as f64 / groups.len() as f64;
        let busiest = groups.iter().flatten().map(|&e| load[e]).max().unwrap_or(0);
        Self {
            max_over_mean: totals.iter().copied().max().unwrap_or(0) as f64 / mean,
            lower_bound: (busiest as f64 / mean).max(1.0),
        }
    }
}
