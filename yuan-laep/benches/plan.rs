//! Time of a whole plan at the size of the paper, 103 layers of 64 experts in 8 groups, and of what
//! a run pays for its loads: a record each step, statistics and stability each window.
//!
//! Prints the median of many calls, in microseconds.

use std::{hint::black_box, time::Instant};

use yuan_laep::{
    ExpertLayout, LayerLoad, LoadStatistics, LoadTracker, PruneLimits, PrunePlan, StabilityTest,
};

fn main() {
    let loads = ultra_loads();
    let limits = PruneLimits {
        alpha: 0.4.into(),
        beta: 0.1.into(),
        multiple_of: 8,
        min_experts: 8,
        ..PruneLimits::default()
    };
    let layout = ExpertLayout { top_k: 2, groups: 8 };
    report("plan 103 layers x 64 experts", || {
        PrunePlan::new(black_box(&loads), &limits, layout).expect("the loads can be planned for")
    });
    let mut tracker = LoadTracker::new(10, 4).expect("a window of ten steps");
    report("record a step of 103 layers x 64 experts", || {
        tracker.record(black_box(loads.clone())).expect("loads of one shape")
    });
    let test = StabilityTest::default();
    report("statistics and stability of a window of 103 layers x 64 experts", || {
        let statistics: Vec<LoadStatistics> = loads.iter().map(LoadStatistics::of).collect();
        (statistics, test.judge(black_box(tracker.completed())))
    });
}

fn ultra_loads() -> Vec<LayerLoad> {
    let tokens = |layer: u64, expert: u64| {
        100 * (1 + (expert * 7 + layer * 13) % 64 * ((expert * 31 + layer) % 97))
    };
    (0..103)
        .map(|layer| LayerLoad::new((0..64).map(|expert| tokens(layer, expert)).collect()))
        .collect()
}

fn report<T>(name: &str, mut run: impl FnMut() -> T) {
    let mut microseconds: Vec<f64> = (0..101)
        .map(|_| {
            let start = Instant::now();
            black_box(run());
            1e6 * start.elapsed().as_secs_f64()
        })
        .collect();
    microseconds.sort_by(f64::total_cmp);
    println!("{name}: {:.1} us", microseconds[microseconds.len() / 2]);
}
