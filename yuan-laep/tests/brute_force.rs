//! The planner against a literal, expert-by-expert reading of the definitions of LAEP.

use proptest::prelude::*;
use yuan_laep::{
    ExpertLayout, GroupBalance, LayerLoad, PlanError, PruneLimits, PrunePlan, rearrange,
};

const TOP_K: usize = 2;

fn layout(groups: usize) -> ExpertLayout {
    ExpertLayout { top_k: TOP_K, groups }
}

/// Algorithm 1 as written: expert i may go iff its load is at most `α T / N` and the loads of
/// all experts not after it in ascending order sum to at most `β T`.
fn prunable(load: &[u64], limits: &PruneLimits) -> Vec<usize> {
    let total: u64 = load.iter().sum();
    let not_after = |i: usize, j: usize| load[j] < load[i] || (load[j] == load[i] && j <= i);
    (0..load.len())
        .filter(|&i| {
            let cumulative: u64 =
                (0..load.len()).filter(|&j| not_after(i, j)).map(|j| load[j]).sum();
            load[i] as f64 <= limits.alpha.at(0) * total as f64 / load.len() as f64
                && cumulative as f64 <= limits.beta.at(0) * total as f64
        })
        .collect()
}

/// Every count that may be pruned, tried from the largest down.
fn largest_allowed_cut(load: &[u64], limits: &PruneLimits) -> usize {
    let n = load.len();
    let allowed = prunable(load, limits).len();
    let minimum =
        (0..).step_by(limits.multiple_of).find(|&m| m >= limits.min_experts.max(TOP_K)).unwrap();
    (0..=n)
        .rev()
        .find(|&cut| {
            let kept = n - cut;
            cut == 0
                || (cut <= allowed
                    && kept.is_multiple_of(limits.multiple_of)
                    && kept >= minimum
                    && limits.max_pruned_fraction.is_none_or(|f| cut as f64 <= f * n as f64))
        })
        .unwrap()
}

