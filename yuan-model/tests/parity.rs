//! Every block and two whole models against the numbers of the upstream implementation.
//!
//! `YUAN_REFERENCE` names another directory of the same layout; other sizes and seeds work too. The
//! blocks share the fixtures and their tolerances, which is why they share a file.

mod support;

use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use serde_json::Value;
use support::{
    Fixture, Kind, assemble, assert_gradient, assert_near, devices, fill, gradients, reference,
    reference_model, sources_under, tolerance,
};
use yuan_model::{
    Attention, BalanceLosses, Batch, ForwardOptions, LocalizedFilter, LossMask, RmsNorm,
    RouterType, YuanConfig, YuanModel,
    loss::{masked_mean, token_losses},
    masks::{self, ImageMarkers},
    moe::{MoeLayer, MoeOptions, Router},
    ops,
    rope::{Rotary, frequencies, yarn_frequencies, yarn_ramp},
};

use Kind::{Activation, Loss};

/// Cases of `component/meta.json` whose name starts with `kind`, with their scalar parameters.
fn component_cases(kind: &str) -> Vec<(String, Value)> {
    let text = std::fs::read_to_string(reference().join("component/meta.json")).unwrap();
    let meta: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    let cases: Vec<_> = meta.into_iter().filter(|(name, _)| name.starts_with(kind)).collect();
    assert!(!cases.is_empty(), "component/meta.json has no {kind}");
    cases
}

fn count(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap_or_else(|| panic!("{key} in {case}")) as usize
}

fn component(name: &str) -> Fixture {
    Fixture::load(&format!("component/{name}.safetensors"))
}

/// `Σ output · coef` backwards, checked for the input and for every parameter of the module.
fn check_gradients<M: burn::module::Module, const D: usize>(
    name: &str,
    module: &M,
    input: &Tensor<D>,
    loss: Tensor<1>,
    fixture: &Fixture,
    sources: &[yuan_model::hf::ParameterSource],
) {
    let grads = loss.backward();
    let expected = fixture.tensor::<D>("grad.input.x", &input.device().inner()).into_data();
    assert_gradient(
        &format!("{name}: input"),
        &input.device(),
        &input.grad(&grads).unwrap().into_data(),
        &expected,
    );
    let found = gradients(module, &grads);
    for source in sources {
        let ours = &found[&source.path];
        assert_gradient(
            &format!("{name}: {}", source.path),
            &input.device(),
            ours,
            &assemble(source, fixture, "grad.weight."),
        );
    }
}

#[test]
fn rms_norm_agrees_with_the_reference() {
    let meta = component_cases("rmsnorm").remove(0).1;
    let fixture = component("rmsnorm");
    for (backend, device) in devices() {
        let device = device.autodiff();
        for (case, numbers) in meta.as_object().unwrap() {
            let name = format!("{backend} rmsnorm {case}");
            let mut norm =
                RmsNorm::new(count(numbers, "hidden"), numbers["eps"].as_f64().unwrap(), &device);
            norm.weight = norm
                .weight
                .map(|_| fixture.tensor(&format!("{case}.weight"), &device).require_grad());
            let x = fixture.tensor::<3>(&format!("{case}.input.x"), &device).require_grad();
            let y = norm.forward(x.clone());
            assert_near(&name, &y, fixture.host(&format!("{case}.output.y")), Activation);
            let grads =
                (y * fixture.tensor(&format!("{case}.loss_coef"), &device)).sum().backward();
            let expected = |key: &str| {
                let host = fixture.host(&format!("{case}.grad.{key}"));
                TensorData::new(host.values.clone(), host.shape.clone())
            };
            assert_gradient(
                &name,
                &device,
                &x.grad(&grads).unwrap().into_data(),
                &expected("input.x"),
            );
            assert_gradient(
                &name,
                &device,
                &norm.weight.val().grad(&grads).unwrap().into_data(),
                &expected("weight.weight"),
            );
        }
    }
}

