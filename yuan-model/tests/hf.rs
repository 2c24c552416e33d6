//! Checkpoint directories: upstream's tensors in, upstream's tensors out, and every way in which
//! they can be wrong. Each way is a short test on one small checkpoint, which is why they share a
//! file.

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, FloatDType, Int, Tensor, bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use support::{Fixture, Kind, assert_near, devices, fixtures, reference};
use tempfile::TempDir;
use yuan_model::{
    ForwardOptions, PrunableExperts, RouterType, YuanConfig, YuanModel,
    hf::{HfCheckpoint, LoadOptions, PRUNED_METADATA, SaveOptions, Shards},
    named,
    storage::TensorFile,
};

/// Every tensor of a directory: type, shape and bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Reads a directory with the `safetensors` crate alone.
fn read(directory: &Path) -> Tensors {
    let mut all = Tensors::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors")
            && !path.ends_with("io.safetensors")
        {
            let bytes = fs::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(all.insert(name.clone(), tensor).is_none(), "{name} is there twice");
            }
        }
    }
    all
}

/// Writes a directory with the `safetensors` crate alone.
fn write(directory: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
    write_file(&directory.join("model.safetensors"), tensors);
}

fn write_file(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn config_of(directory: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(directory.join("config.json")).unwrap()).unwrap()
}

fn open(directory: &Path) -> HfCheckpoint {
    HfCheckpoint::open(directory).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(directory: &Path) -> String {
    let error = HfCheckpoint::open(directory).unwrap_err().to_string();
    assert!(error.contains(directory.to_str().unwrap()), "{error} names the file");
    error
        .replace(&format!("{}/", directory.display()), "")
        .replace(&format!("{}", directory.display()), "DIR")
}

fn load(directory: &Path) -> YuanModel {
    open(directory).load(&Device::flex(), &LoadOptions::default()).unwrap()
}

/// All parameters by path.
fn parameters(model: &YuanModel) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let read = named::read_parameters(model, |path, data| {
        all.insert(path.to_owned(), data.as_bytes().to_vec());
        Ok::<(), std::convert::Infallible>(())
    });
    read.unwrap();
    all
}

fn logits(model: &YuanModel) -> Tensor<3> {
    let ids = Tensor::<1, Int>::from_data([3, 17, 42, 8, 60, 3], &Device::flex()).unsqueeze::<2>();
    model.forward(ids, ForwardOptions::default()).logits
}

const MODELS: [&str; 3] = ["flash_tiny", "ultra_tiny", "ultra_tiny/sharded"];

/// The checkpoints that the reference has; not every one has a sharded copy.
fn reference_models() -> Vec<&'static str> {
    let there = |model: &&str| reference().join(model).is_dir();
    let models: Vec<_> = MODELS.into_iter().filter(there).collect();
    assert!(models.len() >= 2, "{}", reference().display());
    models
}

#[test]
fn the_reference_checkpoints_give_the_reference_logits() {
    for directory in reference_models() {
        let io =
            Fixture::load(&format!("{}/io.safetensors", directory.trim_end_matches("/sharded")));
        for (backend, device) in devices() {
            let model =
                open(&reference().join(directory)).load(&device, &LoadOptions::default()).unwrap();
            let output = model.forward(io.int("input_ids", &device), ForwardOptions::default());
            assert_near(
                &format!("{backend} {directory}"),
                &output.logits,
                io.host("logits"),
                Kind::Activation,
            );
        }
    }
}

#[test]
fn what_is_saved_of_the_reference_is_what_upstream_wrote() {
    let temp = TempDir::new().unwrap();
    for (number, directory) in reference_models().into_iter().enumerate() {
        for shard_size in [u64::MAX, 100_000, 1] {
            let to = temp.path().join(format!("{number}-{shard_size}"));
            let options = SaveOptions { shard_size, ..SaveOptions::default() };
            load(&reference().join(directory)).save_hf(&to, &options).unwrap();
            assert!(
                read(&to) == read(&reference().join(directory)),
                "{directory}: names, shapes and bytes"
            );
            assert_eq!(open(&to).config(), open(&reference().join(directory)).config());
            assert_eq!(config_of(&to)["torch_dtype"], "float32");
            check_index(&to, shard_size);
        }
    }
}

