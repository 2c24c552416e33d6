//! A model that sees: its directory, its text, and its images one by one and in batches.

mod support;

use std::{fs, ops::ControlFlow, path::Path};

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use serde_json::Value;
use support::{
    Kind::Activation,
    assert_near,
    multimodal::{Tensors, multimodal, read, write},
};
use tempfile::TempDir;
use yuan_model::{
    Cache, ForwardOptions, GenerateError, GenerationOptions, ModelError, PrunableExperts,
    YuanConfig, YuanModel,
    generate::{Generation, ImageRows, Prompt},
    hf::{HfCheckpoint, LoadOptions, SaveOptions},
    masks::{ImageMarkers, image_row_position_ids},
    vision::{ImagePositions, Picture, put_in_place},
};

fn load(directory: &Path) -> YuanModel {
    let checkpoint = HfCheckpoint::open(directory).unwrap();
    checkpoint.load(&Device::flex(), &LoadOptions::default()).unwrap()
}

fn config_of(directory: &Path) -> Value {
    serde_json::from_slice(&fs::read(directory.join("config.json")).unwrap()).unwrap()
}

#[test]
fn a_multimodal_directory_is_written_as_it_was_read() {
    let temp = TempDir::new().unwrap();
    let from = multimodal(&temp);
    let [saved, copy, pruned, half, renamed, language] =
        ["saved", "copy", "pruned", "half", "renamed", "alone"].map(|name| temp.path().join(name));
    let tensors = read(&from);
    let checkpoint = HfCheckpoint::open(&from).unwrap();
    assert_eq!(checkpoint.extras().count(), 0);
    let model = load(&from);
    assert_eq!(model.num_parameters(), model.config().parameter_count().total());
    model.save_hf(&saved, &SaveOptions::default()).unwrap();
    assert!(read(&saved) == tensors, "through the model");
    assert_eq!(HfCheckpoint::open(&saved).unwrap().config(), checkpoint.config());
    let (ours, upstream) = (config_of(&saved), config_of(&from));
    for key in upstream.as_object().unwrap().keys().filter(|key| *key != "llm_config") {
        if key == "vision_config" {
            // But for what only PyTorch wants to know.
            for (key, value) in upstream[key].as_object().unwrap() {
                let is_of_torch = ["use_flash_attn", "torch_dtype"].contains(&key.as_str());
                assert!(is_of_torch || &ours["vision_config"][key] == value, "{key}");
            }
        } else {
            assert_eq!(ours[key], upstream[key], "{key}");
        }
    }
    checkpoint.rewrite(&copy, None, &SaveOptions::default()).unwrap();
    assert!(read(&copy) == tensors, "past the model");
    assert_eq!(config_of(&copy), config_of(&from));

    // A prune leaves the tower alone, and the pruned directory loads as the pruned model.
    let kept = [vec![5, 0, 3], vec![7, 6, 2, 1]];
    checkpoint.rewrite(&pruned, Some(&kept), &SaveOptions::default()).unwrap();
    let (cut, _) = load(&from).keep_experts(&kept).unwrap();
    cut.save_hf(&saved, &SaveOptions { overwrite: true, ..SaveOptions::default() }).unwrap();
    assert!(read(&pruned) == read(&saved));

    let options = SaveOptions { dtype: Some(FloatDType::BF16), ..SaveOptions::default() };
    checkpoint.rewrite(&half, None, &options).unwrap();
    assert_eq!(config_of(&half)["vision_config"]["torch_dtype"], "bfloat16");
    assert!(read(&half).values().all(|(dtype, ..)| *dtype == safetensors::Dtype::BF16));

    // Names of newer exports.
    let rename = |name: &str| match name.strip_prefix("language_model.") {
        Some("lm_head.weight") => "lm_head.weight".to_owned(),
        Some(rest) => rest.replacen("model.", "model.language_model.", 1),
        None => format!("model.{name}"),
    };
    let newer = tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect();
    write(&renamed, &config_of(&from), &newer);
    load(&renamed)
        .save_hf(&saved, &SaveOptions { overwrite: true, ..SaveOptions::default() })
        .unwrap();
    assert!(read(&saved) == tensors, "names of newer exports");

    // The language model alone: of the whole directory, and of one that holds nothing else.
    let alone = HfCheckpoint::open_language(&from).unwrap();
    assert!(alone.extras().count() > 30);
    let alone = alone.load(&Device::flex(), &LoadOptions::default()).unwrap();
    assert!(alone.images.is_none() && alone.config().images.is_none());
    let of_language = |name: &String| name.starts_with("language_model.");
    let only = tensors.clone().into_iter().filter(|(name, _)| of_language(name)).collect();
    write(&language, &config_of(&from), &only);
    assert!(load(&language).images.is_none());
}

