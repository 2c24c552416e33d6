//! Statistics, optimal arrangements and what-if against brute force.

use proptest::prelude::*;
use yuan_laep::{
    ExpertLayout, GroupBalance, LayerLoad, LoadStatistics, ModelSize, PruneLimits, PrunePlan,
    WhatIf, optimal_balance, rearrange,
};

#[test]
fn a_layer_by_hand() {
    let statistics = LoadStatistics::of(&LayerLoad::new(vec![0, 10, 30, 60]));
    assert_eq!((statistics.min, statistics.max, statistics.dead_experts), (0, 60, 1));
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
    near(statistics.mean, 25.0);
    // Deviations −25, −15, 5, 35: squares 625 + 225 + 25 + 1225 = 2100, variance 525.
    near(statistics.coefficient_of_variation, 525_f64.sqrt() / 25.0);
    // Σ |x_i − x_j| = 2 · (10 + 30 + 60 + 20 + 50 + 30) = 400 over 2 · 16 · 25.
    near(statistics.gini, 0.5);
    let entropy = -(0.1_f64 * 0.1_f64.ln() + 0.3 * 0.3_f64.ln() + 0.6 * 0.6_f64.ln());
    near(statistics.entropy, entropy / 4_f64.ln());
    near(statistics.max_over_mean, 2.4);
    near(statistics.top_tenth_share, 0.6);
}

#[test]
fn extremes_have_their_values() {
    let even = LoadStatistics::of(&LayerLoad::new(vec![7; 20]));
    assert!(even.gini.abs() < 1e-12 && (even.entropy - 1.0).abs() < 1e-12);
    assert!((even.top_tenth_share - 0.1).abs() < 1e-12, "two of twenty");
    let one = LoadStatistics::of(&LayerLoad::new(vec![0, 0, 0, 9]));
    assert!((one.gini - 0.75).abs() < 1e-12 && one.entropy.abs() < 1e-12);
    assert_eq!(LoadStatistics::of(&LayerLoad::new(vec![0, 0])).dead_experts, 2);
    assert!((LoadStatistics::of(&LayerLoad::new(vec![3])).entropy - 1.0).abs() < 1e-12);
}

/// Every way to split `experts` into groups of equal size.
fn best_by_enumeration(load: &[u64], experts: &[usize], groups: usize, capacity: usize) -> u64 {
    fn go(load: &[u64], rest: &[usize], totals: &mut Vec<(u64, usize)>, capacity: usize) -> u64 {
        let Some((&expert, rest)) = rest.split_first() else {
            return totals.iter().map(|group| group.0).max().unwrap();
        };
        let mut best = u64::MAX;
        for group in 0..totals.len() {
            if totals[group].1 < capacity {
                totals[group].0 += load[expert];
                totals[group].1 += 1;
                best = best.min(go(load, rest, totals, capacity));
                totals[group].0 -= load[expert];
                totals[group].1 -= 1;
            }
        }
        best
    }
    go(load, experts, &mut vec![(0, 0); groups], capacity)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn gini_is_the_mean_absolute_difference(tokens in prop::collection::vec(0..1000_u64, 1..20)) {
        prop_assume!(tokens.iter().sum::<u64>() > 0);
        let mean = tokens.iter().sum::<u64>() as f64 / tokens.len() as f64;
        let pairs: f64 = tokens.iter().flat_map(|&a| tokens.iter().map(move |&b| a.abs_diff(b) as f64)).sum();
        let expected = pairs / (2.0 * (tokens.len() as f64).powi(2) * mean);
        prop_assert!((LoadStatistics::of(&LayerLoad::new(tokens)).gini - expected).abs() < 1e-9);
    }

    #[test]
    fn the_optimum_is_the_best_of_all_arrangements(
        (groups, capacity) in prop_oneof![Just((2, 4)), Just((3, 3)), Just((4, 2)), Just((2, 1)), Just((1, 5))],
        seed in prop::collection::vec(prop_oneof![0..20_u64, 0..1000_u64], 12),
    ) {
        let load = &seed[..groups * capacity];
        prop_assume!(load.iter().sum::<u64>() > 0);
        let experts: Vec<usize> = (0..load.len()).collect();
        let arranged = rearrange(load, &experts, groups);
        let mean = load.iter().sum::<u64>() as f64 / groups as f64;
        let expected = best_by_enumeration(load, &experts, groups, capacity) as f64 / mean;
        let optimum = optimal_balance(load, &arranged).expect("so few experts are searched");
        prop_assert!((optimum - expected).abs() < 1e-9, "{optimum} {expected}");
        let greedy = GroupBalance::of(load, &arranged);
        prop_assert!(greedy.lower_bound <= optimum + 1e-9 && optimum <= greedy.max_over_mean + 1e-9);
    }
}

