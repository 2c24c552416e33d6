//! Writing checkpoint directories: a model from memory, or another checkpoint with fewer experts or
//! in another type.

use std::{
    collections::HashMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use burn::tensor::{DType, FloatDType, TensorData};
use serde_json::{Map, Value, json};

use super::{
    CheckpointError, HfCheckpoint, ParameterSource, TensorLayout,
    checkpoint::{CONFIG, check_experts},
    config::eos_json,
    elements::{convert_bytes, overflows, select_rows, stored_float},
    naming::{Naming, TIED},
    shards::{INDEX, SINGLE},
};
use crate::{
    YuanConfig, YuanModel, named,
    storage::{Dtype, OutgoingTensor, TensorBytes, float_dtype, stored_dtype, write_tensors},
};
use yuan_files::{FileError, copy_into, create_parent, write_directory};

/// How a checkpoint is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveOptions {
    /// Type of the floating-point tensors: F32, F16 or BF16; absent: as they are.
    pub dtype: Option<FloatDType>,
    /// Bytes of tensors that one file may hold; a larger tensor gets a file of its own.
    pub shard_size: u64,
    /// Replace a directory that is already there, once the new one is complete.
    pub overwrite: bool,
    /// Files to copy beside the weights, such as a tokenizer.
    pub side_files: Vec<PathBuf>,
    /// Go on where values become infinite in a narrower type, which is refused otherwise.
    pub allow_overflow: bool,
}

/// What is worth knowing of a checkpoint that was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saved {
    /// Tensors with values that became infinite.
    pub overflowed: Vec<String>,
}

/// A number of bytes as people write it: `5GB`, `500 MB`, `2GiB`, or a plain number.
///
/// # Errors
///
/// Says what was expected.
pub fn parse_shard_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let unit = match text[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KIB" => 1024.0,
        "MIB" => 1_048_576.0,
        "GIB" => 1_073_741_824.0,
        _ => return Err("expected a size such as 5GB, 500MB or 2GiB".into()),
    };
    let number: f64 =
        text[..digits].parse().map_err(|_| "expected a size such as 5GB, 500MB or 2GiB")?;
    match number * unit {
        bytes if bytes >= 1.0 => Ok(bytes as u64),
        _ => Err("expected at least one byte".into()),
    }
}

impl Default for SaveOptions {
    /// Types as they are, files of 5 GB as the `transformers` library writes them, nothing
    /// replaced.
    fn default() -> Self {
        Self {
            dtype: None,
            shard_size: 5_000_000_000,
            overwrite: false,
            side_files: Vec::new(),
            allow_overflow: false,
        }
    }
}

/// What a checkpoint that was pruned used to be: `pruned_metadata.json`.
pub const PRUNED_METADATA: &str = "pruned_metadata.json";

/// What ends a generated text, among other things.
const GENERATION: &str = "generation_config.json";

/// The parameters of a model with values that would become infinite in another type.
pub fn overflowing(model: &YuanModel, dtype: FloatDType) -> Vec<String> {
    let is_too_large = |path: &str, stored: DType| {
        let data = named::read_part(model, path, None).filter(|_| stored != DType::from(dtype));
        data.zip(stored_float(stored))
            .is_some_and(|(data, stored)| overflows(data.as_bytes(), stored, dtype))
    };
    let parameters = named::parameter_dtypes(model).into_iter();
    parameters.filter(|(path, stored)| is_too_large(path, *stored)).map(|(path, _)| path).collect()
}

impl YuanModel {
    /// Writes the model in upstream's layout; the directory is complete or not there.
    ///
    /// # Errors
    ///
    /// A directory that exists (unless it may be replaced) or cannot be written, or values that
    /// become infinite (unless they may); what was there before stays.
    pub fn save_hf(
        &self,
        directory: &Path,
        options: &SaveOptions,
    ) -> Result<Saved, CheckpointError> {
        let dtypes: HashMap<String, DType> = named::parameter_dtypes(self).into_iter().collect();
        let missing =
            |path: &str| CheckpointError::directory(directory, format!("the model has no {path}"));
        let parameters = Parameters {
            dtype: &|path| dtypes.get(path).copied(),
            read: &|path, slices| named::read_part(self, path, slices).ok_or_else(|| missing(path)),
        };
        save_parameters(self.config(), &parameters, directory, options)
    }
}

/// Parameters of a model, wherever they are, by their paths.
pub struct Parameters<'a> {
    /// The type of a parameter.
    pub dtype: &'a dyn Fn(&str) -> Option<DType>,
    /// The elements of a parameter, or of some of its slices along the first axis.
    pub read: &'a ReadParameter<'a>,
}