#[test]
fn what_is_wrong_with_an_image_tower_is_named() {
    let temp = TempDir::new().unwrap();
    let from = multimodal(&temp);
    let refused = |edit: &dyn Fn(&mut Value, &mut Tensors)| {
        let (mut config, mut tensors) = (config_of(&from), read(&from));
        edit(&mut config, &mut tensors);
        let changed = temp.path().join("changed");
        write(&changed, &config, &tensors);
        let error = HfCheckpoint::open(&changed).unwrap_err().to_string();
        error.replace(&changed.display().to_string(), "DIR")
    };
    let name = "vision_model.encoder.layers.1.ls2";
    let missing = refused(&|_, tensors| drop(tensors.remove(name)));
    assert_eq!(missing, format!("DIR: `{name}` is missing"));
    let surplus = refused(&|config, _| config["vision_config"]["num_hidden_layers"] = 1.into());
    assert!(surplus.contains("`vision_model.encoder.layers.1.ls2` is no parameter"), "{surplus}");
    for (edit, expected) in [
        (("select_layer", Value::from(-4)), "select_layer = -4 is not supported"),
        (("img_context_token_id", Value::from(96)), "img_context_token_id = 96 is outside"),
        (("img_context_token_id", Value::Null), "no `img_context_token_id`"),
        (("force_image_size", Value::from(56)), "force_image_size = 56 contradicts"),
        (("max_dynamic_patch", Value::from(0)), "max_dynamic_patch must be at least 1"),
        (("ps_version", Value::from("v1")), "ps_version = \"v1\" is not supported"),
        (("min_dynamic_patch", Value::from(2)), "min_dynamic_patch = 2 is not supported"),
        (("image_positions", Value::from("left")), "`left` is neither increasing nor together"),
        (("max_dynamic_patch", Value::from("x")), "max_dynamic_patch = \"x\" is no count"),
    ] {
        let error = refused(&|config, _| config[edit.0] = edit.1.clone());
        assert!(error.contains(expected), "{error}");
    }
    for (key, value, expected) in [
        ("hidden_act", Value::from("relu"), "hidden_act = \"relu\" is not supported"),
        ("patch_size", Value::from(5), "image_size = 28 must be an even number of patches"),
        ("hidden_size", Value::Null, "vision_config: invalid type: null"),
        ("num_attention_heads", Value::from(5), "num_attention_heads = 5 must divide"),
        ("intermediate_size", Value::from(1_u64 << 40), "is beyond any image tower"),
        ("num_channels", Value::from(4), "num_channels = 4 must be 3"),
        ("layer_norm_eps", Value::from(-1e-6), "layer_norm_eps = -0.000001 must lie between"),
        ("layer_norm_eps", Value::from(1e9), "layer_norm_eps = 1000000000 must lie between"),
    ] {
        let error = refused(&|config, _| config["vision_config"][key] = value.clone());
        assert!(error.contains(expected), "{error}");
    }
}

/// A picture of this shape; the number makes it another one.
fn picture(number: usize, width: usize, height: usize) -> Picture {
    let value = |i: usize| ((i * (37 + 2 * number) + i / 7 * 11 + number * 91) % 256) as u8;
    Picture::new(width, height, (0..3 * width * height).map(value).collect()).unwrap()
}