/// The files are named, sized and indexed as the `transformers` library does it.
fn check_index(directory: &Path, shard_size: u64) {
    let index = directory.join("model.safetensors.index.json");
    if shard_size == u64::MAX {
        return assert!(directory.join("model.safetensors").is_file() && !index.exists());
    }
    let index: Value = serde_json::from_str(&fs::read_to_string(index).unwrap()).unwrap();
    let tensors = read(directory);
    let total: usize = tensors.values().map(|(_, _, bytes)| bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    let map = index["weight_map"].as_object().unwrap();
    let files: std::collections::BTreeSet<&str> =
        map.values().map(|file| file.as_str().unwrap()).collect();
    for (number, file) in files.iter().enumerate() {
        assert_eq!(*file, format!("model-{:05}-of-{:05}.safetensors", number + 1, files.len()));
        let bytes = fs::read(directory.join(file)).unwrap();
        let inside = SafeTensors::deserialize(&bytes).unwrap();
        assert!(inside.names().iter().all(|name| map[*name] == *file));
        let size: usize = inside.tensors().iter().map(|(_, view)| view.data().len()).sum();
        assert!(size as u64 <= shard_size || inside.len() == 1, "{file} holds {size} bytes");
    }
    assert_eq!(map.len(), tensors.len());
}

/// Values that are hard to round, and those that are no numbers.
fn hard_values(count: usize) -> Vec<f32> {
    let odd = [
        0.0,
        -0.0,
        1.0 + f32::EPSILON,
        65504.0,
        65520.0,
        1e-8,
        -6e-5,
        3.39e38,
        f32::INFINITY,
        f32::NAN,
    ];
    (0..count)
        .map(
            |i| {
                if i < odd.len() { odd[i] } else { ((i * 2_654_435_761) as u32 as f32).sin() * 3.0 }
            },
        )
        .collect()
}

/// The reference model's configuration and shapes with the given bytes.
fn with_values(dtype: Dtype, bytes: impl Fn(&[f32]) -> Vec<u8>) -> (Value, Tensors) {
    let directory = reference().join("flash_tiny");
    let refill = |(name, (_, shape, _)): (String, (Dtype, Vec<usize>, Vec<u8>))| {
        let values = hard_values(shape.iter().product());
        (name, (dtype, shape, bytes(&values)))
    };
    (config_of(&directory), read(&directory).into_iter().map(refill).collect())
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn f16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
}

/// A type here and in the files, how f32 values become it, and what PyTorch calls it.
type Type = (FloatDType, Dtype, fn(&[f32]) -> Vec<u8>, &'static str);

const TYPES: [Type; 3] = [
    (FloatDType::F32, Dtype::F32, f32_bytes, "float32"),
    (FloatDType::F16, Dtype::F16, f16_bytes, "float16"),
    (FloatDType::BF16, Dtype::BF16, bf16_bytes, "bfloat16"),
];

#[test]
fn a_round_trip_is_exact_in_every_type_through_the_model_and_past_it() {
    let temp = TempDir::new().unwrap();
    for (_, dtype, bytes, torch) in TYPES {
        let (config, tensors) = with_values(dtype, bytes);
        let [from, through, past] =
            ["from", "through", "past"].map(|to| temp.path().join(format!("{to}-{torch}")));
        write(&from, &config, &tensors);
        load(&from).save_hf(&through, &SaveOptions::default()).unwrap();
        assert!(read(&through) == tensors, "{torch}: NaNs included");
        assert_eq!(config_of(&through)["torch_dtype"], torch);
        open(&from).rewrite(&past, None, &SaveOptions::default()).unwrap();
        assert!(read(&past) == tensors, "{torch}");
        assert_eq!(config_of(&past), config, "a copy's configuration is the original's");
    }
}

#[test]
fn every_type_becomes_every_other_by_one_rounding() {
    let temp = TempDir::new().unwrap();
    for (_, from_dtype, from_bytes, from_name) in TYPES {
        let (config, tensors) = with_values(from_dtype, from_bytes);
        let from = temp.path().join(from_name);
        write(&from, &config, &tensors);
        for (to_type, to_dtype, to_bytes, to_name) in TYPES {
            let expected: Tensors = tensors
                .iter()
                .map(|(name, (_, shape, bytes))| {
                    let same = from_dtype == to_dtype;
                    let bytes =
                        if same { bytes.clone() } else { to_bytes(&as_f32(from_dtype, bytes)) };
                    (name.clone(), (to_dtype, shape.clone(), bytes))
                })
                .collect();
            let [loaded, saved, rewritten] = ["loaded", "saved", "rewritten"]
                .map(|way| temp.path().join(format!("{from_name}-{to_name}-{way}")));
            let options = SaveOptions {
                dtype: Some(to_type),
                allow_overflow: true,
                ..SaveOptions::default()
            };
            let load_options = LoadOptions {
                dtype: Some(to_type),
                allow_overflow: true,
                ..LoadOptions::default()
            };
            let model = open(&from).load(&Device::flex(), &load_options).unwrap();
            model.save_hf(&loaded, &SaveOptions::default()).unwrap();
            load(&from).save_hf(&saved, &options).unwrap();
            open(&from).rewrite(&rewritten, None, &options).unwrap();
            for directory in [loaded, saved, rewritten] {
                assert!(read(&directory) == expected, "{}", directory.display());
                assert_eq!(config_of(&directory)["torch_dtype"], to_name);
            }
        }
    }
}

fn as_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        _ => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
    }
}