/// Loads with ties, zeros and a wide spread; the number of experts is a multiple of `multiple_of`.
fn cases() -> impl Strategy<Value = (Vec<u64>, PruneLimits, usize)> {
    let sizes = prop_oneof![
        Just((1, 1)),
        Just((2, 1)),
        Just((2, 2)),
        Just((4, 2)),
        Just((4, 4)),
        Just((8, 4))
    ];
    sizes.prop_flat_map(|(multiple_of, groups)| {
        let experts = (1..=48 / multiple_of).prop_map(move |n| n * multiple_of);
        let load = experts.prop_filter("top_k experts", |&n| n >= 2).prop_flat_map(|n| {
            prop::collection::vec(prop_oneof![0..6_u64, 0..50_u64, 1..100_000_u64], n)
        });
        let alpha = prop_oneof![Just(f64::INFINITY), 0.0..2.0];
        let fraction = prop::option::of(0.0..=1.0);
        (load, alpha, 0.0..=1.0, 1..12_usize, fraction).prop_map(
            move |(load, alpha, beta, min_experts, fraction): (_, f64, f64, _, _)| {
                let limits = PruneLimits {
                    alpha: alpha.into(),
                    beta: beta.into(),
                    multiple_of,
                    min_experts,
                    max_pruned_fraction: fraction,
                };
                (load, limits, groups)
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_plan_is_what_the_definition_says((load, limits, groups) in cases()) {
        prop_assume!(load.iter().sum::<u64>() > 0);
        let plan = PrunePlan::new(&[LayerLoad::new(load.clone())], &limits, layout(groups)).unwrap();
        let layer = &plan.layers[0];

        // As many go as every constraint allows, and it is the least loaded that go.
        prop_assert_eq!(layer.pruned.len(), largest_allowed_cut(&load, &limits));
        let mut order: Vec<usize> = (0..load.len()).collect();
        order.sort_by(|&a, &b| (load[a], a).cmp(&(load[b], b)));
        let mut expected = order[..layer.pruned.len()].to_vec();
        expected.sort_unstable();
        prop_assert_eq!(&layer.pruned, &expected);
        let prunable = prunable(&load, &limits);
        prop_assert!(layer.pruned.iter().all(|expert| prunable.contains(expert)));

        // Nobody is lost, nobody is doubled.
        let mut all: Vec<usize> = layer.kept.iter().chain(&layer.pruned).copied().collect();
        all.sort_unstable();
        prop_assert_eq!(all, (0..load.len()).collect::<Vec<_>>());
        prop_assert_eq!(layer.groups.concat(), layer.kept.clone());
        prop_assert!(layer.groups.iter().all(|group| group.len() * groups == layer.kept.len()));
        prop_assert!(plan.check().is_ok());
        prop_assert_eq!(PrunePlan::from_json(&plan.to_json()).unwrap(), plan);
    }

    #[test]
    fn rearranging_follows_the_greedy_rule(load in prop::collection::vec(0..100_u64, 1..=8), groups in 1..=4_usize) {
        let load: Vec<u64> = load.iter().cycle().take(load.len() * groups).copied().collect();
        let kept: Vec<usize> = (0..load.len()).collect();
        let capacity = kept.len() / groups;
        let placed = rearrange(&load, &kept, groups);

        // Replay: at every step the chosen group was the lightest with room, the lowest on ties.
        let mut replay: Vec<Vec<usize>> = vec![Vec::new(); groups];
        let mut left = kept;
        while !left.is_empty() {
            let heaviest = left.iter().map(|&e| load[e]).max().unwrap();
            let expert = *left.iter().find(|&&e| load[e] == heaviest).unwrap();
            left.retain(|&e| e != expert);
            let weight = |g: usize| replay[g].iter().map(|&e| load[e]).sum::<u64>();
            let with_room = (0..groups).filter(|&g| replay[g].len() < capacity);
            let target = with_room.reduce(|best, g| if weight(g) < weight(best) { g } else { best }).unwrap();
            replay[target].push(expert);
        }
        prop_assert_eq!(placed, replay);
    }

    #[test]
    fn greedy_is_within_its_bound_of_the_best_arrangement(load in prop::collection::vec(1..1000_u64, 8)) {
        // All 35 ways to halve eight experts; LPT is at worst 4/3 of the optimum for the makespan.
        let experts: Vec<usize> = (0..8).collect();
        let balance = GroupBalance::of(&load, &rearrange(&load, &experts, 2));
        let best = (0_u32..256).filter(|mask| mask.count_ones() == 4).map(|mask| {
            let (a, b): (Vec<usize>, Vec<usize>) = experts.iter().partition(|&&e| mask >> e & 1 == 1);
            GroupBalance::of(&load, &[a, b]).max_over_mean
        }).fold(f64::INFINITY, f64::min);
        prop_assert!(balance.max_over_mean <= best * 4.0 / 3.0 + 1e-12);
        prop_assert!(balance.lower_bound <= best + 1e-12);
    }
}

#[test]
fn both_constraints_are_inclusive() {
    // T = 100, N = 4: alpha 0.4 allows up to 10 exactly, beta 0.2 allows a sum of 20 exactly.
    let load = [LayerLoad::new(vec![10, 10, 30, 50])];
    let at = |alpha: f64, beta: f64| {
        let limits =
            PruneLimits { alpha: alpha.into(), beta: beta.into(), ..PruneLimits::default() };
        let layout = ExpertLayout { top_k: 1, groups: 1 };
        PrunePlan::new(&load, &limits, layout).unwrap().layers[0].pruned.len()
    };
    assert_eq!(at(0.4, 0.2), 2);
    assert_eq!(at(0.39, 0.2), 0);
    assert_eq!(at(0.4, 0.19), 1);
    assert_eq!(at(f64::INFINITY, 0.5), 3);
}

#[test]
fn impossible_requests_name_what_is_wrong() {
    let load = |tokens: &[u64]| vec![LayerLoad::new(tokens.to_vec())];
    let limits = PruneLimits::default();
    let error = |loads: &[LayerLoad], limits: &PruneLimits, groups| {
        PrunePlan::new(loads, limits, layout(groups)).unwrap_err()
    };

    assert_eq!(error(&[], &limits, 1), PlanError::NoLayers);
    assert_eq!(error(&load(&[]), &limits, 1), PlanError::NoExperts { layer: 0 });
    assert_eq!(error(&load(&[0, 0]), &limits, 1).to_string(), "no load was recorded for layer 0");
    assert_eq!(
        error(&load(&[1]), &limits, 1),
        PlanError::BelowTopK { layer: 0, kept: 1, top_k: 2 }
    );
    let by_four = PruneLimits { multiple_of: 4, ..limits.clone() };
    assert_eq!(
        error(&load(&[1, 2, 3]), &by_four, 1),
        PlanError::NotAMultiple { layer: 0, num_experts: 3, multiple_of: 4 }
    );
    assert_eq!(
        error(&load(&[1, 2, 3, 4]), &by_four, 3),
        PlanError::Groups { multiple_of: 4, groups: 3 }
    );
    for bad in [
        PruneLimits { alpha: f64::NAN.into(), ..limits.clone() },
        PruneLimits { alpha: (-0.1).into(), ..limits.clone() },
        PruneLimits { beta: f64::NAN.into(), ..limits.clone() },
        PruneLimits { beta: f64::INFINITY.into(), ..limits.clone() },
        PruneLimits { max_pruned_fraction: Some(1.5), ..limits.clone() },
        PruneLimits { multiple_of: 0, ..limits.clone() },
    ] {
        assert!(matches!(error(&load(&[1, 2]), &bad, 1), PlanError::Limit { .. }), "{bad:?}");
    }
    for layout in [ExpertLayout { top_k: 0, groups: 1 }, ExpertLayout { top_k: 1, groups: 0 }] {
        let error = PrunePlan::new(&load(&[1, 2]), &limits, layout).unwrap_err();
        assert!(matches!(error, PlanError::Limit { .. }), "{layout:?}");
    }
}

#[test]
fn an_edited_plan_is_checked() {
    let plan =
        PrunePlan::new(&[LayerLoad::new(vec![1, 40, 30, 29])], &PruneLimits::default(), layout(1))
            .unwrap();
    assert_eq!(plan.layers[0].pruned, [0]);
    let edited = |edit: &dyn Fn(&mut PrunePlan)| {
        let mut plan = plan.clone();
        edit(&mut plan);
        plan.check().unwrap_err()
    };
    assert_eq!(edited(&|p| p.layers[0].kept[0] = 2), PlanError::Repeated { layer: 0, expert: 2 });
    assert_eq!(edited(&|p| p.layers[0].pruned.clear()), PlanError::Missing { layer: 0, expert: 0 });
    assert_eq!(
        edited(&|p| p.layers[0].kept[0] = 9),
        PlanError::NoSuchExpert { layer: 0, expert: 9, num_experts: 4 }
    );
    assert_eq!(edited(&|p| p.layers[0].kept.swap(0, 1)), PlanError::GroupsDiffer { layer: 0 });
    assert_eq!(edited(&|p| p.top_k = 4), PlanError::BelowTopK { layer: 0, kept: 3, top_k: 4 });
    assert_eq!(
        plan.check_against(&[5], 2),
        Err(PlanError::ExpertCount { layer: 0, expected: 5, found: 4 })
    );
    assert_eq!(
        plan.check_against(&[4, 4], 2),
        Err(PlanError::LayerCount { expected: 2, found: 1 })
    );
    assert_eq!(plan.check_against(&[4], 2), Ok(()));
}

#[test]
fn a_table_names_every_layer_and_the_total() {
    let loads = [LayerLoad::new(vec![1, 40, 30, 29]), LayerLoad::new(vec![25, 25, 25, 25])];
    let limits = PruneLimits { multiple_of: 1, ..PruneLimits::default() };
    let table = PrunePlan::new(&loads, &limits, layout(1)).unwrap().to_string();
    let rows: Vec<&str> = table.lines().collect();
    assert_eq!(rows.len(), 5, "{table}");
    assert!(rows[2].contains("1.00 %") && rows[2].trim_start().starts_with('0'), "{table}");
    assert!(rows[4].contains("12.5 % of the experts pruned"), "{table}");
}

#[test]
fn loads_that_are_not_loads_are_refused() {
    use yuan_laep::LoadFile;
    for text in
        ["", "[]", "{}", r#"{"layers": [[1, -2]]}"#, r#"{"layers": [[1.5]]}"#, r#"{"layers": [1]}"#]
    {
        assert!(matches!(LoadFile::from_json(text), Err(PlanError::Loads(_))), "{text}");
    }
    let window = LoadFile::from_json(r#"{"layers": [[1, 2]], "note": "kept out"}"#).unwrap().window;
    assert_eq!(window.layers, [LayerLoad::new(vec![1, 2])]);
}

#[test]
fn a_plan_of_an_earlier_version_is_still_read() {
    let loads = [LayerLoad::new(vec![1, 40, 30, 29])];
    let plan = PrunePlan::new(&loads, &PruneLimits::default(), layout(1)).unwrap();
    let mut old: serde_json::Value = serde_json::from_str(&plan.to_json()).unwrap();
    old["limits"]["top_k"] = old.as_object_mut().unwrap().remove("top_k").unwrap();
    assert_eq!(PrunePlan::from_json(&old.to_string()).unwrap(), plan);
}
