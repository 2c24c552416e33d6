//! Windows of loads: what is summed, what is kept, what a prune resets.

use yuan_laep::{LayerLoad, LoadTracker, PlanError};

fn step(tokens: &[u64]) -> Vec<LayerLoad> {
    vec![LayerLoad::new(tokens.to_vec())]
}

#[test]
fn steps_add_up_to_windows_and_only_the_latest_are_kept() {
    let mut tracker = LoadTracker::new(2, 3).unwrap();
    let closed: Vec<bool> = (0..9).map(|i| tracker.record(step(&[i, 1])).unwrap()).collect();
    assert_eq!(closed, [false, true, false, true, false, true, false, true, false]);
    let sums: Vec<u64> =
        tracker.completed().iter().map(|w| w.layers[0].tokens_per_expert()[0]).collect();
    assert_eq!(sums, [2 + 3, 4 + 5, 6 + 7]);
    assert_eq!(tracker.last(2).layers[0].tokens_per_expert(), [22, 4]);
    assert_eq!(tracker.last(2).steps, 4);
    assert_eq!(tracker.current().layers[0].tokens_per_expert(), [8, 1]);
}

#[test]
fn a_change_of_shape_is_refused_until_reset() {
    let mut tracker = LoadTracker::new(2, 3).unwrap();
    tracker.record(step(&[1, 2, 3])).unwrap();
    let before = tracker.clone();
    assert_eq!(
        tracker.record(step(&[1, 2])).unwrap_err(),
        PlanError::ExpertCount { layer: 0, expected: 3, found: 2 }
    );
    assert_eq!(tracker, before, "a refused step leaves no trace");
    tracker.reset();
    tracker.record(step(&[1, 2])).unwrap();
}

#[test]
fn the_state_survives_a_checkpoint() {
    let mut tracker = LoadTracker::new(2, 3).unwrap();
    for i in 0..5 {
        tracker.record(step(&[i, 7])).unwrap();
    }
    let json = serde_json::to_string(&tracker).unwrap();
    assert_eq!(serde_json::from_str::<LoadTracker>(&json).unwrap(), tracker);
}
