//! A model over ranks computes what the model on one device computes: losses, loads, gradients,
//! before and after experts moved. The ranks are threads.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{Device, FloatDType, Int, Tensor, TensorData},
};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use yuan_model::{
    BalanceLosses, Batch, LossMask, PrunableExperts, RouterType, YuanConfig, YuanModel, named,
    ops::{self, RowsToRanks},
    ranks::{Communicator, RankError, Ranks, on_threads},
};

/// Rows of the grid and ranks of a row.
const SHAPES: [[usize; 2]; 6] = [[1, 1], [1, 2], [2, 1], [2, 2], [1, 4], [4, 1]];
/// Largest difference, relative to the largest value: f32 sums in another order.
const TOLERANCE: f32 = 1e-5;
const VOCAB: usize = 32;

fn config() -> YuanConfig {
    YuanConfig {
        init_std: 0.2,
        isolate_documents: true,
        router_selection_bias: true,
        experts_per_layer: vec![8, 5],
        ..YuanConfig::tiny(VOCAB)
    }
}

/// Weights that do not come from Burn, which has one random state for all threads.
fn whole(config: &YuanConfig, device: &Device) -> YuanModel {
    let mut random = StdRng::seed_from_u64(3);
    named::write_parameters(YuanModel::new(config, device).unwrap(), |_, shape| {
        let (mean, spread) = if shape.num_dims() == 1 { (1.0, 0.1) } else { (0.0, 0.35) };
        let mut draw = || mean + spread * random.random_range(-1.0..1.0_f32);
        let values: Vec<f32> = (0..shape.num_elements()).map(|_| draw()).collect();
        Some(TensorData::new(values, shape.to_vec()))
    })
}

/// By `YUAN_DEVICE` (`cuda:0,cuda:1`), in turn; one CPU serves all ranks otherwise.
fn device_of(rank: usize) -> Device {
    let wanted = std::env::var("YUAN_DEVICE").unwrap_or_else(|_| "flex".into());
    let names: Vec<&str> = wanted.split(',').collect();
    yuan_model::device(names[rank % names.len()]).unwrap().autodiff()
}

/// Rows of a batch of `rows`, of which some labels are learnt and some tokens only fill rows up.
fn batch(own: std::ops::Range<usize>, rows: usize, seq: usize, device: &Device) -> Batch {
    let numbers = |of: &dyn Fn(usize, usize) -> i64| {
        let values: Vec<i64> = own
            .clone()
            .flat_map(|row| (0..seq).map(move |at| (row, at)))
            .map(|(r, a)| of(r, a))
            .collect();
        Tensor::<2, Int>::from_data(TensorData::new(values, [own.len(), seq]), device)
    };
    let token = |row: usize, at: usize| ((row * 31 + at * at * 7 + at) % VOCAB) as i64;
    let learnt = |row: usize| (0..seq).map(|at| !(at + row).is_multiple_of(3)).collect::<Vec<_>>();
    let padding = |row: usize| (0..seq).map(|at| at >= seq - row.min(2)).collect::<Vec<_>>();
    let of_rows = |rows: &std::ops::Range<usize>| {
        let [learnt, padding]: [Vec<Vec<bool>>; 2] =
            [rows.clone().map(learnt).collect(), rows.clone().map(padding).collect()];
        LossMask::new(&learnt, &padding, device)
    };
    let mask = of_rows(&own);
    let share = mask.count() as f64 / of_rows(&(0..rows)).count() as f64;
    let positions = numbers(&|_, at| (at % 5) as i64);
    Batch::new(numbers(&token), numbers(&|row, at| token(row, at + 1)), positions)
        .with_mask(mask)
        .with_share(share)
}

/// Gradients by path.
struct ByPath<'a>(Vec<String>, &'a GradientsParams, HashMap<String, TensorData>);

impl ModuleVisitor for ByPath<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.0.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.1.get::<D>(param.id) {
            self.2.insert(self.0.join("."), gradient.into_data());
        }
    }
}

/// What a model makes of a batch; over ranks, of all their rows.
#[derive(Debug)]
struct Computed {
    loss: f32,
    balance: Option<f32>,
    loads: Vec<Vec<u64>>,
    gradients: HashMap<String, Vec<f32>>,
}