fn kept(config: &YuanConfig) -> Vec<Vec<usize>> {
    // Fewer, and in another order; the last layer keeps all.
    let last = config.num_layers() - 1;
    let layer = |(layer, &experts): (usize, &usize)| match layer {
        layer if layer == last => (0..experts).collect(),
        layer => (0..experts)
            .rev()
            .step_by(2)
            .chain([0].into_iter().filter(|_| experts % 2 == 1 && layer > 9))
            .collect(),
    };
    config.experts_per_layer.iter().enumerate().map(layer).collect()
}

#[test]
fn pruning_a_directory_is_pruning_the_model() {
    let temp = TempDir::new().unwrap();
    for (number, directory) in MODELS.into_iter().enumerate() {
        let checkpoint = open(&fixtures().join(directory));
        let experts = kept(checkpoint.config());
        let [offline, online] =
            ["offline", "online"].map(|way| temp.path().join(format!("{way}-{number}")));
        checkpoint.rewrite(&offline, Some(&experts), &SaveOptions::default()).unwrap();
        let model = load(&fixtures().join(directory));
        let (model, _) = model.keep_experts(&experts).unwrap();
        model.save_hf(&online, &SaveOptions::default()).unwrap();
        assert!(read(&offline) == read(&online), "{directory}");
        let counts: Vec<usize> = experts.iter().map(Vec::len).collect();
        let moe = &config_of(&offline)["moe_config"];
        assert_eq!(moe["per_layer_experts_blocks"], json!(counts));
        assert_eq!(moe["moe_num_experts"], Value::Null, "it would contradict the list");
        let pruned = load(&offline);
        assert_eq!(pruned.config().experts_per_layer, counts);
        assert_eq!(logits(&pruned).into_data(), logits(&model).into_data());
        let metadata = fs::read_to_string(offline.join(PRUNED_METADATA)).unwrap();
        let metadata: Value = serde_json::from_str(&metadata).unwrap();
        assert_eq!(
            metadata["original_experts_per_layer"],
            json!(checkpoint.config().experts_per_layer)
        );
        assert_eq!(metadata["per_layer_experts_blocks"], json!(counts));
        assert_eq!(metadata["kept_experts"], json!(experts));
        assert_eq!(metadata["parameters"], pruned.config().parameter_count().total());
    }
}