#[test]
fn localized_filtering_agrees_with_the_reference() {
    for (name, case) in component_cases("lfa_") {
        let fixture = component(&name);
        let config = YuanConfig {
            hidden_size: count(&case, "hidden"),
            filter_bias: case["bias"].as_bool().unwrap(),
            norm_epsilon: case["output_norm_eps"].as_f64().unwrap(),
            ..YuanConfig::tiny(96)
        };
        let sources = sources_under(
            &config,
            "blocks.0.attention.filter.",
            "model.layers.0.self_attn.lf_gate.",
        );
        for (backend, device) in devices() {
            let (name, device) = (format!("{backend} {name}"), device.autodiff());
            let filter =
                fill(LocalizedFilter::new(&config, &device), &sources, &fixture, "weight.");
            let x = fixture.tensor::<3>("input.x", &device).require_grad();
            let middle = filter.conv1.forward(x.clone());
            assert_near(&format!("{name} conv1"), &middle, fixture.host("mid.conv1"), Activation);
            assert_near(
                &format!("{name} conv2"),
                &filter.conv2.forward(middle),
                fixture.host("mid.conv2"),
                Activation,
            );
            let y = filter.forward(x.clone());
            assert_near(&name, &y, fixture.host("output.y"), Activation);
            let loss = (y * fixture.tensor("loss_coef", &device)).sum();
            check_gradients(&name, &filter, &x, loss, &fixture, &sources);
        }
    }
}

#[test]
fn rotary_embedding_agrees_with_the_reference() {
    let meta = component_cases("rotary").into_iter().find(|(name, _)| name == "rotary").unwrap().1;
    let fixture = component("rotary");
    for (backend, device) in devices() {
        let device = device.autodiff();
        for (case, numbers) in meta.as_object().unwrap() {
            let name = format!("{backend} rotary {case}");
            let base = numbers["rotary_base"].as_f64().unwrap();
            let ours: Vec<f32> =
                frequencies(count(numbers, "rotary_dim"), base).iter().map(|&f| f as f32).collect();
            assert_frequencies(&name, &ours, &fixture.host(&format!("{case}.inv_freq")).values);
            let positions = fixture.int::<2>(&format!("{case}.position_ids"), &device).float();
            let rotary = Rotary::from_frequencies(&ours, positions);
            let x = fixture.tensor::<4>(&format!("{case}.input.t"), &device).require_grad();
            let y = rotary.rotate(x.clone());
            assert_near(&name, &y, fixture.host(&format!("{case}.output.t")), Activation);
            let grads =
                (y * fixture.tensor(&format!("{case}.loss_coef"), &device)).sum().backward();
            let expected =
                fixture.tensor::<4>(&format!("{case}.grad.input.t"), &device).into_data();
            assert_gradient(&name, &device, &x.grad(&grads).unwrap().into_data(), &expected);
        }
    }
}

#[test]
fn the_yarn_variant_agrees_with_the_reference() {
    let meta = component_cases("rotary_yarn").remove(0).1;
    let fixture = component("rotary_yarn");
    for (case, numbers) in meta.as_object().unwrap() {
        let name = format!("yarn {case}");
        let (width, base) = (count(numbers, "dim"), numbers["base"].as_f64().unwrap());
        let original = count(numbers, "original_max_position_embeddings");
        let ramp: Vec<f32> = yarn_ramp(width, base, original).iter().map(|&g| g as f32).collect();
        let worst =
            support::largest_difference(&ramp, &fixture.host(&format!("{case}.ramp")).values);
        assert!(worst <= 1e-6, "{name}: ramp differs by {worst:e}");
        let scale = numbers["scale"].as_f64().unwrap();
        let ours: Vec<f32> =
            yarn_frequencies(width, base, original, scale).iter().map(|&f| f as f32).collect();
        assert_frequencies(&name, &ours, &fixture.host(&format!("{case}.inv_freq")).values);

        // The reference's table repeats every angle for the second half. Far positions amplify the
        // last bit of a frequency, so cosines are compared where angles are still exact.
        let positions = fixture.ints(&format!("{case}.positions"));
        let near: Vec<usize> = (0..positions.len()).filter(|&i| positions[i] < 1000).collect();
        for (_, device) in devices() {
            let row: Vec<f32> = near.iter().map(|&i| positions[i] as f32).collect();
            let row = Tensor::<2>::from_data(TensorData::new(row, [1, near.len()]), &device);
            let rotary = Rotary::from_frequencies(&ours, row);
            for (table, key) in [(rotary.cos(), "cos"), (rotary.sin(), "sin")] {
                let expected = fixture.host(&format!("{case}.{key}"));
                let table = support::values(&table.into_data());
                for (n, &i) in near.iter().enumerate() {
                    let ours = &table[n * width / 2..(n + 1) * width / 2];
                    let worst = support::largest_difference(
                        ours,
                        &expected.values[i * width..i * width + width / 2],
                    );
                    assert!(
                        worst <= 1e-4,
                        "{name}: {key} at {} differs by {worst:e}",
                        positions[i]
                    );
                }
            }
        }
    }
}

