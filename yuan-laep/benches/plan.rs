//! Time of a whole plan at the size of the paper, 103 layers of 64 experts in 8 groups, and of what
//! a run pays for its loads: a record each step, statistics and stability each window.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use yuan_laep::{LayerLoad, LoadStatistics, LoadTracker, PruneLimits, PrunePlan, StabilityTest};

fn ultra_loads() -> Vec<LayerLoad> {
    let spread =
        |layer: u64, expert: u64| 1 + (expert * 7 + layer * 13) % 64 * ((expert * 31 + layer) % 97);
    (0..103)
        .map(|layer| LayerLoad::new((0..64).map(|expert| spread(layer, expert) * 100).collect()))
        .collect()
}

fn plan(c: &mut Criterion) {
    let loads = ultra_loads();
    let limits = PruneLimits {
        alpha: 0.4.into(),
        beta: 0.1.into(),
        multiple_of: 8,
        min_experts: 8,
        ..PruneLimits::default()
    };
    c.bench_function("plan 103 layers x 64 experts", |b| {
        b.iter(|| PrunePlan::new(black_box(&loads), &limits, 8).unwrap());
    });
}

fn collect(c: &mut Criterion) {
    let loads = ultra_loads();
    let mut tracker = LoadTracker::new(10, 4).unwrap();
    c.bench_function("record a step of 103 layers x 64 experts", |b| {
        b.iter(|| tracker.record(black_box(loads.clone())).unwrap());
    });
    let test = StabilityTest::default();
    c.bench_function("statistics and stability of a window of 103 layers x 64 experts", |b| {
        b.iter(|| {
            let statistics: Vec<LoadStatistics> = loads.iter().map(LoadStatistics::of).collect();
            (statistics, test.judge(black_box(tracker.completed())))
        });
    });
}

criterion_group!(benches, plan, collect);
criterion_main!(benches);