/// Loads as they are seen in training: geometric from busiest to idlest, a factor `spread` apart,
/// jittered.
fn realistic(experts: usize, spread: f64, seed: u64) -> Vec<u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    let load = |rank: usize, jitter: f64| {
        1e5 * spread.powf(-(rank as f64) / (experts - 1) as f64) * (0.8 + 0.4 * jitter)
    };
    let mut loads: Vec<u64> = (0..experts).map(|rank| load(rank, uniform()) as u64).collect();
    for i in (1..experts).rev() {
        loads.swap(i, (uniform() * (i + 1) as f64) as usize);
    }
    loads
}

#[test]
fn greedy_stays_close_to_the_optimum_on_realistic_loads() {
    for spread in [5.0, 20.0, 100.0, 500.0] {
        let (mut worst, mut sum) = (1.0_f64, 0.0);
        for seed in 0..100 {
            let load = realistic(16, spread, seed);
            let arranged = rearrange(&load, &(0..16).collect::<Vec<_>>(), 4);
            let optimum = optimal_balance(&load, &arranged).expect("16 experts are searched");
            let excess = GroupBalance::of(&load, &arranged).max_over_mean / optimum;
            (worst, sum) = (worst.max(excess), sum + excess);
        }
        println!(
            "spread {spread}: {:.4} of the optimum on average, {worst:.4} at worst",
            sum / 100.0
        );
        assert!(
            sum / 100.0 < 1.03,
            "spread {spread}: on average {:.4} of the optimum",
            sum / 100.0
        );
        assert!(worst < 1.10, "spread {spread}: at worst {worst:.4} of the optimum");
    }
}

#[test]
fn greedy_stays_close_to_the_bound_on_layers_of_the_published_size() {
    // The 48 busiest of 64 experts that lie 500-fold apart lie some 100-fold apart.
    for (spread, seed) in
        [20.0, 100.0].into_iter().flat_map(|spread| (0..50).map(move |seed| (spread, seed)))
    {
        let load = realistic(48, spread, seed);
        let greedy = GroupBalance::of(&load, &rearrange(&load, &(0..48).collect::<Vec<_>>(), 8));
        assert!(greedy.max_over_mean < 1.03 * greedy.lower_bound, "spread {spread}: {greedy:?}");
    }
}

#[test]
fn a_sweep_says_what_each_plan_would_do() {
    let loads =
        [LayerLoad::new(vec![5, 400, 30, 900, 2, 250, 350, 63]), LayerLoad::new(vec![10; 8])];
    let size = ModelSize { parameters: 1000, parameters_per_expert: 50, top_k: 2 };
    let limits = PruneLimits { multiple_of: 2, ..PruneLimits::default() };
    let layout = ExpertLayout { top_k: 2, groups: 2 };
    let rows =
        WhatIf::sweep(&loads, &limits, layout, Some(size), &[0.3, f64::INFINITY], &[0.01, 0.1])
            .unwrap();
    assert_eq!(rows.len(), 4);
    for row in &rows {
        let limits =
            PruneLimits { alpha: row.alpha.clone(), beta: row.beta.clone(), ..limits.clone() };
        let plan = PrunePlan::new(&loads, &limits, layout).unwrap();
        assert_eq!(row.pruned, plan.num_pruned());
        assert_eq!(row.parameters, Some(50 * plan.num_pruned() as u64));
    }
    // The last: 100 of 2000 tokens in the first layer (experts 0, 2, 4, 7), none of the 80 in the
    // second.
    let last = &rows[3];
    assert_eq!((last.pruned, last.experts, last.kept_per_layer), (4, 16, (4, 8)));
    assert!((last.pruned_load - 100.0 / 2080.0).abs() < 1e-12);
    assert!((last.tokens_losing.0 - 100.0 / 2080.0).abs() < 1e-12);
    assert!((last.tokens_losing.1 - 200.0 / 2080.0).abs() < 1e-12);
    // Old order: 1335 of 2000 and 40 of 80 in the busiest group.
    assert!((last.slowdown_before - (2.0 * 1335.0 + 80.0) / 2080.0).abs() < 1e-12);
    assert_eq!(WhatIf::table(&rows).lines().count(), 5);
}