fn assert_frequencies(name: &str, ours: &[f32], expected: &[f32]) {
    assert_eq!(ours.len(), expected.len(), "{name}: number of frequencies");
    for (ours, expected) in ours.iter().zip(expected) {
        assert!((ours / expected - 1.0).abs() <= 1e-6, "{name}: {ours} is not {expected}");
    }
}

#[test]
fn attention_agrees_with_the_reference() {
    for (name, case) in component_cases("attention_") {
        let fixture = component(&name);
        let config = YuanConfig {
            hidden_size: count(&case, "hidden"),
            num_attention_heads: count(&case, "heads"),
            attention_projection_size: count(&case, "attention_projection_size"),
            rotary_base: case["rotary_base"].as_f64().unwrap(),
            rotary_percent: case["rotary_percent"].as_f64().unwrap(),
            filter_bias: case["use_lfa_bias"].as_bool().unwrap(),
            ..YuanConfig::tiny(96)
        };
        assert_eq!(config.rotary_width(), count(&case, "rotary_dim"));
        let sources = sources_under(&config, "blocks.0.attention.", "model.layers.0.self_attn.");
        for (backend, device) in devices() {
            let (name, device) = (format!("{backend} {name}"), device.autodiff());
            let attention = fill(Attention::new(&config, &device), &sources, &fixture, "weight.");
            let x = fixture.tensor::<3>("input.x", &device).require_grad();
            let positions = fixture.int("input.position_ids", &device);
            let rotary = Rotary::new(&config, Some(positions), x.dims()[1], &device);

            let filtered = attention.filter.as_ref().unwrap().forward(x.clone());
            assert_near(&format!("{name} lfa"), &filtered, fixture.host("mid.lfa"), Activation);
            let qkv = attention.query_key_value(x.clone(), &rotary);
            assert_near(
                &format!("{name} query"),
                &qkv.query,
                fixture.host("mid.q_rot"),
                Activation,
            );
            assert_near(&format!("{name} key"), &qkv.key, fixture.host("mid.k_rot"), Activation);
            assert_near(&format!("{name} value"), &qkv.value, fixture.host("mid.v"), Activation);
            let [q, k, v] = [qkv.query, qkv.key, qkv.value].map(|x| x.swap_dims(1, 2));
            let context = ops::causal_attention(q, k, v, None).swap_dims(1, 2);
            assert_near(
                &format!("{name} context"),
                &context,
                fixture.host("mid.context"),
                Activation,
            );

            let y = attention.forward(x.clone(), &rotary, None);
            assert_near(&name, &y, fixture.host("output.y"), Activation);
            let loss = (y * fixture.tensor("loss_coef", &device)).sum();
            check_gradients(&name, &attention, &x, loss, &fixture, &sources);
        }
    }
}

fn router_type(case: &Value) -> RouterType {
    if case["router_type"] == "attn_router" { RouterType::Attention } else { RouterType::Linear }
}

#[test]
fn routers_agree_with_the_reference() {
    for (name, case) in component_cases("router_") {
        let fixture = component(&name);
        let config = YuanConfig {
            hidden_size: count(&case, "hidden"),
            experts_per_layer: vec![count(&case, "experts")],
            top_k: count(&case, "top_k"),
            router_type: router_type(&case),
            ..YuanConfig::tiny(96)
        };
        let sources = sources_under(&config, "blocks.0.moe.router.", "model.layers.0.mlp.router.");
        for (backend, device) in devices() {
            let (name, device) = (format!("{backend} {name}"), device.autodiff());
            let router = fill(Router::new(&config, 0, &device), &sources, &fixture, "weight.");
            let x = fixture.tensor::<2>("input.x", &device).require_grad();
            let routing = router.forward(x.clone(), None);
            assert_near(&name, &routing.logits, fixture.host("output.logits"), Activation);
            assert_near(&name, &routing.weights, fixture.host("output.topk_weights"), Activation);
            assert_eq!(ints(routing.experts), fixture.ints("output.topk_indices"), "{name}");
            let loss = (routing.logits * fixture.tensor("loss_coef.logits", &device)).sum()
                + (routing.weights * fixture.tensor("loss_coef.topk_weights", &device)).sum();
            check_gradients(&name, &router, &x, loss, &fixture, &sources);
        }
    }
}