#[test]
fn reading_some_experts_is_reading_all_and_keeping_them() {
    for directory in MODELS {
        let checkpoint = open(&fixtures().join(directory));
        let experts = kept(checkpoint.config());
        let options = LoadOptions { experts: Some(experts.clone()), ..LoadOptions::default() };
        let some = checkpoint.load(&Device::flex(), &options).unwrap();
        let (cut, _) = load(&fixtures().join(directory)).keep_experts(&experts).unwrap();
        assert_eq!(parameters(&some), parameters(&cut), "{directory}");
        assert_eq!(some.config(), cut.config());
    }
}

#[test]
fn reading_some_layers_gives_those_layers() {
    let checkpoint = open(&fixtures().join("ultra_tiny/sharded"));
    let options = LoadOptions { layers: Some(1..3), ..LoadOptions::default() };
    let part = parameters(&checkpoint.load(&Device::flex(), &options).unwrap());
    let whole = parameters(&load(&fixtures().join("ultra_tiny")));
    for (path, bytes) in part {
        let original = path.replace("blocks.1.", "blocks.2.").replace("blocks.0.", "blocks.1.");
        assert_eq!(bytes, whole[&original], "{path}");
    }
    for (layers, experts) in [
        (2..4, None),
        (0..0, None),
        (0..3, Some(vec![vec![0, 1]])),
        (0..3, Some(vec![vec![0, 9]; 3])),
    ] {
        let options = LoadOptions { layers: Some(layers), experts, ..LoadOptions::default() };
        checkpoint.load(&Device::flex(), &options).unwrap_err();
    }
}

/// A rank of a cluster holds whole routers and its own experts; the bytes of the others are not
/// even there.
#[test]
fn a_rank_reads_only_the_bytes_of_its_own_experts() {
    let temp = TempDir::new().unwrap();
    let from = fixtures().join("ultra_tiny");
    let tensors = read(&from);
    // Only what the rank needs is in the second file, and the first is cut off after its header.
    let own = |name: &str| {
        ["w1.2.", "w1.3.", "w2.2.", "w2.3.", "router"].iter().any(|part| name.contains(part))
    };
    let (mine, others): (Tensors, Tensors) =
        tensors.clone().into_iter().partition(|(name, _)| own(name));
    write_file(&temp.path().join("others.safetensors"), &others);
    write_file(&temp.path().join("mine.safetensors"), &mine);
    let file =
        |name: &String| json!(if own(name) { "mine.safetensors" } else { "others.safetensors" });
    let map: serde_json::Map<String, Value> =
        tensors.keys().map(|name| (name.clone(), file(name))).collect();
    let index = json!({"weight_map": map}).to_string();
    fs::write(temp.path().join("model.safetensors.index.json"), index).unwrap();
    fs::copy(from.join("config.json"), temp.path().join("config.json")).unwrap();
    let checkpoint = open(temp.path());
    // From here on, reading anything of the others would fail.
    fs::OpenOptions::new()
        .write(true)
        .open(temp.path().join("others.safetensors"))
        .unwrap()
        .set_len(8)
        .unwrap();
    let whole = load(&from);
    for mut source in checkpoint.config().parameter_sources() {
        let is_experts = source.path.contains("experts");
        if is_experts {
            source.names = source.names[2..4].to_vec();
        }
        match checkpoint.read(&source, None) {
            Ok(data) => {
                let index = is_experts.then_some(2..4);
                assert!(is_experts || source.path.contains("router"), "{}", source.path);
                let expected = named::read_part(&whole, &source.path, None).unwrap();
                let (bytes, all) = (data.as_bytes(), expected.as_bytes());
                let part = index.map_or(0..all.len(), |part| {
                    let each = all.len() / expected.shape()[0];
                    part.start * each..part.end * each
                });
                assert_eq!(bytes, &all[part], "{}", source.path);
            }
            Err(error) => assert!(error.to_string().contains("beyond the end"), "{error}"),
        }
    }
}

