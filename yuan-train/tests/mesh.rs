//! A mesh of devices computes what one device computes: the whole path from the exchange of rows to
//! the update on one set of devices, which is why it is one file.
//!
//! The devices are one CPU listed several times, which takes every path but the wires;
//! `mesh_processes.rs` has those, and `YUAN_DEVICE=cuda:0,cuda:1` takes several GPUs.

mod support {
    pub mod mesh;
}

use std::collections::HashMap;

use burn::tensor::{Device, Tensor, TensorData};
use proptest::prelude::*;
use support::mesh::{
    Gradients, TOLERANCE, assert_close, assert_same_story, devices, flat, fresh_mesh_model,
    fresh_model, gradients, home, model_config, open_on_mesh, open_on_one, state, story,
    train_config, two_epochs_around_a_rearrangement,
};
use tempfile::tempdir;
use yuan_model::{
    BalanceLosses, DeviceMesh, Exchange, MeshModel, PrunableExperts, RefusedCut, RouterType,
    YuanConfig,
    ops::{self, Target},
};
use yuan_report::{History, html_report};
use yuan_train::{AdamW, Checkpoint, Event, LossOptions, PruneExperts, TrainConfig, all_reduce};

/// Rows and devices of a row.
const SHAPES: [[usize; 2]; 5] = [[1, 1], [1, 2], [2, 1], [2, 2], [1, 4]];

fn mesh([data, expert]: [usize; 2]) -> DeviceMesh {
    let devices = devices().into_iter().cycle().take(data * expert).collect();
    DeviceMesh::new(devices, data).unwrap().autodiff()
}

fn assert_same(found: &Gradients, expected: &Gradients) {
    let difference = (found.loss - expected.loss).abs();
    assert!(
        difference <= TOLERANCE * expected.loss,
        "loss {} is not {}",
        found.loss,
        expected.loss
    );
    assert_eq!(found.balance.is_some(), expected.balance.is_some());
    if let (Some(found), Some(expected)) = (found.balance, expected.balance) {
        assert!((found - expected).abs() <= TOLERANCE * expected.abs());
    }
    assert_eq!(found.tokens_per_expert, expected.tokens_per_expert);
    assert_close(&found.by_path, &expected.by_path, TOLERANCE);
}

#[test]
fn a_mesh_has_the_loss_and_the_gradients_of_one_device() {
    let home = home();
    let balance = BalanceLosses { auxiliary: 0.02, sequence: 0.01, router_z: 1e-3 };
    for router_type in [RouterType::Linear, RouterType::Attention] {
        for balance in [BalanceLosses::default(), balance] {
            let config = YuanConfig { router_type, router_selection_bias: true, ..model_config() };
            let options = LossOptions { balance, ..LossOptions::default() };
            let expected = gradients(&fresh_model(&config, &home), &home, options);
            for shape in SHAPES {
                let model = fresh_mesh_model(&config, &mesh(shape));
                for recompute in [None, Some(7)] {
                    let found = gradients(&model, &home, LossOptions { recompute, ..options });
                    assert_same(&found, &expected);
                }
            }
        }
    }
}

#[test]
fn a_run_on_a_mesh_is_the_run_on_one_device_through_prune_and_rearrangement() {
    let config = train_config();
    let one = tempdir().unwrap();
    let mut trainer = open_on_one(&config, one.path());
    trainer.run().unwrap();
    let (expected, expected_state) =
        (story(one.path()), state(trainer.model(), trainer.optimizer()));
    assert!(
        trainer.model().config().experts_per_layer.iter().any(|&experts| experts < 8),
        "it prunes"
    );
    for shape in SHAPES {
        let run = tempdir().unwrap();
        let mut trainer = open_on_mesh(&config, run.path(), &mesh(shape));
        trainer.run().unwrap();
        assert_same_story(&story(run.path()), &expected);
        let page = html_report("mesh", &History::read(run.path()).unwrap()).unwrap();
        assert!(page.contains("spread over the device groups anew"));
        assert_eq!(page.contains("device load over training"), shape[1] > 1);
        // Ten steps of AdamW carry rounding on: its updates do not grow with the gradient.
        assert_close(
            &state(trainer.model(), trainer.optimizer()),
            &expected_state,
            100.0 * TOLERANCE,
        );
    }
}

