//! Time of a whole plan at the size of the paper: 103 layers of 64 experts, 8 groups.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use yuan_laep::{LayerLoad, PruneLimits, PrunePlan};

fn ultra_loads() -> Vec<LayerLoad> {
    let spread = |layer: u64, expert: u64| 1 + (expert * 7 + layer * 13) % 64 * ((expert * 31 + layer) % 97);
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

criterion_group!(benches, plan);
criterion_main!(benches);