/// The reference model as part of a multimodal checkpoint.
fn multimodal(directory: &Path) -> Tensors {
    let from = fixtures().join("flash_tiny");
    let mut config = config_of(&from);
    config["torch_dtype"] = json!("float32");
    let config = json!({"model_type": "yuanvl", "vision_config": {"a": 1}, "llm_config": config});
    let mut tensors: Tensors = read(&from)
        .into_iter()
        .map(|(name, tensor)| (format!("language_model.{name}"), tensor))
        .collect();
    for name in
        ["vision_model.encoder.weight", "imagemlp.up_proj.weight", "imagemlp_layernorm.weight"]
    {
        tensors.insert(name.into(), (Dtype::F32, vec![2, 3], f32_bytes(&hard_values(6))));
    }
    let table = "language_model.model.rotary_pos_emb.inv_freq";
    tensors.insert(table.into(), (Dtype::F32, vec![8], f32_bytes(&hard_values(8))));
    write(directory, &config, &tensors);
    tensors
}

#[test]
fn the_language_model_of_a_multimodal_checkpoint_loads_and_the_rest_comes_along() {
    let temp = TempDir::new().unwrap();
    let [from, copy, pruned, half] =
        ["from", "copy", "pruned", "half"].map(|name| temp.path().join(name));
    let tensors = multimodal(&from);
    fs::write(from.join("tokenizer.json"), "{}").unwrap();
    fs::write(from.join("old.bin"), "weights of another format").unwrap();
    let open = |directory: &Path| HfCheckpoint::open_language(directory).unwrap();
    let load =
        |directory: &Path| open(directory).load(&Device::flex(), &LoadOptions::default()).unwrap();
    assert_eq!(parameters(&load(&from)), parameters(&load(&fixtures().join("flash_tiny"))));
    let checkpoint = open(&from);
    assert_eq!(checkpoint.extras().count(), 4);
    checkpoint.rewrite(&copy, None, &SaveOptions::default()).unwrap();
    assert!(read(&copy) == tensors);
    assert_eq!(config_of(&copy), config_of(&from));
    assert_eq!(fs::read_to_string(copy.join("tokenizer.json")).unwrap(), "{}");
    assert!(!copy.join("old.bin").exists());
    let experts = kept(checkpoint.config());
    checkpoint.rewrite(&pruned, Some(&experts), &SaveOptions::default()).unwrap();
    let counts: Vec<usize> = experts.iter().map(Vec::len).collect();
    assert_eq!(
        config_of(&pruned)["llm_config"]["moe_config"]["per_layer_experts_blocks"],
        json!(counts)
    );
    assert_eq!(config_of(&pruned)["moe_config"], Value::Null);
    assert_eq!(open(&pruned).extras().count(), 4);
    assert_eq!(load(&pruned).config().experts_per_layer, counts);
    let options = SaveOptions { dtype: Some(FloatDType::BF16), ..SaveOptions::default() };
    checkpoint.rewrite(&half, None, &options).unwrap();
    assert_eq!(config_of(&half)["llm_config"]["torch_dtype"], "bfloat16");
    assert!(read(&half).values().all(|(dtype, _, _)| *dtype == Dtype::BF16));
}

#[test]
fn routers_of_both_kinds_and_selection_biases_survive() {
    let temp = TempDir::new().unwrap();
    for (number, router_type) in [RouterType::Linear, RouterType::Attention].into_iter().enumerate()
    {
        let config =
            YuanConfig { router_type, router_selection_bias: true, ..YuanConfig::tiny(96) };
        let model = YuanModel::new(&config, &Device::flex()).unwrap();
        let shifts: Vec<Vec<f32>> =
            config.experts_per_layer.iter().map(|&e| (0..e).map(|i| i as f32).collect()).collect();
        let model = model.shift_selection_bias(&shifts);
        let [whole, cut] =
            ["whole", "cut"].map(|name| temp.path().join(format!("{name}-{number}")));
        model.save_hf(&whole, &SaveOptions::default()).unwrap();
        assert_eq!(parameters(&load(&whole)), parameters(&model));
        let experts = kept(&config);
        open(&whole).rewrite(&cut, Some(&experts), &SaveOptions::default()).unwrap();
        let (model, _) = model.keep_experts(&experts).unwrap();
        assert_eq!(parameters(&load(&cut)), parameters(&model));
    }
}

