//! What is in a checkpoint, told from headers that describe far more than the disk could hold.

use std::{collections::HashMap, fs, path::Path};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use tempfile::TempDir;
use yuan_model::{ParameterCount, YuanConfig};
use yuan_train::Inventory;

/// The headers of all shards of a model in bf16, of about `per_shard` bytes each, without a single
/// weight.
fn write_headers(directory: &Path, config: &YuanConfig, per_shard: usize) {
    fs::write(directory.join("config.json"), config.to_json()).unwrap();
    let tensors = config.parameter_sources().into_iter().flat_map(|source| {
        let shape = source.shape;
        source.names.into_iter().map(move |name| (name, shape.clone()))
    });
    let mut shards: Vec<(usize, Vec<(String, TensorInfo)>)> = vec![(0, Vec::new())];
    for (name, shape) in tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        if shards.last().unwrap().0 + bytes > per_shard && shards.last().unwrap().0 > 0 {
            shards.push((0, Vec::new()));
        }
        let (end, shard) = shards.last_mut().unwrap();
        let info = TensorInfo { dtype: Dtype::BF16, shape, data_offsets: (*end, *end + bytes) };
        *end += bytes;
        shard.push((name, info));
    }
    let mut map = HashMap::new();
    let count = shards.len();
    for (number, (_, shard)) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", number + 1);
        map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone())));
        let header = serde_json::to_vec(&Metadata::new(None, shard).unwrap()).unwrap();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        fs::write(directory.join(file), bytes).unwrap();
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    fs::write(directory.join("model.safetensors.index.json"), index).unwrap();
}

#[test]
fn ultra_is_told_from_its_headers() {
    let temp = TempDir::new().unwrap();
    let directory = temp.path();
    let config = YuanConfig::ultra();
    write_headers(directory, &config, 5_000_000_000);
    let inventory = Inventory::of(directory).unwrap();
    let count: ParameterCount = config.parameter_count();
    assert_eq!(inventory.parameters, 1_010_653_092_864);
    assert_eq!(inventory.stored_elements, count.total());
    assert_eq!(inventory.types["BF16"].bytes, 2 * count.total());
    assert_eq!(inventory.types["BF16"].tensors, 2 * 4360 + 103 * 9 + 3);
    assert_eq!(inventory.experts_per_layer, config.experts_per_layer);
    assert_eq!((inventory.top_k, inventory.other_tensors), (2, 0));
    // Nothing is wrong but that the weights are somewhere else.
    assert_eq!(inventory.problems.len(), inventory.files.len());
    assert!(inventory.problems.iter().all(|problem| problem.what.contains("is cut off")));
    let text = inventory.to_string();
    for part in [
        "1.01 T (1010653092864), 69.8 B active per token",
        "4360 in 103 layers, 2 for each token",
        "48 × 69",
    ] {
        assert!(text.contains(part), "{text}");
    }
}
