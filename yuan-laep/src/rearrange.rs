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
    assert!(
        groups > 0 && kept.len().is_multiple_of(groups),
        "{} experts in {groups} groups",
        kept.len()
    );
    let capacity = kept.len() / groups;
    let mut order = kept.to_vec();
    order.sort_by_key(|&expert| (std::cmp::Reverse(load[expert]), expert));
    let mut filled: Vec<(u128, Vec<usize>)> = vec![(0, Vec::with_capacity(capacity)); groups];
    for expert in order {
        let with_room = filled.iter_mut().filter(|(_, members)| members.len() < capacity);
        // `min_by_key` returns the first of equal groups. As many places as experts: one has room.
        let (total, members) =
            with_room.min_by_key(|(total, _)| *total).expect("a group with room");
        *total += u128::from(load[expert]);
        members.push(expert);
    }
    filled.into_iter().map(|(_, members)| members).collect()
}

/// Cuts experts into groups without rearranging them, as they sit before a plan.
pub(crate) fn cut_in_order(experts: &[usize], groups: usize) -> Vec<Vec<usize>> {
    let size = experts.len().div_ceil(groups.max(1)).max(1);
    experts.chunks(size).map(<[usize]>::to_vec).collect()
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
        let totals: Vec<u128> = groups
            .iter()
            .map(|members| members.iter().map(|&e| u128::from(load[e])).sum())
            .collect();
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

/// Experts up to which [`optimal_balance`] searches, and partial arrangements that it looks at.
const SEARCHED_EXPERTS: usize = 16;
const SEARCHED_NODES: u32 = 200_000;

/// `max_over_mean` of the best possible arrangement of the grouped experts into as many groups of
/// equal size: what the greedy packing is measured against.
///
/// Found by branch and bound for up to 16 experts, where that ends soon; for more, only where
/// `groups` already meet a bound that no arrangement beats. `None` where the optimum is not known.
pub fn optimal_balance(load: &[u64], groups: &[Vec<usize>]) -> Option<f64> {
    let mut loads: Vec<u128> =
        groups.iter().flatten().map(|&expert| u128::from(load[expert])).collect();
    loads.sort_unstable_by(|a, b| b.cmp(a));
    let (total, capacity) = (loads.iter().sum::<u128>(), loads.len() / groups.len().max(1));
    if capacity == 0 {
        return None;
    }
    if total == 0 {
        return Some(1.0);
    }
    let sum =
        |members: &Vec<usize>| members.iter().map(|&expert| u128::from(load[expert])).sum::<u128>();
    // The busiest expert shares its group with others, at best with the least loaded ones.
    let with_busiest = loads[0] + loads[loads.len() + 1 - capacity..].iter().sum::<u128>();
    let mut search = Search {
        floor: total.div_ceil(groups.len() as u128).max(with_busiest),
        best: groups.iter().map(sum).max()?,
        filled: vec![(0, 0); groups.len()],
        nodes: 0,
        loads,
        capacity,
    };
    let is_known = search.best <= search.floor
        || (search.loads.len() <= SEARCHED_EXPERTS && search.place(0).is_some());
    is_known.then(|| search.best as f64 * groups.len() as f64 / total as f64)
}

struct Search {
    /// Descending.
    loads: Vec<u128>,
    capacity: usize,
    /// Load and members of every group so far.
    filled: Vec<(u128, usize)>,
    best: u128,
    floor: u128,
    nodes: u32,
}

impl Search {
    /// Tries every group for the expert `next` and all after it; `None` when it takes too long.
    fn place(&mut self, next: usize) -> Option<()> {
        let Some(&load) = self.loads.get(next) else {
            self.best = self.filled.iter().map(|group| group.0).max()?;
            return Some(());
        };
        self.nodes += 1;
        if self.nodes > SEARCHED_NODES {
            return None;
        }
        for group in 0..self.filled.len() {
            let before = self.filled[group];
            let is_open = before.1 < self.capacity && before.0 + load < self.best;
            // Equal groups are interchangeable: the first of them stands for all.
            if is_open && !self.filled[..group].contains(&before) && self.best > self.floor {
                self.filled[group] = (before.0 + load, before.1 + 1);
                self.place(next + 1)?;
                self.filled[group] = before;
            }
        }
        Some(())
    }
}