/// A copy of the sharded reference to damage.
fn copy_of(directory: &str) -> (TempDir, PathBuf) {
    let temp = TempDir::new().unwrap();
    let to = temp.path().join("model");
    fs::create_dir(&to).unwrap();
    for entry in fs::read_dir(fixtures().join(directory)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::write(to.join(path.file_name().unwrap()), fs::read(&path).unwrap()).unwrap();
        }
    }
    (temp, to)
}

fn edit(directory: &Path, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = read(directory);
    change(&mut tensors);
    write_file(&directory.join("model.safetensors"), &tensors);
}

#[test]
fn all_wrong_tensors_are_listed() {
    let (_temp, directory) = copy_of("flash_tiny");
    fs::remove_file(directory.join("io.safetensors")).unwrap();
    edit(&directory, |tensors| {
        tensors.remove("model.norm.weight");
        tensors.remove("model.layers.1.mlp.experts.w2.3.weight");
        tensors.insert(
            "model.layers.7.input_layernorm.weight".into(),
            (Dtype::F32, vec![1], vec![0; 4]),
        );
        tensors.insert("vision_model.weight".into(), (Dtype::F32, vec![1], vec![0; 4]));
        tensors.insert("lm_head.weight".into(), (Dtype::F32, vec![1, 2], vec![0; 8]));
        tensors.insert(
            "model.layers.0.input_layernorm.weight".into(),
            (Dtype::I64, vec![32], vec![0; 256]),
        );
    });
    let expected = "DIR: `model.layers.0.input_layernorm.weight` is I64; expected F32, F16 or BF16; \
        `model.layers.1.mlp.experts.w2.3.weight` is missing; `model.norm.weight` is missing; \
        `lm_head.weight` is [1, 2], expected [96, 32]; \
        `model.layers.7.input_layernorm.weight` is no parameter of this model; \
        `vision_model.weight` is no parameter of this model";
    assert_eq!(refused(&directory), expected);
}

#[test]
fn a_configuration_that_contradicts_the_tensors_is_refused() {
    let (_temp, directory) = copy_of("ultra_tiny");
    fs::remove_file(directory.join("io.safetensors")).unwrap();
    let original = config_of(&directory);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut config = original.clone();
        change(&mut config);
        fs::write(directory.join("config.json"), config.to_string()).unwrap();
        refused(&directory)
    };
    let error = with(&|config| config["moe_config"]["per_layer_experts_blocks"] = json!([8, 4, 5]));
    assert_eq!(
        error,
        "DIR: `model.layers.2.mlp.router.weight` is [6, 32], expected [5, 32]; \
         `model.layers.2.mlp.experts.w1.5.weight` is no parameter of this model; \
         `model.layers.2.mlp.experts.w2.5.weight` is no parameter of this model"
    );
    let error = with(&|config| config["vocab_size"] = json!(81));
    assert_eq!(
        error,
        "DIR: `model.embed_tokens.weight` is [80, 32], expected [81, 32]; `lm_head.weight` is [80, 32], expected [81, 32]"
    );
    let error = with(&|config| {
        config["moe_config"]["per_layer_experts_blocks"] = json!([8, 4, 1_u64 << 40]);
    });
    assert!(
        error.starts_with("DIR: the files hold 66 tensors, but config.json asks for over"),
        "{error}"
    );
    let error = with(&|config| drop(config.as_object_mut().unwrap().remove("rotary_base")));
    assert_eq!(error, "config.json: the configuration has no `rotary_base`");
    fs::remove_file(directory.join("config.json")).unwrap();
    assert!(refused(&directory).starts_with("cannot read config.json: No such file"));
}

/// Changes the bytes of a file.
fn damage(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Replaces a text in the header, whose length is written anew.
fn edit_header(path: &Path, from: &str, to: &str) {
    damage(path, |bytes| {
        let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + size].to_vec()).unwrap();
        assert!(header.contains(from), "{header}");
        let header = header.replacen(from, to, 1);
        let data = bytes.split_off(8 + size);
        *bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.into_bytes());
        bytes.extend(data);
    });
}