/// Reads a parameter, or some of its slices along the first axis.
pub type ReadParameter<'a> =
    dyn Fn(&str, Option<Range<usize>>) -> Result<TensorData, CheckpointError> + 'a;

/// [`YuanModel::save_hf`] of a model that is in no memory: its parameters are read slice by slice.
///
/// # Errors
///
/// As there, and the first error of `parameters`.
pub fn save_parameters(
    model: &YuanConfig,
    parameters: &Parameters<'_>,
    directory: &Path,
    options: &SaveOptions,
) -> Result<Saved, CheckpointError> {
    let sources = model.parameter_sources();
    let naming = if model.images.is_some() { Naming::Multimodal } else { Naming::Text };
    let mut outgoing = Vec::new();
    for source in &sources {
        let stored = (parameters.dtype)(&source.path).and_then(stored_float);
        let dtype = options.dtype.or(stored).unwrap_or(FloatDType::F32);
        for (index, name) in source.names.iter().enumerate() {
            let index = (source.layout == TensorLayout::StackedTransposed).then_some(index);
            outgoing.push((
                tensor(naming.full_name(name), dtype_of(dtype), source.shape.clone()),
                (source, index, dtype),
            ));
        }
    }
    let mut config: Value = serde_json::from_str(&model.to_json())
        .map_err(|error| CheckpointError::directory(directory, error.to_string()))?;
    if let Some((tensor, _)) = outgoing.iter().max_by_key(|(tensor, _)| tensor.bytes()) {
        let name = json!(torch_name(tensor.dtype));
        language_model(&mut config)["torch_dtype"] = name.clone();
        config["torch_dtype"] = name;
    }
    // Most readers look for this key only.
    let tokens = &model.tokens;
    let ends = if tokens.eos.is_empty() { Vec::from_iter(tokens.eod) } else { tokens.eos.clone() };
    let eos = eos_json(&ends).unwrap_or_default();
    language_model(&mut config)["eos_token_id"] = eos.clone();
    let generation = json!({
        "bos_token_id": tokens.bos,
        "eos_token_id": eos,
        "pad_token_id": tokens.pad,
    });
    let bytes = |&(source, index, dtype): &(&ParameterSource, Option<usize>, FloatDType)| {
        let slices = index.map(|index| index..index + 1);
        let data = (parameters.read)(&source.path, slices)?;
        let stored = stored_float(data.dtype()).unwrap_or(dtype);
        let overflows = overflows(data.as_bytes(), stored, dtype);
        Ok((source.disassemble(data, dtype), overflows))
    };
    let finish = |unfinished: &Path| {
        let path = unfinished.join(GENERATION);
        match path.exists() {
            // It came with the tokenizer.
            true => Ok(()),
            false => write_text(&path, &format!("{generation:#}\n")),
        }
    };
    write(directory, options, &config, &outgoing, bytes, finish)
}

impl HfCheckpoint {
    /// Copies the checkpoint, tensor by tensor, with fewer experts, in another type or in other
    /// files.
    ///
    /// No model is built: memory holds one tensor at a time. `experts` lists those to keep of every
    /// layer, in their new order; routers are cut to match, and `pruned_metadata.json` says what
    /// there was. Tokenizer and whatever else is no weight comes along, as do the tensors of a
    /// vision tower.
    ///
    /// # Errors
    ///
    /// Experts that cannot be kept so, a directory that exists (unless it may be replaced) or is
    /// one above this checkpoint's, values that become infinite (unless they may), or a file that
    /// cannot be read or written; what was there before stays.
    pub fn rewrite(
        &self,
        directory: &Path,
        experts: Option<&[Vec<usize>]>,
        options: &SaveOptions,
    ) -> Result<Saved, CheckpointError> {
        // Onto itself it may be written: the tensors stay mapped until they are.
        if let (Ok(from), Ok(to)) = (self.path().canonicalize(), directory.canonicalize())
            && from != to
            && from.starts_with(to)
        {
            let reason = "it holds the checkpoint that is read: name another directory";
            return Err(CheckpointError::directory(directory, reason));
        }
        let mut config = self.raw_config().clone();
        if self.is_tied() {
            set_untied(&mut config);
        }
        if let Some(experts) = experts {
            check_experts(self.config(), experts)?;
            set_experts(&mut config, experts);
        }
        if let Some(dtype) = options.dtype {
            set_dtype(&mut config, dtype);
        }
        let layers = self.config().num_layers();
        let old = self.config().parameter_sources_of(0..layers, experts);
        let mut pruned = self.config().clone();
        if let Some(experts) = experts {
            pruned.experts_per_layer = experts.iter().map(Vec::len).collect();
        }
        let new = pruned.parameter_sources();
        let mut outgoing = Vec::new();
        let mut add = |name: String, shape: &[usize], from: String, rows| {
            let stored = self.shards().get(&from).map_or(Dtype::F32, |stored| stored.dtype);
            let convert = float_dtype(stored).zip(options.dtype).filter(|(from, to)| from != to);
            let dtype = convert.map_or(stored, |(_, to)| dtype_of(to));
            outgoing.push((tensor(name, dtype, shape.to_vec()), Outgoing { from, rows, convert }));
        };
        for (old, new) in old.iter().zip(&new) {
            for (from, name) in old.names.iter().zip(&new.names) {
                add(self.name_in_copy(name), &new.shape, self.full_name(from), old.rows.as_deref());
            }
        }
        for name in self.extras() {
            let shape = self.shards().get(name).map_or(&[][..], |stored| &stored.shape);
            add(name.to_owned(), shape, name.to_owned(), None);
        }
        let finish = |unfinished: &Path| {
            copy_side_files(self.path(), unfinished)?;
            experts.map_or(Ok(()), |experts| self.write_pruned_metadata(unfinished, experts))
        };
        write(directory, options, &config, &outgoing, |piece| self.bytes_of(piece), finish)
    }

