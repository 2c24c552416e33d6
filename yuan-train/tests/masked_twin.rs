//! The proof of the cut: a pruned model is its unpruned twin with the dropped experts masked.
//!
//! With a linear router, dropping an expert is setting its logit to −∞. So after a prune in
//! mid-run, loss, gradients and the next AdamW step of every kept slice must be the twin's.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{Device, Int, Tensor, TensorData},
};
use yuan_model::{
    ForwardOptions, PrunableExperts, RefusedCut, RouterType, Selection, YuanConfig, YuanModel,
    loss::{masked_mean, token_losses},
    named,
};
use yuan_train::{AdamW, AdamWConfig};

const VOCAB: usize = 40;

/// As in yuan-model's tests, by `YUAN_DEVICE`.
fn devices() -> Vec<Device> {
    let wanted = std::env::var("YUAN_DEVICE").unwrap_or_else(|_| "flex,ndarray".into());
    wanted.split(',').map(|name| yuan_model::device(name).unwrap().autodiff()).collect()
}

fn tokens(step: usize, device: &Device) -> Tensor<2, Int> {
    let row = |i: usize| ((i * i + 7 * i + step * 13) % VOCAB) as i64;
    Tensor::from_data(TensorData::new((0..4 * 17).map(row).collect::<Vec<i64>>(), [4, 17]), device)
}

fn loss(
    model: &YuanModel,
    tokens: Tensor<2, Int>,
    selection_bias: Option<Vec<Tensor<1>>>,
) -> Tensor<1> {
    let options = ForwardOptions { selection_bias, ..ForwardOptions::default() };
    let output = model.forward(tokens.clone().slice_dim(1, 0..16), options);
    masked_mean(token_losses(output.logits, tokens.slice_dim(1, 1..17)), None)
}

/// A model and optimizer in mid-run: moments are there and differ from expert to expert.
fn mid_run(router_type: RouterType, device: &Device) -> (YuanModel, AdamW) {
    let config = YuanConfig { router_type, init_std: 0.2, ..YuanConfig::tiny(VOCAB) };
    device.seed(5);
    let mut model = named::initialized(YuanModel::new(&config, device).unwrap());
    let mut optimizer = AdamW::new(&AdamWConfig::default());
    for step in 0..4 {
        let grads = loss(&model, tokens(step, device), None).backward();
        let grads = GradientsParams::from_grads(grads, &model);
        model = optimizer.step(model, grads, 1e-2, 1.0);
    }
    (model, optimizer)
}

/// Every parameter (or its gradient) by id, cut by `selections` where they say so.
fn cut_values(
    model: &YuanModel,
    gradients: Option<&GradientsParams>,
    selections: &[Selection],
) -> HashMap<ParamId, Vec<f32>> {
    struct Collect<'a> {
        gradients: Option<&'a GradientsParams>,
        selections: &'a [Selection],
        found: HashMap<ParamId, Vec<f32>>,
    }
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = match self.gradients {
                Some(gradients) => {
                    gradients.get::<D>(param.id).expect("every parameter has a gradient")
                }
                None => param.val().inner(),
            };
            let value = match self.selections.iter().find(|selection| selection.param == param.id) {
                Some(selection) => selection.apply(value),
                None => value,
            };
            self.found.insert(param.id, value.into_data().convert::<f32>().iter::<f32>().collect());
        }
    }
    let mut visitor = Collect { gradients, selections, found: HashMap::new() };
    model.visit(&mut visitor);
    visitor.found
}

fn assert_same(
    what: &str,
    a: &HashMap<ParamId, Vec<f32>>,
    b: &HashMap<ParamId, Vec<f32>>,
    relative: f32,
) {
    assert_eq!(a.len(), b.len());
    for (id, a) in a {
        let b = &b[id];
        assert_eq!(a.len(), b.len(), "{what} of {id:?}");
        let largest = a.iter().fold(1e-12_f32, |max, x| max.max(x.abs()));
        for (a, b) in a.iter().zip(b) {
            assert!(
                (a - b).abs() <= relative * largest,
                "{what} of {id:?}: {a} is not {b}, largest {largest}"
            );
        }
    }
}