#[test]
fn damaged_shards_are_refused_by_name() {
    let shard = "model-00002-of-00002.safetensors";
    let case = |change: &dyn Fn(&Path)| {
        let (_temp, directory) = copy_of("ultra_tiny/sharded");
        change(&directory.join(shard));
        refused(&directory)
    };
    let error = case(&|path| damage(path, |bytes| bytes.truncate(bytes.len() - 100)));
    assert_eq!(
        error,
        format!("{shard}: the file is cut off: 100 bytes of its tensors are missing")
    );
    let error = case(&|path| damage(path, |bytes| bytes.truncate(50)));
    assert!(
        error.contains("its header of") && error.contains("does not fit the file's 50"),
        "{error}"
    );
    let error = case(&|path| damage(path, |bytes| bytes.truncate(5)));
    assert_eq!(error, format!("{shard}: 5 bytes are no safetensors file"));
    let error = case(&|path| damage(path, |bytes| bytes.extend([0; 7])));
    assert_eq!(error, format!("{shard}: 7 bytes follow its last tensor"));
    let error =
        case(&|path| damage(path, |bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes())));
    assert!(error.contains("its header of 18446744073709551615 bytes does not fit"), "{error}");
    let error = case(&|path| damage(path, |bytes| bytes[20] = 0xff));
    assert!(error.starts_with(&format!("{shard}: its header is no text")), "{error}");
    let error = case(&|path| edit_header(path, "\"dtype\"", "\"kind\""));
    assert!(error.starts_with(&format!("{shard}: its header is damaged: ")), "{error}");
    // Offsets past the end, that overlap, or that disagree with the shape.
    let error =
        case(&|path| edit_header(path, "\"data_offsets\":[0,", "\"data_offsets\":[9000000,9"));
    assert!(error.starts_with(&format!("{shard}: its header is damaged: ")), "{error}");
    let error = case(&|path| edit_header(path, "\"shape\":[", "\"shape\":[2,"));
    assert!(error.starts_with(&format!("{shard}: its header is damaged: ")), "{error}");
    let error = case(&|path| fs::remove_file(path).unwrap());
    assert!(error.starts_with(&format!("cannot read {shard}: ")), "{error}");
}

#[test]
fn a_tensor_twice_and_files_that_disagree_are_refused() {
    let (_temp, directory) = copy_of("ultra_tiny/sharded");
    let [first, second] =
        [1, 2].map(|i| directory.join(format!("model-0000{i}-of-00002.safetensors")));
    // In one header: the same entry again.
    let bytes = fs::read(&second).unwrap();
    let names = SafeTensors::deserialize(&bytes).unwrap();
    let name = names.names()[0].to_owned();
    let info = names.tensor(&name).unwrap();
    let start = info.data().as_ptr() as usize - bytes.as_ptr() as usize;
    let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
    let entry = json!({"dtype": "F32", "shape": info.shape(), "data_offsets": [start - size, start - size + info.data().len()]});
    edit_header(&second, "{", &format!("{{\"{name}\":{entry},"));
    assert_eq!(
        refused(&directory),
        format!("model-00002-of-00002.safetensors: its header lists twice: `{name}`")
    );
    fs::write(&second, &bytes).unwrap();
    // In two files.
    let both = {
        let mut both = Tensors::new();
        for path in [&first, &second] {
            both.append(&mut read_file(path));
        }
        both
    };
    write_file(&second, &both);
    let error = refused(&directory);
    let message = "`lm_head.weight` is in model-00002-of-00002.safetensors, but the index says model-00001-of-00002.safetensors";
    assert!(error.starts_with(&format!("DIR: {message}; ")), "{error}");
    fs::write(&second, &bytes).unwrap();
    // An index that names other files, other tensors, or files elsewhere.
    let index = directory.join("model.safetensors.index.json");
    let original = fs::read_to_string(&index).unwrap();
    let with = |from: &str, to: &str| {
        fs::write(&index, original.replacen(from, to, 1)).unwrap();
        refused(&directory)
    };
    let error = with("\"lm_head.weight\": \"model-00001", "\"lm_head.weight\": \"model-00002");
    assert_eq!(
        error,
        "DIR: `lm_head.weight` is in model-00001-of-00002.safetensors, but the index says \
         model-00002-of-00002.safetensors; `lm_head.weight` is not in model-00002-of-00002.safetensors, where the index says"
    );
    let error = with("\"lm_head.weight\"", "\"lm_tail.weight\"");
    assert_eq!(
        error,
        "DIR: `lm_head.weight` is in model-00001-of-00002.safetensors but not in the index; \
         `lm_tail.weight` is not in model-00001-of-00002.safetensors, where the index says"
    );
    let error = with("\"lm_head.weight\": \"model", "\"lm_head.weight\": \"../model");
    assert!(error.contains("expected a file name"), "{error}");
    assert_eq!(
        with("\"weight_map\"", "\"weights\""),
        "model.safetensors.index.json: it has no `weight_map`"
    );
    fs::remove_file(&index).unwrap();
    assert_eq!(
        refused(&directory),
        "DIR: it holds neither model.safetensors nor model.safetensors.index.json"
    );
}