    /// The bytes to write, and whether some of their values became infinite.
    fn bytes_of(&self, piece: &Outgoing<'_>) -> Result<(TensorBytes, bool), CheckpointError> {
        let mapped = self.shards().map(&piece.from)?;
        let shape = self.shards().get(&piece.from).map(|stored| &stored.shape[..]);
        // A tensor without dimensions is one row.
        let all = shape.and_then(|shape| shape.first()).copied().unwrap_or(1);
        let rows = piece.rows.map(|rows| {
            let width = mapped.as_ref().len() / usize::max(all, 1);
            select_rows(mapped.as_ref(), width, rows)
        });
        Ok(match (piece.convert, rows) {
            (None, None) => (TensorBytes::Mapped(mapped), false),
            (None, Some(rows)) => (TensorBytes::Owned(rows), false),
            (Some((from, to)), rows) => {
                let bytes = rows.as_deref().unwrap_or(mapped.as_ref());
                (TensorBytes::Owned(convert_bytes(bytes, from, to)), overflows(bytes, from, to))
            }
        })
    }

    /// `pruned_metadata.json`: how many experts there were, and which of them are left.
    fn write_pruned_metadata(
        &self,
        directory: &Path,
        experts: &[Vec<usize>],
    ) -> Result<(), CheckpointError> {
        let before = &self.config().experts_per_layer;
        let kept: Vec<usize> = experts.iter().map(Vec::len).collect();
        let mut pruned = self.config().clone();
        pruned.experts_per_layer.clone_from(&kept);
        let metadata = json!({
            "original_experts_per_layer": before,
            "per_layer_experts_blocks": kept,
            "original_experts": before.iter().sum::<usize>(),
            "experts": kept.iter().sum::<usize>(),
            "original_parameters": self.config().parameter_count().total(),
            "parameters": pruned.parameter_count().total(),
            "kept_experts": experts,
        });
        write_text(&directory.join(PRUNED_METADATA), &format!("{metadata:#}\n"))
    }
}

/// A tensor of another checkpoint on its way into this one.
struct Outgoing<'a> {
    from: String,
    rows: Option<&'a [usize]>,
    convert: Option<(FloatDType, FloatDType)>,
}