#[test]
fn mixtures_of_experts_agree_with_the_reference() {
    for (name, case) in component_cases("moe_") {
        let fixture = component(&name);
        let config = YuanConfig {
            hidden_size: count(&case, "hidden"),
            expert_hidden_size: count(&case, "ffn"),
            experts_per_layer: vec![count(&case, "experts")],
            top_k: count(&case, "top_k"),
            router_type: router_type(&case),
            ..YuanConfig::tiny(96)
        };
        let sources = sources_under(&config, "blocks.0.moe.", "model.layers.0.mlp.");
        for (backend, device) in devices() {
            let (name, device) = (format!("{backend} {name}"), device.autodiff());
            let moe = fill(MoeLayer::new(&config, 0, &device), &sources, &fixture, "weight.");
            let x = fixture.tensor::<3>("input.x", &device).require_grad();
            let output = moe.forward(x.clone(), MoeOptions::default());
            assert_near(&name, &output.hidden, fixture.host("output.y"), Activation);
            assert_eq!(
                ints(output.tokens_per_expert),
                fixture.ints("mid.tokens_per_expert"),
                "{name}"
            );
            let loss = (output.hidden * fixture.tensor("loss_coef", &device)).sum();
            check_gradients(&name, &moe, &x, loss, &fixture, &sources);
        }
    }
}

fn ints<const D: usize>(tensor: Tensor<D, Int>) -> Vec<i64> {
    tensor.into_data().convert::<i64>().iter::<i64>().collect()
}

/// Runs one layer at a time and compares everything the reference recorded on the way.
fn check_layers(name: &str, model: &YuanModel, io: &Fixture, device: &Device) {
    let input_ids = io.int::<2>("input_ids", device);
    let seq = input_ids.dims()[1];
    let rotary = Rotary::new(model.config(), Some(io.int("position_ids", device)), seq, device);
    let embedded = model.embedding.forward(input_ids.clone()).detach().require_grad();
    let mut x = embedded.clone();
    let near = |what: String, ours: &Tensor<3>| {
        assert_near(&format!("{name} {what}"), ours, io.host(&what), Activation);
    };
    near("hidden_states.0".into(), &x);
    for (l, block) in model.blocks.iter().enumerate() {
        let u = block.attention_norm.forward(x.clone());
        near(format!("lfa.{l}"), &block.attention.filter.as_ref().unwrap().forward(u.clone()));
        let qkv = block.attention.query_key_value(u.clone(), &rotary);
        for (ours, key) in [(&qkv.query, "q_rot"), (&qkv.key, "k_rot"), (&qkv.value, "v")] {
            assert_near(
                &format!("{name} {key}.{l}"),
                ours,
                io.host(&format!("{key}.{l}")),
                Activation,
            );
        }
        near(format!("attn_out.{l}"), &block.attention.forward(u, &rotary, None));

        let after = block.forward(x.clone(), &rotary, None, MoeOptions::default());
        assert_eq!(
            after.tokens_per_expert.into_data().convert::<i64>().iter::<i64>().collect::<Vec<_>>(),
            io.ints(&format!("tokens_per_expert.{l}")),
            "{name} tokens_per_expert.{l}"
        );
        let attended =
            x.clone() + block.attention.forward(block.attention_norm.forward(x), &rotary, None);
        let z = block.moe_norm.forward(attended);
        near(format!("mlp_out.{l}"), &block.moe.forward(z.clone(), MoeOptions::default()).hidden);
        let [batch, seq, hidden] = z.dims();
        let routing = block.moe.router.forward(z.reshape([batch * seq, hidden]), None);
        let [_, top_k] = routing.experts.dims();
        assert_eq!(
            ints(routing.experts),
            io.ints(&format!("topk_indices.{l}")),
            "{name} topk_indices.{l}"
        );
        near(format!("topk_weights.{l}"), &routing.weights.reshape([batch, seq, top_k]));
        let experts = routing.logits.dims()[1];
        near(format!("router_logits.{l}"), &routing.logits.reshape([batch, seq, experts]));
        x = after.hidden;
        near(format!("hidden_states.{}", l + 1), &x);
    }
    let normed = model.final_norm.forward(x);
    near("final_norm".into(), &normed);
    let grads = next_token_loss(model.logits(normed), input_ids).backward();
    let expected = io.tensor::<3>("grad_hidden_states.0", device).into_data();
    assert_gradient(
        &format!("{name} embedded"),
        device,
        &embedded.grad(&grads).unwrap().into_data(),
        &expected,
    );
}