fn read_file(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors
        .into_iter()
        .map(|(name, v)| (name, (v.dtype(), v.shape().to_vec(), v.data().to_vec())))
        .collect()
}

#[test]
fn what_is_there_stays_unless_it_may_be_replaced_and_whole_until_then() {
    let temp = TempDir::new().unwrap();
    let to = temp.path().join("out");
    let model = load(&fixtures().join("ultra_tiny"));
    model.save_hf(&to, &SaveOptions::default()).unwrap();
    let before = read(&to);
    let error =
        load(&fixtures().join("flash_tiny")).save_hf(&to, &SaveOptions::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{}: it already exists, and may not be replaced", to.display())
    );
    assert!(read(&to) == before);
    // A source that breaks in the middle of a replacement.
    let (_source, damaged) = copy_of("flash_tiny");
    fs::remove_file(damaged.join("io.safetensors")).unwrap();
    let checkpoint = open(&damaged);
    let file = fs::OpenOptions::new().write(true).open(damaged.join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let overwrite = SaveOptions { overwrite: true, ..SaveOptions::default() };
    let error = checkpoint.rewrite(&to, None, &overwrite).unwrap_err().to_string();
    assert!(error.contains("lies beyond the end of the file"), "{error}");
    assert!(read(&to) == before);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1, "nothing half-written is left");
    // A directory onto itself.
    open(&to)
        .rewrite(&to, None, &SaveOptions { dtype: Some(FloatDType::BF16), ..overwrite })
        .unwrap();
    assert!(read(&to).values().all(|(dtype, _, _)| *dtype == Dtype::BF16));
}

#[cfg(target_os = "linux")]
#[test]
fn a_directory_that_cannot_be_written_is_named() {
    let model = load(&fixtures().join("ultra_tiny"));
    // /sys refuses even root.
    let error =
        model.save_hf(Path::new("/sys/yuan"), &SaveOptions::default()).unwrap_err().to_string();
    assert!(error.starts_with("cannot write /sys/yuan"), "{error}");
    let temp = TempDir::new().unwrap();
    fs::write(temp.path().join("file"), "no directory").unwrap();
    let error = model
        .save_hf(&temp.path().join("file/out"), &SaveOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("cannot create ") && error.contains("file: File exists"), "{error}");
}

#[test]
fn headers_alone_say_what_is_in_a_checkpoint() {
    let (_temp, directory) = copy_of("ultra_tiny/sharded");
    damage(&directory.join("model-00002-of-00002.safetensors"), |bytes| bytes.truncate(20_000));
    HfCheckpoint::open(&directory).unwrap_err();
    let shards = Shards::open_headers(&directory).unwrap();
    assert_eq!(shards.names().count(), 66);
    assert_eq!(shards.files().iter().map(TensorFile::missing_bytes).sum::<u64>(), 230_776 - 20_000);
    assert_eq!(shards.get("lm_head.weight").unwrap().shape, [80, 32]);
}
