//! Decoding with a cache against upstream's own cache and against the full forward pass.

mod support;

use std::ops::ControlFlow;

use burn::tensor::{Device, Int, Tensor, TensorData};
use proptest::prelude::*;
use support::{
    Fixture, HostTensor, Kind::Activation, assert_near, assert_near_scaled, devices, load_model,
    reference_model,
};
use yuan_model::{
    Cache, ForwardOptions, GenerateError, GenerationOptions, RouterType, YuanConfig, YuanModel,
    generate::{FinishReason, NewToken, Sampling},
    rope::Rotary,
};

const MODELS: [&str; 2] = ["flash_tiny", "ultra_tiny"];

/// Logits of `input_ids`, read in pieces of the given sizes, then token by token.
fn logits_in_pieces(
    model: &YuanModel,
    input_ids: &Tensor<2, Int>,
    pieces: &[usize],
) -> (Tensor<3>, Cache) {
    let [batch, seq] = input_ids.dims();
    let mut cache = Cache::new(model.blocks.len(), vec![0; batch], seq);
    let mut logits = Vec::new();
    let mut pieces = pieces.iter().copied();
    while cache.room() > 0 {
        let (start, size) = (cache.len(), pieces.next().unwrap_or(1).min(cache.room()));
        let output =
            model.forward_cached(input_ids.clone().slice_dim(1, start..start + size), &mut cache);
        logits.push(model.logits(output.hidden));
    }
    (Tensor::cat(logits, 1), cache)
}

#[test]
fn incremental_logits_are_those_of_the_reference() {
    for directory in MODELS {
        let io = Fixture::load(&format!("{directory}/io.safetensors"));
        let prompts = io.numbers("decode.prefill", ".logits");
        assert!(!prompts.is_empty(), "{directory}: the reference decodes");
        for (backend, device) in devices() {
            let model = reference_model(directory, &device);
            let input_ids = io.int::<2>("input_ids", &device);
            for prompt in prompts.clone() {
                let (logits, _) = logits_in_pieces(&model, &input_ids, &[prompt]);
                let key = format!("decode.prefill{prompt}.logits");
                assert_near(
                    &format!("{backend} {directory} {key}"),
                    &logits,
                    io.host(&key),
                    Activation,
                );
                assert_near(
                    &format!("{backend} {directory}"),
                    &logits,
                    io.host("logits"),
                    Activation,
                );
            }
        }
    }
}

#[test]
fn the_cache_holds_what_that_of_the_reference_does() {
    for directory in MODELS {
        let io = Fixture::load(&format!("{directory}/io.safetensors"));
        let prompts = io.numbers("decode.prefill", ".logits");
        assert!(!prompts.is_empty(), "{directory}: the reference decodes");
        for (backend, device) in devices() {
            let model = reference_model(directory, &device);
            for prompt in prompts.clone() {
                let input_ids = io.int::<2>("input_ids", &device).slice_dim(1, 0..prompt);
                let [batch, _] = input_ids.dims();
                let mut cache = Cache::new(model.blocks.len(), vec![0; batch], prompt);
                drop(model.forward_cached(input_ids, &mut cache));
                // Upstream caches keys before rotation.
                let rotary = Rotary::new(model.config(), None, prompt, &device);
                for (layer, block) in model.blocks.iter().enumerate() {
                    let name = |key: &str| format!("cache.prefill{prompt}.{key}.{layer}");
                    let near = |key: &str, ours: Tensor<4>, expected: Tensor<4>| {
                        let what = format!("{backend} {directory} {}", name(key));
                        assert_near(&what, &ours, &host(expected), Activation);
                    };
                    let [keys, values] =
                        cache.keys_values(layer).unwrap().map(|x| x.swap_dims(1, 2));
                    near(
                        "k_unrotated",
                        keys,
                        rotary.rotate(io.tensor::<4>(&name("k_unrotated"), &device)),
                    );
                    near("v", values, io.tensor::<4>(&name("v"), &device));
                    // Upstream remembers the last two inputs of the filter, we what they add to the
                    // next token.
                    let filter = block.attention.filter.as_ref().unwrap();
                    let inputs = io.tensor::<3>(&name("lf_memory"), &device);
                    let hidden = filter.conv1.forward(inputs.clone()).slice_dim(1, 1..2);
                    let memory = cache.filter(layer).unwrap();
                    for (key, ours, conv, last) in [
                        ("lf_memory", &memory.conv1, &filter.conv1, inputs.slice_dim(1, 1..2)),
                        ("lf_memory", &memory.conv2, &filter.conv2, hidden),
                    ] {
                        let weight = conv.weight.val();
                        let d_out = weight.dims()[1] / 2;
                        let previous = last.matmul(weight.slice_dim(1, 0..d_out).unsqueeze::<3>());
                        near(key, ours.clone().unsqueeze::<4>(), previous.unsqueeze::<4>());
                    }
                }
            }
        }
    }
}

