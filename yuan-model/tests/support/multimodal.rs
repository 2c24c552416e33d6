//! A multimodal directory: the tower and projector of the reference before a language model.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::Device;
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;
use tempfile::TempDir;
use yuan_model::{YuanConfig, YuanModel, hf::SaveOptions};

use super::fixtures;

/// Name → (type, shape, bytes).
pub type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

pub fn read(directory: &Path) -> Tensors {
    let bytes = fs::read(directory.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (&str, TensorView)| {
        (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.iter().map(tensor).collect()
}

pub fn write(directory: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
}

/// The tower and projector of the reference before a language model of its configuration.
pub fn multimodal(temp: &TempDir) -> PathBuf {
    let text = fs::read_to_string(fixtures().join("vision_tiny/config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let language = YuanConfig::from_json(&config["llm_config"].to_string()).unwrap();
    Device::flex().seed(3);
    let (saved, whole) = (temp.path().join("language"), temp.path().join("whole"));
    let model = YuanModel::new(&language, &Device::flex()).unwrap();
    model.save_hf(&saved, &SaveOptions::default()).unwrap();
    let mut tensors = read(&fixtures().join("vision_tiny"));
    let of_language = read(&saved).into_iter();
    tensors.extend(of_language.map(|(name, tensor)| (format!("language_model.{name}"), tensor)));
    write(&whole, &config, &tensors);
    whole
}