const ROWS: usize = 6;

fn compute(model: &YuanModel, seq: usize, balance: BalanceLosses, device: &Device) -> Computed {
    let ranks = model.ranks().cloned();
    let own = ranks.as_ref().map_or(0..ROWS, |ranks| ranks.share(ROWS).unwrap());
    let batch = batch(own, ROWS, seq, device);
    let output = model.loss(batch, balance, FloatDType::F32);
    let number = |x: &Tensor<1>| x.clone().into_data().as_slice::<f32>().unwrap()[0];
    let loss = number(&output.loss);
    let balance = output.balance_loss.as_ref().map(number);
    let objective = match output.balance_loss {
        Some(balance) => output.loss + balance,
        None => output.loss,
    };
    let grads = GradientsParams::from_grads(objective.backward(), model);
    let mut by_path = ByPath(Vec::new(), &grads, HashMap::new());
    model.visit(&mut by_path);
    let counts = output.tokens_per_expert.into_iter();
    let loads = counts.map(|counts| -> Vec<u64> {
        counts.into_data().convert::<i64>().iter::<i64>().map(|count| count as u64).collect()
    });
    let Some(ranks) = ranks else {
        let gradients =
            by_path.2.into_iter().map(|(path, data)| (path, data.try_to_vec().unwrap()));
        return Computed { loss, balance, loads: loads.collect(), gradients: gradients.collect() };
    };
    let sum = |group: &Communicator, own: Vec<f32>| -> Vec<f32> {
        let own: Vec<f64> = own.into_iter().map(f64::from).collect();
        group.sum(&own).unwrap().into_iter().map(|sum| sum as f32).collect()
    };
    let mut gradients = HashMap::new();
    let mut paths: Vec<String> = by_path.2.keys().cloned().collect();
    paths.sort();
    for path in paths {
        let own: Vec<f32> = by_path.2[&path].try_to_vec().unwrap();
        let all = if path.contains("experts") {
            let parts = sum(ranks.column(), own);
            let bytes: Vec<u8> = parts.iter().flat_map(|x| x.to_le_bytes()).collect();
            let row = ranks.row().gather(&bytes).unwrap().concat();
            row.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
        } else {
            sum(ranks.world(), own)
        };
        gradients.insert(path, all);
    }
    Computed {
        loss: sum(ranks.world(), vec![loss])[0],
        balance,
        loads: loads.map(|load| ranks.world().sum_counts(&load).unwrap()).collect(),
        gradients,
    }
}

fn assert_same(found: &Computed, expected: &Computed) {
    let close = |found: f32, expected: f32| (found - expected).abs() <= TOLERANCE * expected.abs();
    assert!(close(found.loss, expected.loss), "{} {}", found.loss, expected.loss);
    match (found.balance, expected.balance) {
        (Some(found), Some(expected)) => assert!(close(found, expected), "{found} {expected}"),
        (found, expected) => assert_eq!(found, expected),
    }
    assert_eq!(found.loads, expected.loads);
    assert_eq!(found.gradients.len(), expected.gradients.len());
    for (path, expected) in &expected.gradients {
        let found = &found.gradients[path];
        assert_eq!(found.len(), expected.len(), "{path}");
        let largest = expected.iter().fold(1e-6, |largest: f32, x| largest.max(x.abs()));
        for (found, expected) in found.iter().zip(expected) {
            let difference = (found - expected).abs();
            assert!(difference <= 2.0 * TOLERANCE * largest, "{path}: {found} {expected}");
        }
    }
}

fn on_grid<T: Send>([data, expert]: [usize; 2], run: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    on_threads(data * expert, |world| run(Ranks::new(world, data).unwrap()))
}