/// Writes configuration, files of tensors and index into a directory that appears when all is
/// there.
fn write<T>(
    directory: &Path,
    options: &SaveOptions,
    config: &Value,
    tensors: &[(OutgoingTensor, T)],
    data: impl Fn(&T) -> Result<(TensorBytes, bool), CheckpointError>,
    finish: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<Saved, CheckpointError> {
    if directory.exists() && !options.overwrite {
        return Err(CheckpointError::directory(
            directory,
            "it already exists, and may not be replaced",
        ));
    }
    let shards = split(tensors, options.shard_size);
    let file_name = |shard: usize| match shards.len() {
        1 => SINGLE.to_owned(),
        count => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
    };
    create_parent(directory)?;
    let mut overflowed = Vec::new();
    write_directory(directory, |unfinished| {
        write_text(&unfinished.join(CONFIG), &format!("{config:#}\n"))?;
        let mut weight_map = Map::new();
        for (number, shard) in shards.iter().enumerate() {
            let outgoing: Vec<OutgoingTensor> =
                shard.iter().map(|(tensor, _)| tensor.clone()).collect();
            let path = unfinished.join(file_name(number));
            write_tensors(&path, &outgoing, &[], |index| {
                let (tensor, from) = shard[index];
                let (bytes, overflows) = data(from)?;
                overflowed.extend(overflows.then(|| tensor.name.clone()));
                Ok::<_, CheckpointError>(bytes)
            })?;
            weight_map
                .extend(outgoing.into_iter().map(|tensor| (tensor.name, json!(file_name(number)))));
        }
        if shards.len() > 1 {
            let total: usize = tensors.iter().map(|(tensor, _)| tensor.bytes()).sum();
            weight_map.sort_keys();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            write_text(&unfinished.join(INDEX), &format!("{index:#}\n"))?;
        }
        if let (false, false, Some(to)) =
            (overflowed.is_empty(), options.allow_overflow, options.dtype)
        {
            return Err(CheckpointError::Overflow { tensors: overflowed.clone(), to });
        }
        options.side_files.iter().try_for_each(|file| copy_into(file, unfinished))?;
        finish(unfinished)
    })?;
    Ok(Saved { overflowed })
}

/// Cuts a list of tensors into files of at most `most` bytes, in order; wide types first within a
/// file, so that every tensor is aligned.
fn split<T>(tensors: &[(OutgoingTensor, T)], most: u64) -> Vec<Vec<&(OutgoingTensor, T)>> {
    let mut shards = vec![Vec::new()];
    let mut size = 0;
    for entry in tensors {
        let bytes = entry.0.bytes() as u64;
        if size > 0 && size + bytes > most {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        shards.last_mut().expect("there is one").push(entry);
    }
    for shard in &mut shards {
        shard.sort_by_key(|(tensor, _)| std::cmp::Reverse(tensor.dtype.bitsize()));
    }
    shards
}

/// The object of a `config.json` that describes the language model.
fn language_model(config: &mut Value) -> &mut Value {
    if config.get("llm_config").is_some_and(|nested| !nested.is_null()) {
        &mut config["llm_config"]
    } else {
        config
    }
}

fn set_experts(config: &mut Value, experts: &[Vec<usize>]) {
    let counts: Vec<usize> = experts.iter().map(Vec::len).collect();
    let moe = &mut language_model(config)["moe_config"];
    moe["per_layer_experts_blocks"] = json!(counts);
    if let Some(moe) = moe.as_object_mut() {
        // The list wins, but readers of Flash know none, and nobody should find a contradiction.
        moe.remove("moe_num_experts");
        if counts.windows(2).all(|pair| pair[0] == pair[1]) {
            moe.insert("moe_num_experts".into(), json!(counts.first()));
        }
    }
}

/// The head that is written has a tensor of its own.
fn set_untied(config: &mut Value) {
    let untie = |config: &mut Value| {
        if config.get(TIED).is_some() {
            config[TIED] = json!(false);
        }
    };
    untie(config);
    untie(language_model(config));
}

fn set_dtype(config: &mut Value, dtype: FloatDType) {
    let name = json!(torch_name(dtype_of(dtype)));
    // Older libraries read the one key, newer ones the other.
    let set = |nested: &mut Value| {
        for key in ["torch_dtype", "dtype"] {
            if nested.get(key).is_some() {
                nested[key] = name.clone();
            }
        }
    };
    set(language_model(config));
    if let Some(vision) = config.get_mut("vision_config") {
        set(vision);
    }
    if config.get("dtype").is_some() {
        config["dtype"] = name.clone();
    }
    config["torch_dtype"] = name;
}

/// Copies tokenizer, templates and texts: everything in the directory that is no weight and not
/// written anew.
fn copy_side_files(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    const WEIGHTS: [&str; 5] = ["safetensors", "bin", "pt", "pth", "unfinished"];
    for entry in fs::read_dir(from).map_err(FileError::of("read", from))? {
        let path = entry.map_err(FileError::of("read", from))?.path();
        let extension =
            path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let Some(name) =
            path.file_name().filter(|_| path.is_file() && !WEIGHTS.contains(&extension))
        else {
            continue;
        };
        if [CONFIG, INDEX, PRUNED_METADATA].iter().any(|written| name == *written) {
            continue;
        }
        copy_into(&path, to)?;
    }
    Ok(())
}

fn write_text(path: &Path, text: &str) -> Result<(), CheckpointError> {
    Ok(fs::write(path, text).map_err(FileError::of("write", path))?)
}

fn tensor(name: String, dtype: Dtype, shape: Vec<usize>) -> OutgoingTensor {
    OutgoingTensor { name, dtype, shape }
}

fn dtype_of(dtype: FloatDType) -> Dtype {
    stored_dtype(dtype.into()).unwrap_or(Dtype::F32)
}

/// What PyTorch calls a type.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}