fn next_token_loss(logits: Tensor<3>, input_ids: Tensor<2, Int>) -> Tensor<1> {
    let [_, seq, _] = logits.dims();
    let labels = input_ids.slice_dim(1, 1..seq);
    masked_mean(token_losses(logits.slice_dim(1, 0..seq - 1), labels), None)
}

fn check_model(directory: &str) {
    let io = Fixture::load(&format!("{directory}/io.safetensors"));
    for (backend, device) in devices() {
        let (name, device) = (format!("{backend} {directory}"), device.autodiff());
        let model = reference_model(directory, &device);
        check_layers(&name, &model, &io, &device);

        let input_ids = io.int::<2>("input_ids", &device);
        let options = ForwardOptions {
            position_ids: Some(io.int("position_ids", &device)),
            ..ForwardOptions::default()
        };
        let output = model.forward(input_ids.clone(), options);
        assert_near(&format!("{name} logits"), &output.logits, io.host("logits"), Activation);
        let without_positions = model.forward(input_ids.clone(), ForwardOptions::default());
        assert_near(
            &format!("{name} logits"),
            &without_positions.logits,
            io.host("logits"),
            Activation,
        );
        for (l, load) in output.tokens_per_expert.into_iter().enumerate() {
            assert_eq!(ints(load), io.ints(&format!("tokens_per_expert.{l}")), "{name}");
        }
        let loss = next_token_loss(output.logits, input_ids);
        let difference = (loss.clone().into_scalar::<f32>() - io.scalar("loss")).abs();
        assert!(
            difference <= tolerance(Loss, &device, DType::F32),
            "{name}: loss differs by {difference:e}"
        );
        let found = gradients(&model, &loss.backward());
        for source in model.config().parameter_sources() {
            let ours = &found[&source.path];
            assert_gradient(
                &format!("{name} {}", source.path),
                &device,
                ours,
                &assemble(&source, &io, "grads."),
            );
        }
        check_packed(&name, &model, &io, &device);
    }
}