#[test]
fn ranks_have_the_loss_and_the_gradients_of_one_device() {
    let balance = BalanceLosses { auxiliary: 0.02, sequence: 0.01, router_z: 1e-3 };
    let device = device_of(0);
    for router_type in [RouterType::Linear, RouterType::Attention] {
        // With two tokens a row most experts get nothing, and some ranks neither.
        for (seq, balance) in [(12, balance), (2, BalanceLosses::default())] {
            let config = YuanConfig { router_type, ..config() };
            let expected = compute(&whole(&config, &device), seq, balance, &device);
            for shape in SHAPES {
                let model = whole(&config, &Device::flex());
                for found in on_grid(shape, |ranks| {
                    let device = device_of(ranks.world().rank());
                    let own = YuanModel::part_of(&model, &ranks, &device).unwrap();
                    compute(&own, seq, balance, &device)
                }) {
                    assert_same(&found, &expected);
                }
            }
        }
    }
}

#[test]
fn ranks_take_their_weights_from_the_first_one() {
    let model = whole(&config(), &Device::flex());
    on_grid([2, 2], |ranks| {
        let expected = YuanModel::part_of(&model, &ranks, &Device::flex()).unwrap();
        let empty = YuanModel::new_on_rank(&config(), &ranks, &Device::flex()).unwrap();
        let first = ranks.world().is_first().then(|| model.clone());
        let filled = empty.filled_from_first(first).unwrap();
        let weights = |model: &YuanModel| {
            let mut found = Vec::new();
            named::read_parameters(model, |path, data| {
                found.push((path.to_owned(), data));
                Ok::<_, ()>(())
            })
            .unwrap();
            found
        };
        assert!(weights(&filled) == weights(&expected));
    });
}

#[test]
fn a_layer_with_fewer_experts_than_ranks_is_refused() {
    let refused = on_grid([1, 6], |ranks| {
        YuanModel::new_on_rank(&config(), &ranks, &Device::flex()).unwrap_err().to_string()
    });
    assert!(refused[0].starts_with("layer 1 has 5 experts, too few for the 6 "), "{}", refused[0]);
}