const MARKERS: ImageMarkers =
    ImageMarkers { bos: 1, eod: 2, pad: 3, sep: 4, image_start: 6, image_end: 7 };

/// A prompt with images and a question of so many tokens.
fn prompt(model: &YuanModel, pictures: &[Picture], question: usize) -> (Vec<u32>, ImageRows) {
    let images = model.config().images.as_ref().unwrap();
    let side = images.tower.image_size;
    let mut tokens = vec![MARKERS.bos];
    let mut tiles = Vec::new();
    for picture in pictures {
        let of_picture = picture.tiles(side, if pictures.len() > 1 { 4 } else { 9 });
        tokens.push(MARKERS.image_start);
        let rows = of_picture.len() * images.tower.tokens_per_tile();
        tokens.extend(vec![images.placeholder; rows]);
        tokens.push(MARKERS.image_end);
        tiles.extend(of_picture);
    }
    tokens.extend((0..question as u32).map(|i| 10 + i * 7 % 80));
    tokens.push(MARKERS.sep);
    (tokens, model.see(&tiles).unwrap())
}

fn generate(model: &YuanModel, prompts: &[Prompt], options: &GenerationOptions) -> Vec<Generation> {
    model.generate(prompts, options, |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn text_out_of_images_is_that_of_the_full_pass() {
    let temp = TempDir::new().unwrap();
    let model = load(&multimodal(&temp));
    let device = Device::flex();
    let (tokens, rows) = prompt(&model, &[picture(0, 60, 31), picture(1, 20, 20)], 5);
    for positions in [ImagePositions::Increasing, ImagePositions::Together] {
        let options = GenerationOptions {
            max_new_tokens: 8,
            image_positions: positions,
            ..GenerationOptions::default()
        };
        let given = [Prompt::with_images(tokens.clone(), rows.clone())];
        let generated = &generate(&model, &given, &options)[0].tokens;
        let all: Vec<u32> = tokens.iter().chain(generated).copied().collect();
        let place = |of: &dyn Fn(u32) -> bool| -> Vec<usize> {
            (0..all.len()).filter(|&at| of(all[at])).collect()
        };
        let ids = TensorData::new(all.iter().map(|&id| i64::from(id)).collect(), [1, all.len()]);
        let ids = Tensor::<2, Int>::from_data(ids, &device);
        let positions = match positions {
            ImagePositions::Increasing => (0..all.len() as u32).collect(),
            ImagePositions::Together => image_row_position_ids(&all, &MARKERS),
        };
        let positions: Vec<i64> = positions.into_iter().map(i64::from).collect();
        let positions =
            Tensor::<2, Int>::from_data(TensorData::new(positions, [1, all.len()]), &device);
        // The images' rows take the places that the prompt has for them.
        let text = model.embed(ids.clone(), None);
        let embedded = put_in_place(text, &place(&|id| id == MARKERS.pad)[..rows.len()], {
            rows.rows().clone()
        });
        let batch = yuan_model::Batch::new(ids.clone(), ids, positions);
        let inputs = model.inputs(batch);
        let mut x = embedded.unwrap();
        for layer in 0..model.blocks.len() {
            x = model.layer(layer, x, &inputs, Default::default()).hidden;
        }
        let logits = model.logits(model.final_norm.forward(x));
        let likeliest = logits.argmax(2).into_data().iter::<i64>().collect::<Vec<_>>();
        let expected: Vec<u32> =
            (tokens.len() - 1..all.len() - 1).map(|at| likeliest[at] as u32).collect();
        assert_eq!(*generated, expected);
    }
}

#[test]
fn prompts_with_other_images_do_not_meddle_and_the_tower_runs_once() {
    let temp = TempDir::new().unwrap();
    let model = load(&multimodal(&temp));
    let options = GenerationOptions { max_new_tokens: 6, ..GenerationOptions::default() };
    let (wide, of_wide) = prompt(&model, &[picture(2, 120, 30)], 3);
    let (two, of_two) = prompt(&model, &[picture(3, 28, 28), picture(4, 40, 90)], 9);
    let prompts = [
        Prompt::with_images(wide.clone(), of_wide.clone()),
        Prompt::from(vec![1, 20, 30, 4]),
        Prompt::with_images(two, of_two),
    ];
    for positions in [ImagePositions::Increasing, ImagePositions::Together] {
        let options = GenerationOptions { image_positions: positions, ..options.clone() };
        let alone: Vec<Generation> = prompts
            .iter()
            .map(|prompt| generate(&model, std::slice::from_ref(prompt), &options).remove(0))
            .collect();
        assert_eq!(generate(&model, &prompts, &options), alone);
    }
    // A second question: its rows are those of the first one, and no tower is there to make others.
    let mut blind = model.clone();
    blind.images = None;
    let mut second = wide;
    second.extend([40, 41, 42]);
    let second = [Prompt::with_images(second, of_wide)];
    assert_eq!(generate(&blind, &second, &options), generate(&model, &second, &options));
    // Other images make another text.
    let (_, other) = prompt(&model, &[picture(5, 120, 30)], 3);
    let rows = |rows: &ImageRows| rows.rows().clone().into_data();
    let (_, first) = prompt(&model, &[picture(2, 120, 30)], 3);
    assert_ne!(rows(&other), rows(&first));
    // All tiles together or a few at a time: the same rows.
    let tiles: Vec<Picture> = (0..19).map(|number| picture(number, 28, 28)).collect();
    let each = tiles.iter().map(|tile| model.see(std::slice::from_ref(tile)).unwrap());
    let each = Tensor::cat(each.map(|rows| rows.rows().clone()).collect(), 0);
    let expected = support::HostTensor {
        shape: each.dims().to_vec(),
        values: support::values(&each.into_data()),
    };
    assert_near("tiles", model.see(&tiles).unwrap().rows(), &expected, Activation);
}

#[test]
fn images_that_do_not_fit_are_refused() {
    let temp = TempDir::new().unwrap();
    let model = load(&multimodal(&temp));
    let (tokens, rows) = prompt(&model, &[picture(0, 28, 28)], 2);
    let refused = |model: &YuanModel, tokens: &[u32]| -> GenerateError {
        let given = [Prompt::with_images(tokens.to_vec(), rows.clone())];
        let go = |_| ControlFlow::Continue(());
        model.generate(&given, &GenerationOptions::default(), go).unwrap_err()
    };
    assert_eq!(
        refused(&model, &tokens[3..]).to_string(),
        "prompt 0: the text has 3 places for image rows, but there are 4"
    );
    let text = YuanModel::new(&YuanConfig::tiny(96), &Device::flex()).unwrap();
    let sentence = "the model sees no images: it has no image tower";
    assert_eq!(refused(&text, &tokens).to_string(), format!("prompt 0: {sentence}"));
    assert_eq!(text.see(&[picture(0, 28, 28)]).unwrap_err().to_string(), sentence);
    assert!(matches!(model.see(&[]), Err(ModelError::NoTile)));
}

/// Placeholders in a text without images are tokens like any other.
#[test]
fn a_model_that_sees_reads_text_as_its_language_model_does() {
    let temp = TempDir::new().unwrap();
    let from = multimodal(&temp);
    let alone = HfCheckpoint::open_language(&from).unwrap();
    let alone = alone.load(&Device::flex(), &LoadOptions::default()).unwrap();
    let ids = Tensor::<2, Int>::from_data([[1, 3, 3, 20, 30, 4]], &Device::flex());
    let logits = |model: &YuanModel| {
        model.forward(ids.clone(), ForwardOptions::default()).logits.into_data()
    };
    assert_eq!(logits(&load(&from)), logits(&alone));
    let mut cache = Cache::new(2, vec![0], 6);
    let hidden = load(&from).forward_cached(ids.clone(), &mut cache).hidden;
    assert_eq!(hidden.dims(), [1, 6, 24]);
}