/// Several documents in one row: positions restart, attention does not, the mask covers the
/// answers.
fn check_packed(name: &str, model: &YuanModel, io: &Fixture, device: &Device) {
    let tokens =
        |key: &str| -> Vec<u32> { io.ints(key).iter().map(|&token| token as u32).collect() };
    let special = &model.config().tokens;
    let (eod, sep) = (special.eod.unwrap(), special.sep.unwrap());
    let (row, inputs, labels) =
        (tokens("packed.tokens"), tokens("packed.input_ids"), tokens("packed.labels"));
    assert_eq!((&inputs[..], &labels[..]), (&row[..row.len() - 1], &row[1..]), "{name}");
    let positions = masks::document_position_ids(&inputs, eod);
    assert_eq!(positions, tokens("packed.position_ids"), "{name}: packed position ids");
    let mask: Vec<f32> =
        masks::answer_mask(&labels, eod, sep).unwrap().iter().map(|&m| f32::from(m)).collect();
    assert_eq!(mask, io.host("packed.loss_mask").values, "{name}: packed loss mask");

    let options = ForwardOptions {
        position_ids: Some(io.int("packed.position_ids", device)),
        ..ForwardOptions::default()
    };
    let output = model.forward(io.int("packed.input_ids", device), options);
    assert_near(
        &format!("{name} packed logits"),
        &output.logits,
        io.host("packed.logits"),
        Activation,
    );
    let losses = token_losses(output.logits, io.int("packed.labels", device));
    assert_near(&format!("{name} packed token loss"), &losses, io.host("packed.token_loss"), Loss);
    let loss = masked_mean(losses, Some(io.tensor("packed.loss_mask", device)));
    // The way that training takes, over layers, has the same loss; its gradients are compared.
    let tensor = |name: &str| io.int(name, device);
    let learnt: Vec<bool> = mask.iter().map(|&learnt| learnt == 1.0).collect();
    let no_padding = vec![false; learnt.len()];
    let batch = Batch::new(
        tensor("packed.input_ids"),
        tensor("packed.labels"),
        tensor("packed.position_ids"),
    )
    .with_mask(LossMask::new(&[learnt], &[no_padding], device));
    let trained = model.loss(batch, BalanceLosses::default(), FloatDType::F32).loss;
    let apart = (trained.clone().into_scalar::<f32>() - loss.into_scalar::<f32>()).abs();
    assert!(apart <= 1e-6, "{name}: the loss of training differs by {apart:e}");
    let loss = trained;
    let difference = (loss.clone().into_scalar::<f32>() - io.scalar("packed.loss")).abs();
    assert!(
        difference <= tolerance(Loss, device, DType::F32),
        "{name}: packed loss differs by {difference:e}"
    );
    let found = gradients(model, &loss.backward());
    let mut compared = 0;
    for source in model.config().parameter_sources() {
        if source.names.iter().all(|tensor| io.has(&format!("packed.grads.{tensor}"))) {
            let expected = assemble(&source, io, "packed.grads.");
            assert_gradient(
                &format!("{name} packed {}", source.path),
                device,
                &found[&source.path],
                &expected,
            );
            compared += 1;
        }
    }
    assert!(compared > 5, "{name}: the reference has packed gradients");
}

#[test]
fn flash_with_attention_router_filter_bias_and_half_rotary_agrees_with_the_reference() {
    check_model("flash_tiny");
}

#[test]
fn ultra_with_linear_router_and_uneven_layers_agrees_with_the_reference() {
    check_model("ultra_tiny");
}

#[test]
fn masks_and_positions_agree_with_the_reference() {
    let text = std::fs::read_to_string(reference().join("component/masks.json")).unwrap();
    let root: Value = serde_json::from_str(&text).unwrap();
    let id = |name: &str| root["token_ids"][name].as_u64().unwrap() as u32;
    let (eod, sep) = (id("eod"), id("sep"));
    let markers = ImageMarkers {
        bos: id("bos"),
        eod,
        pad: id("pad"),
        sep,
        image_start: id("image_start"),
        image_end: id("image_end"),
    };
    for case in root["cases"].as_array().unwrap() {
        let list = |key: &str| -> Vec<u32> {
            case[key].as_array().into_iter().flatten().map(|n| n.as_f64().unwrap() as u32).collect()
        };
        let (inputs, what) = (list("input_ids"), format!("{} {}", case["source"], case["pattern"]));
        let mut positions = Some(masks::document_position_ids(&inputs, eod));
        let mask = match case["source"].as_str().unwrap() {
            "megatron text path" => masks::answer_mask(&list("labels"), eod, sep).unwrap(),
            "megatron image path" => {
                positions = Some(masks::image_row_position_ids(&inputs, &markers));
                masks::image_row_mask(&inputs, &markers)
            }
            "hf get_loss_mask" => {
                positions = None;
                masks::hugging_face_mask(&inputs, eod, sep)
            }
            source if source.starts_with("megatron generic") => masks::border_mask(&inputs, eod),
            other => panic!("unknown source {other}"),
        };
        let mask: Vec<u32> = mask.iter().map(|&m| u32::from(m)).collect();
        assert_eq!(mask, list("loss_mask"), "{what}");
        if let Some(positions) = positions {
            assert_eq!(positions, list("position_ids"), "{what}");
        }
    }
    assert!(
        masks::answer_mask(&[10, eod, 11, eod, sep], eod, sep).is_err(),
        "more ends than separators"
    );
}