/// Cuts a clone of a mid-run model and compares it with the twin that hides the same experts.
fn check(router_type: RouterType, kept: &[Vec<usize>]) {
    for device in devices() {
        let (twin, mut twin_optimizer) = mid_run(router_type, &device);
        let (pruned, selections) = twin.clone().keep_experts(kept).unwrap();
        let mut optimizer = twin_optimizer.clone();
        optimizer.cut(&selections);
        assert_eq!(optimizer.updates(), 4, "the step count is kept");
        let counts: Vec<usize> = kept.iter().map(Vec::len).collect();
        assert_eq!(pruned.config().experts_per_layer, counts);

        let hidden = |kept: &Vec<usize>| {
            let bias: Vec<f32> =
                (0..8).map(|e| if kept.contains(&e) { 0.0 } else { f32::NEG_INFINITY }).collect();
            Tensor::<1>::from_data(TensorData::new(bias, [8]), &device)
        };
        let twin_loss = loss(&twin, tokens(9, &device), Some(kept.iter().map(hidden).collect()));
        let pruned_loss = loss(&pruned, tokens(9, &device), None);
        let (a, b) =
            (twin_loss.clone().into_scalar::<f32>(), pruned_loss.clone().into_scalar::<f32>());
        assert!((a - b).abs() <= 1e-5 * a.abs(), "loss {b} is not {a}");

        let twin_grads = GradientsParams::from_grads(twin_loss.backward(), &twin);
        let grads = GradientsParams::from_grads(pruned_loss.backward(), &pruned);
        let expected = cut_values(&twin, Some(&twin_grads), &selections);
        assert_same("gradient", &expected, &cut_values(&pruned, Some(&grads), &[]), 1e-5);

        let twin = twin_optimizer.step(twin, twin_grads, 1e-2, 0.9);
        let pruned = optimizer.step(pruned, grads, 1e-2, 0.9);
        let expected = cut_values(&twin, None, &selections);
        assert_same("updated parameter", &expected, &cut_values(&pruned, None, &[]), 1e-5);
        check_moments(&twin, &twin_optimizer, &optimizer, &selections);
    }
}

/// Moments of the pruned run are slices of the twin's, and no larger.
fn check_moments(twin: &YuanModel, full: &AdamW, cut: &AdamW, selections: &[Selection]) {
    for block in &twin.blocks {
        let param = block.moe.experts.gate_up.id;
        let selection = selections.iter().find(|selection| selection.param == param).unwrap();
        let pairs =
            full.moments::<3>(param).unwrap().into_iter().zip(cut.moments::<3>(param).unwrap());
        for (full, cut) in pairs {
            let expected: Vec<f32> = selection.apply(full).into_data().iter::<f32>().collect();
            assert_eq!(cut.dims()[0], selection.kept.len());
            let ours: Vec<f32> = cut.into_data().iter::<f32>().collect();
            let largest = expected.iter().fold(1e-12_f32, |max, x| max.max(x.abs()));
            assert!(ours.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5 * largest));
        }
    }
}

#[test]
fn a_prune_equals_its_masked_twin() {
    check(RouterType::Linear, &[vec![6, 1, 3, 0], vec![7, 2]]);
    check(RouterType::Linear, &[vec![0, 1, 2, 3, 4, 5, 7], vec![5, 4, 3, 2, 1, 0]]);
}

#[test]
fn a_pure_rearrangement_changes_nothing() {
    let kept = [vec![3, 1, 7, 5, 0, 2, 6, 4], vec![7, 6, 5, 4, 3, 2, 1, 0]];
    check(RouterType::Linear, &kept);
    check(RouterType::Attention, &kept);
}

#[test]
fn a_refused_cut_gives_the_model_back_unchanged() {
    let device = Device::flex().autodiff();
    let (model, _) = mid_run(RouterType::Linear, &device);
    let before = cut_values(&model, None, &[]);
    let full: Vec<usize> = (0..8).collect();
    let cases = [
        (vec![full.clone()], "the model has 2 layers, but 1 were given"),
        (vec![full.clone(), vec![0, 0, 1]], "layer 1: expert 0 is kept twice"),
        (vec![full.clone(), vec![0, 8]], "layer 1: expert 8 does not exist among 8"),
        (vec![vec![4], full], "layer 0: 1 experts are fewer than top_k = 2"),
    ];
    let mut model = model;
    for (kept, message) in cases {
        let Err(RefusedCut { model: unchanged, error }) = model.keep_experts(&kept) else {
            panic!("{kept:?} was accepted")
        };
        assert_eq!(error.to_string(), message);
        assert_eq!(cut_values(&unchanged, None, &[]), before);
        model = *unchanged;
    }
}