fn host<const D: usize>(tensor: Tensor<D>) -> HostTensor {
    HostTensor { shape: tensor.dims().to_vec(), values: support::values(&tensor.into_data()) }
}

/// Hidden states of prompts that end together, each compared with the model's own pass over it
/// alone.
fn check_unequal(
    name: &str,
    model: &YuanModel,
    rows: &[Vec<i64>],
    prompt_lengths: &[usize],
    device: &Device,
) {
    // Every row ends at the same place; the shorter ones start with some token as padding.
    let longest = *prompt_lengths.iter().max().unwrap();
    let steps =
        rows.iter().zip(prompt_lengths).map(|(row, prompt)| row.len() - prompt).min().unwrap();
    let padding: Vec<usize> = prompt_lengths.iter().map(|length| longest - length).collect();
    let mut cache = Cache::new(model.blocks.len(), padding.clone(), longest + steps);
    let prompts: Vec<i64> = rows
        .iter()
        .zip(&padding)
        .flat_map(|(row, &padding)| {
            std::iter::repeat_n(3, padding)
                .chain(row[..longest - padding].iter().copied())
                .collect::<Vec<_>>()
        })
        .collect();
    let mut input =
        Tensor::<2, Int>::from_data(TensorData::new(prompts, [rows.len(), longest]), device);
    for step in 0..=steps {
        let output = model.forward_cached(input, &mut cache);
        let logits = model.logits(output.hidden);
        let width = logits.dims()[1];
        let counted: i64 = output.tokens_per_expert[0].clone().sum().into_scalar::<i64>();
        let new: usize = if step == 0 { prompt_lengths.iter().sum() } else { rows.len() };
        assert_eq!(counted as usize, new * model.config().top_k, "{name}: padding is not counted");
        for (index, (row, prompt)) in rows.iter().zip(prompt_lengths).enumerate() {
            let alone = Tensor::<1, Int>::from_data(&row[..prompt + step], device).unsqueeze::<2>();
            let alone = model.forward(alone, ForwardOptions::default()).logits;
            let last = alone.slice_dim(1, prompt + step - 1..prompt + step);
            let ours = logits.clone().slice([index..index + 1, width - 1..width]);
            assert_near(&format!("{name} row {index} step {step}"), &ours, &host(last), Activation);
        }
        let next: Vec<i64> = rows
            .iter()
            .zip(prompt_lengths)
            .map(|(row, p)| row[(p + step).min(row.len() - 1)])
            .collect();
        input = Tensor::<1, Int>::from_data(next.as_slice(), device).unsqueeze_dim::<2>(1);
        if step == steps {
            break;
        }
    }
}

