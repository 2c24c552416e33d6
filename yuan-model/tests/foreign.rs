//! Checkpoint directories as other programs and newer versions write them: loaded, or refused in a
//! sentence that says what to do.

use std::{collections::BTreeMap, fs, path::Path};

use burn::tensor::{Device, FloatDType};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use yuan_model::{
    YuanConfig, YuanModel,
    hf::{HfCheckpoint, LoadOptions, SaveOptions},
};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A small model's directory, after `edit` has changed its configuration and tensors.
fn directory(edit: impl FnOnce(&mut Value, &mut Tensors)) -> TempDir {
    let temp = TempDir::new().unwrap();
    let model = YuanModel::new(&YuanConfig::tiny(96), &Device::flex()).unwrap();
    let options = SaveOptions { overwrite: true, ..SaveOptions::default() };
    model.save_hf(temp.path(), &options).unwrap();
    let (mut config, mut tensors) = (config(temp.path()), tensors(temp.path()));
    edit(&mut config, &mut tensors);
    fs::write(temp.path().join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(temp.path().join("model.safetensors"), bytes).unwrap();
    temp
}

fn config(directory: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(directory.join("config.json")).unwrap()).unwrap()
}

fn tensors(directory: &Path) -> Tensors {
    let bytes = fs::read(directory.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(tensor).collect()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The refusal of a directory.
fn refused(directory: &Path) -> String {
    HfCheckpoint::open(directory).unwrap_err().to_string()
}

#[test]
fn a_tensor_without_dimensions_is_copied() {
    let from = directory(|_, tensors| {
        let scalar = (Dtype::F32, Vec::new(), floats(&[1.0]));
        tensors.insert("rotary_pos_emb.scale".into(), scalar);
    });
    let checkpoint = HfCheckpoint::open(from.path()).unwrap();
    let to = TempDir::new().unwrap();
    let kept = vec![vec![0, 3, 5, 6]; 2];
    for (name, experts, dtype) in [
        ("copy", None, None),
        ("pruned", Some(&kept[..]), None),
        ("half", None, Some(FloatDType::F16)),
    ] {
        let (to, options) = (to.path().join(name), SaveOptions { dtype, ..SaveOptions::default() });
        checkpoint.rewrite(&to, experts, &options).unwrap();
        let (_, shape, bytes) = &tensors(&to)["rotary_pos_emb.scale"];
        assert!(shape.is_empty());
        let expected = if dtype.is_some() { vec![0x00, 0x3c] } else { floats(&[1.0]) };
        assert_eq!(bytes, &expected);
    }
    assert_eq!(names(to.path()), ["copy", "half", "pruned"]);
}

#[test]
fn names_of_newer_multimodal_exports_are_understood() {
    let plain = directory(|_, _| {});
    let expected = tensors(plain.path());
    let from = directory(|config, tensors| {
        *config = json!({"model_type": "yuanvl", "llm_config": config.take()});
        *tensors = expected
            .iter()
            .map(|(name, tensor)| {
                (name.replacen("model.", "model.language_model.", 1), tensor.clone())
            })
            .collect();
        let tower = (Dtype::F32, vec![2], floats(&[1.0, 2.0]));
        tensors.insert("model.visual.patch_embed.proj.weight".into(), tower);
    });
    let checkpoint = HfCheckpoint::open(from.path()).unwrap();
    assert_eq!(checkpoint.extras().collect::<Vec<_>>(), ["model.visual.patch_embed.proj.weight"]);
    let model = checkpoint.load(&Device::flex(), &LoadOptions::default()).unwrap();
    let to = TempDir::new().unwrap();
    model.save_hf(&to.path().join("loaded"), &SaveOptions::default()).unwrap();
    assert!(tensors(&to.path().join("loaded")) == expected);
    checkpoint.rewrite(&to.path().join("copy"), None, &SaveOptions::default()).unwrap();
    assert!(tensors(&to.path().join("copy")) == tensors(from.path()));
}

#[test]
fn a_tied_head_is_the_embedding() {
    let from = directory(|config, tensors| {
        config["tie_word_embeddings"] = json!(true);
        tensors.remove("lm_head.weight").unwrap();
    });
    let embedding = &tensors(from.path())["model.embed_tokens.weight"];
    let checkpoint = HfCheckpoint::open(from.path()).unwrap();
    let to = TempDir::new().unwrap();
    let [loaded, copied] = ["loaded", "copied"].map(|name| to.path().join(name));
    let model = checkpoint.load(&Device::flex(), &LoadOptions::default()).unwrap();
    model.save_hf(&loaded, &SaveOptions::default()).unwrap();
    checkpoint.rewrite(&copied, None, &SaveOptions::default()).unwrap();
    for directory in [loaded, copied] {
        assert!(&tensors(&directory)["lm_head.weight"] == embedding);
        assert_eq!(config(&directory)["tie_word_embeddings"], json!(false));
        HfCheckpoint::open(&directory).unwrap();
    }
    // Without the key, a head that is missing is missing.
    let from = directory(|_, tensors| drop(tensors.remove("lm_head.weight")));
    assert!(refused(from.path()).contains("`lm_head.weight` is missing"));
}

#[test]
fn values_that_are_too_large_for_a_type_are_named() {
    let large = "model.norm.weight";
    let from = directory(|_, tensors| {
        let (_, shape, bytes) = tensors.get_mut(large).unwrap();
        *bytes = floats(&vec![1e5; shape[0]]);
        // The largest that is rounded down, and an infinity that was there before.
        let (_, _, bytes) = tensors.get_mut("lm_head.weight").unwrap();
        bytes[..8].copy_from_slice(&floats(&[65519.9, f32::INFINITY]));
    });
    let checkpoint = HfCheckpoint::open(from.path()).unwrap();
    let model = checkpoint.load(&Device::flex(), &LoadOptions::default()).unwrap();
    let to = TempDir::new().unwrap();
    let half = SaveOptions { dtype: Some(FloatDType::F16), ..SaveOptions::default() };
    let expected = "F16 is too narrow for values of `model.norm.weight`: use a wider type";
    for error in [
        checkpoint.rewrite(&to.path().join("a"), None, &half).unwrap_err(),
        model.save_hf(&to.path().join("b"), &half).unwrap_err(),
        checkpoint
            .load(&Device::flex(), &LoadOptions { dtype: half.dtype, ..LoadOptions::default() })
            .unwrap_err(),
    ] {
        assert_eq!(error.to_string(), expected);
    }
    assert!(names(to.path()).is_empty());
    let allowed = SaveOptions { allow_overflow: true, ..half.clone() };
    for (name, saved) in [
        ("a", checkpoint.rewrite(&to.path().join("a"), None, &allowed).unwrap()),
        ("b", model.save_hf(&to.path().join("b"), &allowed).unwrap()),
    ] {
        assert_eq!(saved.overflowed, [large], "{name}");
    }
    let wide = SaveOptions { dtype: Some(FloatDType::BF16), ..SaveOptions::default() };
    assert!(checkpoint.rewrite(&to.path().join("c"), None, &wide).unwrap().overflowed.is_empty());
}

#[test]
fn tokens_are_read_as_they_are_meant() {
    let ends = |edit: &dyn Fn(&mut Value)| {
        let from = directory(|config, _| edit(config));
        HfCheckpoint::open(from.path()).unwrap().config().tokens.clone()
    };
    let tokens = ends(&|config| config["eos_token_id"] = json!([3, 5]));
    assert_eq!(tokens.eos, [3, 5]);
    let tokens = ends(&|config| {
        config["eos_token_id"] = Value::Null;
        config["pad_token_id"] = json!(-1);
    });
    assert_eq!((tokens.eos, tokens.pad), (vec![], None));
    let from = directory(|config, _| config["eos_token_id"] = json!([3, 96]));
    assert!(refused(from.path()).contains("eos_token_id = 96 is outside vocab_size = 96"));
    // What is written names what ends a text for every reader.
    let model = YuanModel::new(
        &YuanConfig {
            tokens: yuan_model::SpecialTokens { eod: Some(7), ..Default::default() },
            ..YuanConfig::tiny(96)
        },
        &Device::flex(),
    );
    let to = TempDir::new().unwrap();
    let to = to.path().join("model");
    model.unwrap().save_hf(&to, &SaveOptions::default()).unwrap();
    let generation = fs::read_to_string(to.join("generation_config.json")).unwrap();
    let generation: Value = serde_json::from_str(&generation).unwrap();
    assert_eq!((&config(&to)["eos_token_id"], &generation["eos_token_id"]), (&json!(7), &json!(7)));
}

#[test]
fn both_keys_of_a_type_are_kept_true() {
    let from = directory(|config, _| {
        config["dtype"] = json!("float32");
        config["torch_dtype"] = json!("float32");
    });
    let to = TempDir::new().unwrap();
    let to = to.path().join("model");
    let options = SaveOptions { dtype: Some(FloatDType::BF16), ..SaveOptions::default() };
    HfCheckpoint::open(from.path()).unwrap().rewrite(&to, None, &options).unwrap();
    let config = config(&to);
    assert_eq!(
        (&config["dtype"], &config["torch_dtype"]),
        (&json!("bfloat16"), &json!("bfloat16"))
    );
}

#[test]
fn a_file_that_was_not_fetched_is_a_sentence() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n";
    for name in ["model.safetensors", "config.json"] {
        let from = directory(|_, _| {});
        fs::write(from.path().join(name), pointer).unwrap();
        let error = refused(from.path());
        assert!(error.contains(name) && error.contains("git lfs pull"), "{error}");
    }
}

#[test]
fn a_copy_onto_its_source_takes_its_place_however_it_is_spelled() {
    let temp = TempDir::new().unwrap();
    let from = temp.path().join("above").join("model");
    fs::create_dir(temp.path().join("above")).unwrap();
    fs::rename(directory(|_, _| {}).keep(), &from).unwrap();
    let before = tensors(&from);
    let checkpoint = HfCheckpoint::open(&from).unwrap();
    let options = SaveOptions { overwrite: true, ..SaveOptions::default() };
    for to in [from.clone(), from.join("..").join("model")] {
        checkpoint.rewrite(&to, None, &options).unwrap();
        assert!(tensors(&from) == before);
    }
    // What holds it is not replaced by it.
    let error = checkpoint.rewrite(&temp.path().join("above"), None, &options).unwrap_err();
    assert!(error.to_string().contains("it holds the checkpoint that is read"), "{error}");
    assert!(tensors(&from) == before);
    assert_eq!(names(&temp.path().join("above")), ["model"]);
}