#[test]
fn a_bad_placement_over_ranks_leaves_the_model_as_it_was() {
    let model = whole(&config(), &Device::flex());
    on_grid([1, 2], |ranks| {
        let own = YuanModel::part_of(&model, &ranks, &Device::flex()).unwrap();
        let placement = [vec![vec![0, 1], vec![2, 8]], vec![vec![0], vec![1, 2]]];
        let refused = own.place_experts(&placement).unwrap_err();
        assert_eq!(refused.to_string(), "layer 0: expert 8 does not exist among 8");
        let refused = refused.model.place_experts(&[vec![vec![0, 1], vec![]], vec![]]).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "layer 0: its experts must be spread over all 2 ranks of a row"
        );
        assert_eq!(refused.model.experts_per_layer(), [8, 5]);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// What is placed on ranks computes what one device computes that keeps the same experts.
    #[test]
    fn any_placement_over_ranks_computes_the_same(
        order in Just((0..8).collect::<Vec<usize>>()).prop_shuffle(),
        kept in 4..=8_usize,
        cuts in proptest::collection::vec(1..4_usize, 3),
        shape in proptest::sample::select(vec![[1, 2], [2, 2], [1, 4]]),
    ) {
        let device = device_of(0);
        let kept = order[..kept].to_vec();
        // Parts of any sizes, with one expert at least.
        let mut groups: Vec<Vec<usize>> = vec![Vec::new(); shape[1]];
        for (at, &expert) in kept.iter().enumerate() {
            let group = if at < shape[1] { at } else { cuts[at % 3] % shape[1] };
            groups[group].push(expert);
        }
        let second = match shape[1] {
            2 => vec![vec![4, 0], vec![2, 1]],
            _ => vec![vec![3], vec![0], vec![4], vec![1]],
        };
        let placement = [groups, second];
        let kept: Vec<Vec<usize>> = placement.iter().map(|groups| groups.concat()).collect();
        let (cut, _) = whole(&config(), &device).keep_experts(&kept).unwrap();
        let expected = compute(&cut, 12, BalanceLosses::default(), &device);
        let model = whole(&config(), &Device::flex());
        let found = on_grid(shape, |ranks| {
            let device = device_of(ranks.world().rank());
            let own = YuanModel::part_of(&model, &ranks, &device).unwrap();
            let (own, selections) = own.place_experts(&placement).unwrap();
            assert_eq!(own.placement()[0], placement[0].iter().map(Vec::len).collect::<Vec<_>>());
            let moved = selections.iter().map(|selection| selection.moved).max();
            (compute(&own, 12, BalanceLosses::default(), &device), moved)
        });
        for (found, _) in &found {
            assert_same(found, &expected);
        }
    }

    #[test]
    fn sums_over_ranks_are_added_in_their_order(
        numbers in proptest::collection::vec(proptest::collection::vec(-1e3..1e3_f32, 6), 1..5),
    ) {
        let ranks = numbers.len();
        let mut expected = numbers[0].clone();
        for more in &numbers[1..] {
            expected.iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
        }
        let length = 6 * ranks;
        let found = on_threads(ranks, |group| {
            let device = device_of(group.rank()).inner();
            let own = Tensor::<1>::from_data(&numbers[group.rank()][..], &device);
            let sum = ops::all_reduce(own.clone(), &group).into_data().try_to_vec::<f32>().unwrap();
            // Tensors of several lengths at once, each a multiple of the ranks.
            let long = own.clone().repeat(&[ranks]);
            let parts = ops::reduce_scatter(vec![long.clone(), long], &group).wait();
            let gathered = ops::all_gather(parts, &group).wait().into_iter();
            (sum, gathered.map(|x| x.into_data().try_to_vec::<f32>().unwrap()).collect::<Vec<_>>())
        });
        for (sum, gathered) in found {
            prop_assert_eq!(&sum, &expected);
            for gathered in gathered {
                prop_assert_eq!(gathered.len(), length);
                prop_assert_eq!(&gathered[..6], &expected[..]);
                prop_assert_eq!(&gathered[length - 6..], &expected[..]);
            }
        }
    }
}

#[test]
fn the_gradient_of_an_all_to_all_is_the_all_to_all_back() {
    // Rank r sends r + c rows to rank c; row values name their source.
    let found = on_threads(3, |group| {
        let (me, device) = (group.rank(), device_of(group.rank()));
        let send: Vec<usize> = (0..3).map(|to| me + to).collect();
        let receive: Vec<usize> = (0..3).map(|from| from + me).collect();
        let rows: usize = send.iter().sum();
        let x = Tensor::<1>::from_floats([me as f32 + 1.0], &device)
            .expand([rows.max(1), 2])
            .require_grad();
        let way = RowsToRanks { group, send, receive };
        let arrived = ops::all_to_all(x.clone(), way);
        let weights =
            Tensor::<1>::from_floats([10.0_f32.powi(me as i32)], &device).expand(arrived.dims());
        let grads = (arrived.clone() * weights).sum().backward();
        let gradient = x.grad(&grads).unwrap().into_data().try_to_vec::<f32>().unwrap();
        (arrived.into_data().try_to_vec::<f32>().unwrap(), gradient)
    });
    assert_eq!(found[0].0, [2.0, 2.0, 3.0, 3.0, 3.0, 3.0]);
    assert_eq!(found[2].0, [vec![1.0; 4], vec![2.0; 6], vec![3.0; 8]].concat());
    assert_eq!(found[1].1, [vec![1.0; 2], vec![10.0; 4], vec![100.0; 6]].concat());
}

#[test]
fn a_rank_that_ends_is_missed_by_the_others() {
    let found = on_threads(3, |group| match group.rank() {
        1 => Ok(Vec::new()),
        _ => group.sum(&[1.0]),
    });
    assert_eq!(found[0], Err(RankError::Gone { rank: 1 }));
    // The first rank may have left because of that already.
    assert!(matches!(found[2], Err(RankError::Gone { rank: 0 | 1 })), "{:?}", found[2]);
}

#[test]
fn ranks_that_do_not_agree_are_named() {
    let found = on_threads(3, |group| {
        let own = if group.rank() == 2 { "other" } else { "plan" };
        group.agree("plan", own.as_bytes()).unwrap_err().to_string()
    });
    assert_eq!(found[1], "rank 2 has another plan than rank 0: they were not started alike");
    let found = on_threads(2, |group| group.gather_counts(&vec![1; 1 + group.rank()]));
    let error = RankError::OutOfStep { rank: 1, found: 16, expected: 8 };
    assert_eq!(found[0], Err(error));
}