#[test]
fn prompts_of_unequal_length_give_what_each_gives_alone() {
    let row = |shift: i64| (0..10).map(|i| 6 + (i * 7 + shift * 5) % 70).collect::<Vec<i64>>();
    let rows = [row(0), row(1), row(2)];
    for directory in MODELS {
        for (backend, device) in devices() {
            let model = load_model(directory, &device);
            for lengths in [[5, 2, 4], [1, 6, 1], [3, 3, 3]] {
                check_unequal(
                    &format!("{backend} {directory} {lengths:?}"),
                    &model,
                    &rows,
                    &lengths,
                    &device,
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_model_in_any_pieces_gives_the_full_pass(
        seed in 0_u64..1000,
        attention_router in any::<bool>(),
        localized_filter in any::<bool>(),
        filter_bias in any::<bool>(),
        pieces in prop::collection::vec(1_usize..6, 0..4),
        seq in 1_usize..14,
        batch in 1_usize..4,
    ) {
        let config = YuanConfig {
            router_type: if attention_router { RouterType::Attention } else { RouterType::Linear },
            localized_filter,
            filter_bias,
            init_std: 0.2,
            ..YuanConfig::tiny(96)
        };
        let device = Device::flex();
        device.seed(seed);
        let model = YuanModel::new(&config, &device).unwrap();
        let ids: Vec<i64> = (0..batch * seq).map(|i| (i as i64 * 31 + seed as i64) % 96).collect();
        let input_ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, seq]), &device);
        let full = model.forward(input_ids.clone(), ForwardOptions::default()).logits;
        let (logits, _) = logits_in_pieces(&model, &input_ids, &pieces);
        let scale = full.clone().abs().max().into_scalar::<f32>().max(1.0);
        assert_near_scaled("logits", &logits, &host(full), Activation, scale);
    }
}

fn options(max_new_tokens: usize, sampling: Sampling) -> GenerationOptions {
    GenerationOptions { max_new_tokens, sampling, ..GenerationOptions::default() }
}

fn never_stop(_: NewToken) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

const PROMPTS: [&[u32]; 3] = [&[7, 9, 30, 12], &[40], &[8, 8, 61, 70, 22, 13]];

fn prompts() -> Vec<Vec<u32>> {
    PROMPTS.iter().map(|prompt| prompt.to_vec()).collect()
}

#[test]
fn greedy_generation_is_the_argmax_of_full_passes() {
    for (backend, device) in devices() {
        let model = load_model("ultra_tiny", &device);
        let mut streamed = vec![Vec::new(); 3];
        let generated = model
            .generate(&prompts(), &options(8, Sampling::greedy()), |new| {
                streamed[new.sequence].push(new.token);
                ControlFlow::Continue(())
            })
            .unwrap();
        for ((prompt, generated), streamed) in prompts().iter().zip(&generated).zip(streamed) {
            let mut tokens: Vec<i64> = prompt.iter().map(|&token| i64::from(token)).collect();
            for token in &generated.tokens {
                let ids = Tensor::<1, Int>::from_data(tokens.as_slice(), &device).unsqueeze::<2>();
                let logits = model.forward(ids, ForwardOptions::default()).logits;
                let last = logits.slice_dim(1, tokens.len() - 1..tokens.len());
                let best = last.argmax(2).into_scalar::<i64>();
                assert_eq!(i64::from(*token), best, "{backend}");
                tokens.push(best);
            }
            assert_eq!((generated.tokens.len(), generated.finish), (8, FinishReason::Length));
            assert_eq!(generated.tokens, streamed, "{backend}");
        }
    }
}

#[test]
fn draws_repeat_by_seed_and_do_not_depend_on_the_company() {
    let model = load_model("flash_tiny", &Device::flex());
    let sampling =
        Sampling { temperature: 1.5, top_k: Some(40), top_p: 0.95, repetition_penalty: 1.1 };
    let generate = |prompts: &[Vec<u32>], seed| {
        let options = GenerationOptions { seed, ..options(12, sampling) };
        let generated = model.generate(prompts, &options, never_stop).unwrap();
        generated.into_iter().map(|generation| generation.tokens).collect::<Vec<_>>()
    };
    let all = generate(&prompts(), 1);
    assert_eq!(all, generate(&prompts(), 1));
    assert_eq!(all[..1], generate(&prompts()[..1], 1));
    assert_eq!(all[..2], generate(&prompts()[..2], 1));
    assert_ne!(all, generate(&prompts(), 2));
    let twins = generate(&[prompts()[0].clone(), prompts()[0].clone()], 1);
    assert_ne!(twins[0], twins[1], "every sequence draws its own numbers");
}

#[test]
fn a_stop_token_ends_its_sequence_only_and_the_callback_ends_all() {
    let model = load_model("ultra_tiny", &Device::flex());
    let free = model.generate(&prompts(), &options(8, Sampling::greedy()), never_stop).unwrap();
    let stop = free[0].tokens[2];
    let until = free[0].tokens.iter().position(|&token| token == stop).unwrap();
    let stopped = GenerationOptions { stop_tokens: vec![stop], ..options(8, Sampling::greedy()) };
    let generated = model.generate(&prompts(), &stopped, never_stop).unwrap();
    assert_eq!(generated[0].tokens, free[0].tokens[..=until]);
    assert_eq!(generated[0].finish, FinishReason::Stop);
    for (generated, free) in generated.iter().zip(&free).skip(1) {
        let end = free.tokens.iter().position(|&token| token == stop).map_or(8, |place| place + 1);
        assert_eq!(
            generated.tokens,
            free.tokens[..end],
            "the others go on as if nothing had happened"
        );
    }
    let mut heard = 0;
    let cancelled = model.generate(&prompts(), &options(8, Sampling::greedy()), |_| {
        heard += 1;
        if heard == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let lengths: Vec<_> = cancelled.unwrap().iter().map(|g| (g.tokens.len(), g.finish)).collect();
    assert_eq!(heard, 5);
    assert_eq!(
        lengths,
        [(2, FinishReason::Cancelled), (2, FinishReason::Cancelled), (1, FinishReason::Cancelled)]
    );
}

#[test]
fn every_answer_of_a_rollout_is_the_one_that_is_drawn_alone_with_its_seed() {
    const ANSWERS: usize = 4;
    for (backend, device) in devices() {
        let model = load_model("ultra_tiny", &device);
        let options = GenerationOptions { seed: 5, ..options(16, Sampling::unchanged()) };
        // Answers end at different times, so that the batch shrinks on the way.
        let stop_tokens: Vec<u32> = (0..5).collect();
        let options = GenerationOptions { stop_tokens, ..options };
        let goes_on = |_, _: &[u32]| ControlFlow::Continue(());
        let rollout = model.rollout(&prompts(), ANSWERS, &options, goes_on).unwrap();
        assert_eq!(rollout.answers.len(), PROMPTS.len() * ANSWERS, "{backend}");
        let lengths: Vec<usize> = rollout.answers.iter().map(|a| a.tokens.len()).collect();
        assert!(lengths.iter().any(|&length| length < 8), "{lengths:?}");
        assert!(lengths.iter().filter(|&&length| length > 8).count() > 1, "{lengths:?}");
        for (sequence, answer) in rollout.answers.iter().enumerate() {
            let alone = GenerationOptions { seed: options.seed_of(sequence), ..options.clone() };
            let prompt = prompts()[sequence / ANSWERS].clone();
            let alone = model.generate(&[prompt], &alone, never_stop).unwrap();
            assert_eq!(alone[0], *answer, "{backend}: answer {sequence}");
        }
        // A prompt counts once, the last token of an answer is read by nobody, and what is computed
        // behind the end of an answer is no load.
        let read: usize = PROMPTS.iter().map(|prompt| prompt.len()).sum::<usize>()
            + lengths.iter().map(|length| length - 1).sum::<usize>();
        for layer in &rollout.tokens_per_expert {
            let top_k = model.config().top_k as u64;
            assert_eq!(layer.iter().sum::<u64>(), top_k * read as u64, "{backend}");
        }
    }
}

#[test]
fn a_rollout_ends_the_answers_that_it_is_told_to_end() {
    let model = load_model("flash_tiny", &Device::flex());
    let options = options(9, Sampling::unchanged());
    let two_of_the_first = |new: NewToken, tokens: &[u32]| match (new.sequence, tokens.len()) {
        (0, 2) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let rollout = model.rollout(&prompts(), 2, &options, two_of_the_first).unwrap();
    let lengths: Vec<usize> = rollout.answers.iter().map(|answer| answer.tokens.len()).collect();
    assert_eq!(lengths, [2, 9, 9, 9, 9, 9]);
    assert_eq!(rollout.answers[0].finish, FinishReason::Cancelled);
    assert_eq!(rollout.answers[1].finish, FinishReason::Length);
    let none = model.rollout::<Vec<u32>>(&[], 3, &options, two_of_the_first).unwrap();
    assert!(none.answers.is_empty());
}

#[test]
fn a_model_in_training_generates_the_same() {
    let plain = load_model("flash_tiny", &Device::flex());
    let training = load_model("flash_tiny", &Device::flex().autodiff());
    let generate =
        |model: &YuanModel| model.generate(&prompts(), &options(4, Sampling::greedy()), never_stop);
    assert_eq!(generate(&plain).unwrap(), generate(&training).unwrap());
}

#[test]
fn what_cannot_be_continued_is_refused_before_anything_is_computed() {
    let model = load_model("ultra_tiny", &Device::flex());
    let refused = |prompts: &[Vec<u32>], sampling| {
        model.generate(prompts, &options(2, sampling), never_stop).unwrap_err().to_string()
    };
    assert_eq!(refused(&[vec![1], vec![]], Sampling::greedy()), "prompt 1 is empty");
    assert_eq!(
        refused(&[vec![7, 80]], Sampling::greedy()),
        "prompt 0 has the token 80, but the vocabulary ends at 80"
    );
    let greedy = Sampling::greedy();
    for (sampling, message) in [
        (
            Sampling { temperature: -1.0, ..greedy },
            "temperature = -1 is out of range: expected 0 or more",
        ),
        (Sampling { top_k: Some(0), ..greedy }, "top_k = 0 is out of range: expected at least 1"),
        (
            Sampling { top_p: 0.0, ..greedy },
            "top_p = 0 is out of range: expected above 0 and at most 1",
        ),
        (
            Sampling { repetition_penalty: f64::NAN, ..greedy },
            "repetition_penalty = NaN is out of range: expected above 0",
        ),
    ] {
        assert_eq!(refused(&prompts(), sampling), message);
    }
    assert_eq!(model.generate(&[] as &[Vec<u32>], &options(2, greedy), never_stop).unwrap(), []);
    let nothing = model.generate(&prompts(), &options(0, greedy), never_stop).unwrap();
    assert!(nothing.iter().all(|generation| generation.tokens.is_empty()));
}

#[test]
fn damaged_weights_are_noticed() {
    let device = Device::flex();
    let mut model = load_model("ultra_tiny", &device);
    model.final_norm.weight = model.final_norm.weight.map(|weight| weight.mul_scalar(f32::NAN));
    let error =
        model.generate(&prompts(), &options(2, Sampling::greedy()), never_stop).unwrap_err();
    assert_eq!(error, GenerateError::NotFinite { sequence: 0, position: 0 });
}
