//! RIRM row by row, and the functions around it.

use proptest::prelude::*;
use yuan_rl::{
    Bounds, ExactSearch, FirstAnswer, Judge, Order, Overlong, PromptRewards, RepetitionLimits,
    Revision, adaptive_sampling, annotate, group_advantages, overlong_penalty, reflection_reward,
    repeats, repetition_penalty,
};

fn followed(reflections: u32) -> FirstAnswer {
    FirstAnswer::Followed { reflections }
}

#[test]
fn rewards_are_those_of_the_tables() {
    let reward = |first, is_right, bounds, revision| {
        let found = reflection_reward(first, is_right, bounds, revision);
        [found.answer, found.verification, found.accuracy]
    };
    for revision in [Revision::Flash, Revision::Ultra] {
        let of = |first, is_right| reward(first, is_right, Bounds::ULTRA, revision);
        assert_eq!(of(FirstAnswer::Missing, true), [-1.0; 3]);
        assert_eq!(of(FirstAnswer::Missing, false), [-1.0; 3]);
        assert_eq!(of(FirstAnswer::Ends, true), [1.0; 3]);
        assert_eq!(of(FirstAnswer::Ends, false), [1.0, -1.0, -1.0]);
        // Of a right response: 1 up to v_min, then less by the share, 0 beyond v_max.
        let rest = [1.0, 1.0 - 1.0 / 3.0, 1.0 - 2.0 / 3.0, 0.0, 0.0];
        for (v, rest) in rest.into_iter().enumerate() {
            assert_eq!(of(followed(v as u32), true), [1.0, rest, 1.0]);
        }
    }
    for (v, lost) in [0.0, -1.0 / 3.0, -2.0 / 3.0, -1.0, -1.0].into_iter().enumerate() {
        let of = |revision| reward(followed(v as u32), false, Bounds::ULTRA, revision);
        assert_eq!(of(Revision::Ultra), [1.0, lost, -1.0]);
        assert_eq!(of(Revision::Flash), [1.0, -1.0, -1.0]);
    }
    let flash = |v| reward(followed(v), true, Bounds::FLASH_EASY, Revision::Flash)[1];
    assert_eq!([flash(0), flash(2), flash(6), flash(10), flash(11)], [1.0, 1.0, 0.5, 0.0, 0.0]);
    // Of bounds that are one number, more is lost at once.
    let one = |v| reward(followed(v), true, Bounds { min: 4, max: 4 }, Revision::Flash)[1];
    assert_eq!([one(4), one(5)], [1.0, 0.0]);
}

#[test]
fn answers_are_found_where_they_stand_alone() {
    let count = |answer: &str, text: &str| ExactSearch.places("", answer, text).unwrap().len();
    assert_eq!(count("12", "12, 112, 120, 12.5, 1,12 and (12)."), 2);
    assert_eq!(count("x = 3", "So x = 3. Check x = 35: no, x = 3"), 2);
    assert_eq!(count("5", "-5, 1/5, 5/6 and 5"), 1);
    assert_eq!(count("", "anything"), 0);
    assert_eq!(count("é", "é né éa é"), 2);
    let after = |text, is_right| annotate(&ExactSearch, "", "7", text, is_right);
    assert_eq!(after("It is 7.", true).unwrap(), FirstAnswer::Ends);
    assert_eq!(after("7? Wait: 7. Again: 7", true).unwrap(), followed(2));
    assert_eq!(after("7, I think so.", true).unwrap(), followed(1));
    assert_eq!(after("7, I think so.", false).unwrap(), followed(0));
    assert_eq!(after("Eight.", false).unwrap(), FirstAnswer::Missing);
}

#[test]
fn responses_that_repeat_themselves_are_ended_and_penalised() {
    let limits = RepetitionLimits { part: 3, times: 4, every: 8 };
    let repeated = |times: usize| [vec![9, 9], [1, 2, 3].repeat(times)].concat();
    assert!(!repeats(&repeated(3), limits) && repeats(&repeated(4), limits));
    // Parts that overlap count once, and others may stand between them.
    assert!(!repeats(&[5; 11], limits) && repeats(&[5; 12], limits));
    let spread: Vec<u32> = (0..4).flat_map(|n| [100 + n, 1, 2, 1]).collect();
    assert!(repeats(&spread, limits));
    assert!(!repeats(&[], limits) && !repeats(&[1], RepetitionLimits { part: 0, ..limits }));
    let fresh: Vec<u32> = (0..100).collect();
    assert_eq!(repetition_penalty(&fresh), 0.0);
    assert_eq!(repetition_penalty(&[fresh.clone(), fresh].concat()), -1.0);
    assert_eq!(repetition_penalty(&[1; 19]), 0.0);
}

#[test]
fn prompts_that_teach_nothing_are_left_out_and_easy_ones_taken_twice() {
    let prompt = |rewards: &[f32], pass_rate| PromptRewards { rewards: rewards.into(), pass_rate };
    let prompts = [
        prompt(&[1.0, 1.0], 1.0),
        prompt(&[1.0, 0.0], 0.5),
        prompt(&[0.0, 0.0], 0.0),
        prompt(&[2.0, 0.0], 0.75),
        prompt(&[0.5, 0.0], 0.25),
    ];
    assert_eq!(adaptive_sampling(&prompts, 4, Order::EasyToHard), [3, 1, 4, 3]);
    assert_eq!(adaptive_sampling(&prompts, 2, Order::HardToEasy), [4, 1, 3, 4]);
    assert_eq!(adaptive_sampling(&prompts, 7, Order::EasyToHard), [3, 1, 4, 3, 1, 4, 3]);
    assert!(adaptive_sampling(&prompts[..1], 4, Order::EasyToHard).is_empty());
}

proptest! {
    #[test]
    fn reflections_never_pay(v in 0..40_u32, min in 0..8_u32, more in 0..8_u32, is_right: bool, ultra: bool) {
        let revision = if ultra { Revision::Ultra } else { Revision::Flash };
        let bounds = Bounds { min, max: min + more };
        let total = |v| reflection_reward(followed(v), is_right, bounds, revision).total();
        prop_assert!(total(v + 1) <= total(v));
        prop_assert!((-1.0..=3.0).contains(&total(v)));
        prop_assert!(reflection_reward(FirstAnswer::Missing, is_right, bounds, revision).total() <= total(v));
    }

    #[test]
    fn advantages_of_a_group_sum_to_nothing(rewards in prop::collection::vec(-3.0..3.0_f32, 1..6), group in 1..5_usize) {
        let rewards = rewards.repeat(group);
        let advantages = group_advantages(&rewards, group);
        for of_group in advantages.chunks(group) {
            prop_assert!(of_group.iter().sum::<f32>().abs() < 1e-3);
        }
    }

    #[test]
    fn equal_rewards_have_no_advantage(reward in -4.0..4.0_f32, count in 1..17_usize) {
        prop_assert!(group_advantages(&vec![reward; count], count).iter().all(|a| *a == 0.0));
    }

    #[test]
    fn longer_responses_never_lose_less(length in 0..5000_usize, max in 1..4096_usize, buffer in 0..4096_usize) {
        let limits = Overlong { max, buffer };
        let [shorter, longer] = [length, length + 1].map(|length| overlong_penalty(length, limits));
        prop_assert!(longer <= shorter && longer >= -2.0 - buffer as f64);
        if buffer <= max {
            prop_assert!(longer >= -1.0);
        }
    }
}