#[test]
fn a_checkpoint_of_any_mesh_goes_on_on_any_other() {
    let config = TrainConfig { checkpoint_every: Some(6), keep_checkpoints: 9, ..train_config() };
    let saved = tempdir().unwrap();
    let mut four = open_on_mesh(&config, saved.path(), &mesh([1, 4]));
    four.run().unwrap();
    let whole = story(saved.path());
    let at_six =
        Checkpoint::list(saved.path()).unwrap().into_iter().find(|saved| saved.step == 6).unwrap();
    let one: (yuan_model::YuanModel, AdamW, _) = at_six.load(&config.optimizer, &home()).unwrap();
    let expected = state(&one.0, &one.1);
    for shape in SHAPES {
        let (model, optimizer, _) =
            at_six.load::<MeshModel>(&config.optimizer, &mesh(shape)).unwrap();
        assert_eq!(state(&model, &optimizer), expected, "to the last bit");
        // What was saved on one mesh goes on elsewhere from the same place.
        let run = tempdir().unwrap();
        copy(&at_six.path, &run.path().join("checkpoint-00000006"));
        let mut resumed = open_on_mesh(&config, run.path(), &mesh(shape));
        assert_eq!(resumed.step(), 6);
        resumed.run().unwrap();
        let mut rest = whole.clone();
        rest.numbers.retain(|number| number.0 > 6);
        rest.loads.retain(|load| load.0 > 6);
        assert_same_story(&story(run.path()), &rest);
    }
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

#[test]
fn after_a_rearrangement_the_devices_of_a_mesh_are_loaded_as_the_plan_says() {
    let config = two_epochs_around_a_rearrangement();
    let run = tempdir().unwrap();
    open_on_mesh(&config, run.path(), &mesh([1, 2])).run().unwrap();
    let history = History::read(run.path()).unwrap();
    let mut measured = Vec::new();
    let mut planned = Vec::new();
    for event in history.events() {
        match event {
            Event::Step(metrics) => measured.push(metrics.device_max_over_mean.clone()),
            Event::Prune { layers, bytes_moved, .. } => {
                planned.push(layers.iter().map(|layer| layer.groups_before).collect::<Vec<_>>());
                planned.push(layers.iter().map(|layer| layer.groups_after).collect());
                assert_eq!(*bytes_moved > 0, devices().len() > 1, "{bytes_moved} bytes");
            }
            _ => {}
        }
    }
    assert_eq!(measured, planned, "before and after");
    assert!(measured[0].iter().zip(&measured[1]).all(|(before, after)| after <= before));
    assert!(run.path().join(PruneExperts::PLAN).exists());
}

#[test]
fn a_batch_that_cannot_be_spread_over_a_mesh_is_refused() {
    let config = TrainConfig { batch_size: 1, ..train_config() };
    let run = tempdir().unwrap();
    let error = open_on_mesh(&config, run.path(), &mesh([1, 2])).run().unwrap_err();
    assert_eq!(error.to_string(), "a batch of 1 rows is too small for 2 devices");
    let error = MeshModel::new(&model_config(), &mesh([1, 9])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "layer 0 has 8 experts, too few for the 9 devices of the mesh that share them"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Wherever the experts are, uneven counts included, the model is the same.
    #[test]
    fn any_placement_on_a_mesh_computes_the_same(
        orders in prop::collection::vec(Just((0..8).collect::<Vec<usize>>()).prop_shuffle(), 2),
        cuts in prop::collection::vec(1_usize..8, 2),
    ) {
        let home = home();
        let model = fresh_mesh_model(&model_config(), &mesh([1, 2]));
        let before = gradients(&model, &home, LossOptions::default());
        let placement: Vec<Vec<Vec<usize>>> = orders
            .iter()
            .zip(&cuts)
            .map(|(order, &cut)| vec![order[..cut].to_vec(), order[cut..].to_vec()])
            .collect();
        let (placed, selections) = model.place_experts(&placement).unwrap();
        prop_assert_eq!(placed.placement(), cuts.iter().map(|&cut| vec![cut, 8 - cut]).collect::<Vec<_>>());
        let moved = selections.iter().any(|selection| selection.moved > 0);
        prop_assert!(!moved || devices().len() > 1);
        let after = gradients(&placed, &home, LossOptions::default());
        prop_assert!((after.loss - before.loss).abs() <= TOLERANCE * before.loss);
        for (layer, order) in orders.iter().enumerate() {
            let permuted: Vec<i64> = order.iter().map(|&e| before.tokens_per_expert[layer][e]).collect();
            prop_assert_eq!(&after.tokens_per_expert[layer], &permuted);
            let first: i64 = permuted[..cuts[layer]].iter().sum();
            prop_assert_eq!(after.rows_per_device[layer][0], first as u64);
        }
        // Back in the old order, the gradients are the old ones.
        let mut sorted = HashMap::new();
        for (path, values) in after.by_path {
            let layer = path.strip_prefix("blocks.").and_then(|rest| rest[..1].parse::<usize>().ok());
            let per_expert = path.contains(".experts.").then_some(values.len() / 8);
            let values = match (layer, per_expert) {
                (Some(layer), Some(size)) => {
                    let mut old = vec![0.0; values.len()];
                    for (new, &expert) in orders[layer].iter().enumerate() {
                        old[expert * size..][..size].copy_from_slice(&values[new * size..][..size]);
                    }
                    old
                }
                (Some(layer), None) if path.ends_with("router.weight") => {
                    let mut old = vec![0.0; values.len()];
                    for (row, values) in values.chunks(8).enumerate() {
                        for (new, &expert) in orders[layer].iter().enumerate() {
                            old[row * 8 + expert] = values[new];
                        }
                    }
                    old
                }
                _ => values,
            };
            sorted.insert(path, values);
        }
        assert_close(&sorted, &before.by_path, TOLERANCE);
    }

    #[test]
    fn an_exchange_between_mesh_devices_and_its_gradient_are_permutations(
        // Sources, cut into pieces; a source without pieces has a row that goes nowhere.
        pieces in prop::collection::vec(prop::collection::vec(0_usize..4, 0..5), 1..5),
        order in prop::collection::vec((0_usize..3, any::<u32>()), 20),
        unread: bool,
    ) {
        const WIDTH: usize = 8;
        let devices = devices();
        let on = |index: usize| devices[index % devices.len()].clone().autodiff();
        let rows: Vec<usize> = pieces.iter().map(|pieces| pieces.iter().sum::<usize>().max(1)).collect();
        let mut parts = Vec::new();
        for (source, pieces) in pieces.iter().enumerate() {
            let mut start = 0;
            for &piece in pieces {
                let (target, key) = order[parts.len()];
                parts.push((key, target, source, start..start + piece));
                start += piece;
            }
        }
        parts.sort_unstable_by_key(|(key, ..)| *key);
        let of_target = |at: usize| Target {
            at: at % rows.len(),
            parts: parts.iter().filter(|part| part.1 == at).map(|part| (part.2, part.3.clone())).collect(),
        };
        let targets: Vec<Target> = (0..3).map(of_target).collect();
        let number = |source: usize, row: usize| (0..WIDTH).map(move |i| (1000 * source + 10 * row + i) as f32);
        let sources: Vec<Tensor<2>> = rows.iter().enumerate().map(|(source, &rows)| {
            let values: Vec<f32> = (0..rows).flat_map(|row| number(source, row)).collect();
            Tensor::from_data(TensorData::new(values, [rows, WIDTH]), &on(source)).require_grad()
        }).collect();

        let results = ops::exchange(sources.clone(), targets.clone());
        let mut loss: Option<Tensor<1>> = None;
        let mut expected: Vec<Vec<f32>> = rows.iter().map(|rows| vec![0.0; rows * WIDTH]).collect();
        for (index, (result, target)) in results.into_iter().zip(&targets).enumerate() {
            let came: Vec<(usize, usize)> = target.parts.iter()
                .flat_map(|(source, rows)| rows.clone().map(move |row| (*source, row))).collect();
            prop_assert_eq!(result.is_some(), !came.is_empty());
            let Some(result) = result else { continue };
            prop_assert_eq!(result.device(), on(target.at));
            let found: Vec<f32> = result.clone().into_data().iter::<f32>().collect();
            let sent: Vec<f32> = came.iter().flat_map(|&(source, row)| number(source, row)).collect();
            prop_assert_eq!(found, sent);
            // Where a gradient is missing, it is zero.
            if unread && index == 0 {
                continue;
            }
            let weights: Vec<f32> = (0..came.len() * WIDTH).map(|i| (i + 100 * index) as f32).collect();
            for (at, &(source, row)) in came.iter().enumerate() {
                expected[source][row * WIDTH..][..WIDTH].copy_from_slice(&weights[at * WIDTH..][..WIDTH]);
            }
            let weights = Tensor::<2>::from_data(TensorData::new(weights, [came.len(), WIDTH]), &result.device());
            let part = ops::transfer((result * weights).sum(), &on(0));
            loss = Some(match loss {
                Some(loss) => loss + part,
                None => part,
            });
        }
        let Some(loss) = loss else { return Ok(()) };
        let gradients = loss.backward();
        for (source, expected) in sources.iter().zip(expected) {
            let found: Vec<f32> = source.grad(&gradients).unwrap().into_data().iter::<f32>().collect();
            prop_assert_eq!(found, expected);
        }
    }

    /// Rows that carry their number arrive where they should, sorted, and come back to where they
    /// were.
    #[test]
    fn rows_reach_the_mesh_device_of_their_expert_and_return(
        counts in prop::collection::vec(prop::collection::vec(0_usize..5, 6), 3),
        cuts in (1_usize..5, 1_usize..5),
    ) {
        let cuts = (cuts.0.min(cuts.1), cuts.0.max(cuts.1));
        let experts = [cuts.0, (cuts.1 - cuts.0).max(1), 0];
        let experts = [experts[0], experts[1], 6 - experts[0] - experts[1]];
        let exchange = Exchange::new(counts.clone(), &experts);
        let devices = vec![Device::flex(); 3];
        // Row `r` of device `d` for expert `e` is numbered d · 1000 + e · 100 + r.
        let numbers = |device: usize| -> Vec<f32> {
            let of = |(e, &n): (usize, &usize)| (0..n).map(move |r| (device * 1000 + e * 100 + r) as f32);
            counts[device].iter().enumerate().flat_map(of).collect()
        };
        let tensor = |values: Vec<f32>| {
            let rows = values.len();
            Tensor::<2>::from_data(TensorData::new(values, [rows, 1]), &Device::flex())
        };
        let arrived = exchange.send((0..3).map(|device| tensor(numbers(device))).collect());
        let mut first = 0;
        let mut returned = Vec::new();
        for (device, arrived) in arrived.into_iter().enumerate() {
            let mut expected = Vec::new();
            for expert in first..first + experts[device] {
                for (source, counts) in counts.iter().enumerate() {
                    expected.extend((0..counts[expert]).map(|r| (source * 1000 + expert * 100 + r) as f32));
                }
            }
            first += experts[device];
            prop_assert_eq!(exchange.rows_per_device()[device], expected.len());
            prop_assert_eq!(arrived.is_some(), !expected.is_empty());
            returned.push(arrived.map(|arrived| {
                assert_eq!(arrived.rows_per_expert.iter().sum::<usize>(), expected.len());
                let found: Vec<f32> = arrived.rows.clone().into_data().iter::<f32>().collect();
                assert_eq!(found, expected);
                arrived.rows
            }));
        }
        for (device, back) in exchange.send_back(returned, &devices).into_iter().enumerate() {
            let found = back.map(|rows| rows.into_data().iter::<f32>().collect::<Vec<f32>>()).unwrap_or_default();
            prop_assert_eq!(found, numbers(device));
        }
    }
}

#[test]
fn every_mesh_device_gets_the_same_sum_added_in_order() {
    let devices = devices();
    let on = |index: usize| &devices[index % devices.len()];
    // Alone, small, large and cut into unequal parts; on as many devices, or one more than once.
    for copies in 1..5 {
        let sizes = [1, 7, (1 << 16) - 1, 1 << 16, (1 << 17) + 5];
        let value = |copy: usize, i: usize| ((i * 31 + copy * 17) % 101) as f32 * 0.37 - 11.0;
        let list = |size: usize| -> Vec<Tensor<1>> {
            let tensor = |copy| {
                let values: Vec<f32> = (0..size).map(|i| value(copy, i)).collect();
                Tensor::from_data(TensorData::new(values, [size]), on(copy))
            };
            (0..copies).map(tensor).collect()
        };
        let sums = all_reduce(sizes.into_iter().map(list).collect());
        for (size, sums) in sizes.into_iter().zip(sums) {
            let sum = |i: usize| (1..copies).fold(value(0, i), |sum, copy| sum + value(copy, i));
            let expected: Vec<f32> = (0..size).map(sum).collect();
            assert_eq!(sums.len(), copies);
            for (copy, sum) in sums.into_iter().enumerate() {
                assert_eq!(sum.device(), *on(copy));
                let found: Vec<f32> = sum.into_data().iter::<f32>().collect();
                assert!(found == expected, "{copies} copies of {size} elements, to the last bit");
            }
        }
    }
    assert!(all_reduce(Vec::new()).is_empty());
}

#[test]
fn a_bad_placement_on_a_mesh_leaves_the_model_as_it_was() {
    let model = fresh_mesh_model(&model_config(), &mesh([1, 2]));
    let before = flat(&model, None);
    let all: Vec<usize> = (0..8).collect();
    let good = vec![all[..4].to_vec(), all[4..].to_vec()];
    let cases = [
        (vec![good.clone()], "the model has 2 layers, but 1 were given"),
        (
            vec![good.clone(), vec![all.clone()]],
            "layer 1: its experts must be spread over all 2 devices of a row",
        ),
        (vec![good.clone(), vec![vec![0, 1], vec![1]]], "layer 1: expert 1 is kept twice"),
        (vec![vec![vec![0], vec![8]], good.clone()], "layer 0: expert 8 does not exist among 8"),
    ];
    let mut model = model;
    for (placement, expected) in cases {
        let RefusedCut { model: back, error } = model.place_experts(&placement).unwrap_err();
        assert_eq!(error.to_string(), expected);
        model = *back;
    }
    assert_eq!(flat(&model, None), before);
    assert_eq!(model.experts_per_layer(), [8, 8]);
}
