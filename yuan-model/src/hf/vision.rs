//! Names, layout and configuration of an image tower and its projector.

use serde_json::{Value, json};

use super::{ParameterSource, TensorLayout};
use crate::{
    ConfigError, YuanConfig,
    vision::{ImageConfig, ImagePositions, VisionNormType},
};

/// The parameters of the image tower and its projector, in the order of the model.
pub(super) fn image_sources(images: &ImageConfig, language: &YuanConfig) -> Vec<ParameterSource> {
    use TensorLayout::{Same, Transposed};
    let tower = &images.tower;
    let (width, inner, patch) = (tower.hidden_size, tower.intermediate_size, tower.patch_size);
    let mut sources = Vec::new();
    let mut add = |path: &str, name: &str, shape: &[usize], layout| {
        sources.push(ParameterSource::whole(&format!("images.{path}"), name, shape, layout));
    };
    let embeddings = "vision_model.embeddings";
    let convolution = [width, tower.num_channels, patch, patch];
    let patches = format!("{embeddings}.patch_embedding");
    add("tower.patch.weight", &format!("{patches}.weight"), &convolution, Transposed);
    add("tower.patch.bias", &format!("{patches}.bias"), &[width], Same);
    let places = tower.grid().pow(2) + 1;
    for (table, shape) in [("class_embedding", [1, 1]), ("position_embedding", [1, places])] {
        let shape = [shape[0], shape[1], width];
        add(&format!("tower.{table}"), &format!("{embeddings}.{table}"), &shape, Same);
    }
    for layer in 0..tower.num_hidden_layers {
        let mut add = |path: &str, name: &str, shape: &[usize], layout| {
            let path = format!("tower.blocks.{layer}.{path}");
            let name = format!("vision_model.encoder.layers.{layer}.{name}");
            add(&path, &name, shape, layout);
        };
        let norm = |add: &mut dyn FnMut(&str, &str, &[usize], TensorLayout), norm: &str| {
            let weight = format!("{norm}.weight");
            match tower.norm_type {
                VisionNormType::LayerNorm => {
                    add(&format!("{norm}.layer.gamma"), &weight, &[width], Same);
                    add(&format!("{norm}.layer.beta"), &format!("{norm}.bias"), &[width], Same);
                }
                VisionNormType::RmsNorm => {
                    add(&format!("{norm}.rms.weight"), &weight, &[width], Same);
                }
            }
        };
        norm(&mut add, "norm1");
        add("qkv.weight", "attn.qkv.weight", &[3 * width, width], Transposed);
        if tower.qkv_bias {
            add("qkv.bias", "attn.qkv.bias", &[3 * width], Same);
        }
        if tower.qk_normalization {
            add("q_norm.weight", "attn.q_norm.weight", &[width], Same);
            add("k_norm.weight", "attn.k_norm.weight", &[width], Same);
        }
        add("proj.weight", "attn.proj.weight", &[width, width], Transposed);
        add("proj.bias", "attn.proj.bias", &[width], Same);
        norm(&mut add, "norm2");
        for (linear, from, to) in [("fc1", width, inner), ("fc2", inner, width)] {
            let name = |what: &str| format!("mlp.{linear}.{what}");
            add(&format!("{linear}.weight"), &name("weight"), &[to, from], Transposed);
            add(&format!("{linear}.bias"), &name("bias"), &[to], Same);
        }
        add("ls1", "ls1", &[width], Same);
        add("ls2", "ls2", &[width], Same);
    }
    let (between, hidden) = (language.expert_hidden_size, language.hidden_size);
    for (linear, from, to) in
        [("gate", 4 * width, between), ("up", 4 * width, between), ("down", between, hidden)]
    {
        let name = format!("imagemlp.{linear}_proj.weight");
        add(&format!("projector.{linear}.weight"), &name, &[to, from], Transposed);
    }
    add("projector.norm.weight", "imagemlp_layernorm.weight", &[hidden], Same);
    sources
}

/// The image part of a multimodal `config.json`; none if it has none.
///
/// # Errors
///
/// Keys that are missing, of the wrong kind, or that ask for something this library does not compute.
pub(super) fn images_of(root: &Value) -> Result<Option<ImageConfig>, ConfigError> {
    let Some(vision) = root.get("vision_config").filter(|vision| !vision.is_null()) else {
        return Ok(None);
    };
    let format = |reason: String| ConfigError::Format(format!("vision_config: {reason}"));
    let supported = [
        (root, "select_layer", json!(-1), "the tower's last layer is projected"),
        (root, "downsample_ratio", json!(0.5), "four patches become one row"),
        (root, "dynamic_image_size", json!(true), "images are cut into tiles"),
        (root, "use_thumbnail", json!(true), "the whole image follows its tiles"),
        (root, "min_dynamic_patch", json!(1), "an image may be one tile"),
        (root, "ps_version", json!("v2"), "the four patches of a square lie in the order of v2"),
        (vision, "hidden_act", json!("gelu"), "the tower uses gelu"),
    ];
    for (object, key, value, reason) in supported {
        let found = object.get(key).filter(|found| !found.is_null() && **found != value);
        if let Some(found) = found {
            return Err(ConfigError::Unsupported { key, value: found.to_string(), reason });
        }
    }
    let tower: crate::vision::VisionConfig =
        serde_json::from_value(vision.clone()).map_err(|error| format(error.to_string()))?;
    let count = |key: &str| root.get(key).filter(|value| !value.is_null());
    if let Some(side) = count("force_image_size").filter(|side| **side != json!(tower.image_size)) {
        return Err(ConfigError::Disagreement {
            key: "force_image_size".into(),
            value: side.to_string(),
            other_key: "vision_config.image_size".into(),
            other_value: tower.image_size.to_string(),
        });
    }
    let number = |key: &'static str| match count(key) {
        None => Ok(None),
        Some(value) => {
            let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
            number.map(Some).ok_or_else(|| ConfigError::OutOfRange {
                key,
                value: value.to_string(),
                expected: "is no count",
            })
        }
    };
    let placeholder = number("img_context_token_id")?;
    let placeholder = placeholder.ok_or(ConfigError::Missing("img_context_token_id"))?;
    // Upstream's class has 6, its published models have 9.
    let max_tiles = number("max_dynamic_patch")?.map_or(6, |most| most as usize);
    let positions = match count("image_positions") {
        None => None,
        Some(value) => {
            let rule = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let rule: Result<ImagePositions, String> = rule.parse();
            let named = |reason| ConfigError::Format(format!("image_positions: {reason}"));
            Some(rule.map_err(named)?)
        }
    };
    Ok(Some(ImageConfig { tower, placeholder, max_tiles, positions }))
}

/// The `config.json` of a multimodal model around that of its language model.
pub(super) fn with_images(images: &ImageConfig, language: Value) -> Value {
    let tower = &images.tower;
    let mut vision = json!({
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
    });
    let sizes = serde_json::to_value(tower).unwrap_or_default();
    if let (Some(vision), Value::Object(sizes)) = (vision.as_object_mut(), sizes) {
        vision.extend(sizes);
    }
    let mut root = json!({
        "architectures": ["YuanVLChatModel"],
        "model_type": "yuanvl",
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "yuan-chat",
        "dynamic_image_size": true,
        "use_thumbnail": true,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": images.max_tiles,
        "force_image_size": tower.image_size,
        "img_context_token_id": images.placeholder,
        "tie_word_embeddings": false,
        "vision_config": vision,
        "llm_config": language,
    });
    if let Some(positions) = images.positions {
        root["image_positions"] = json!(positions);
    }
    root
}
