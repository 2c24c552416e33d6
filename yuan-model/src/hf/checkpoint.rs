//! A checkpoint directory as Hugging Face's tools write it: `config.json` and safetensors files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, FloatDType, TensorData};
use serde_json::Value;

use super::{
    ParameterSource, Piece, Shards,
    elements::overflows,
    naming::{Names, Naming},
};
use crate::{
    ConfigError, ModelError, YuanConfig, YuanModel, named,
    storage::{StorageError, StoredTensor, float_dtype, mismatches, misshapen, refuse_pointer},
    surgery::check_kept,
};
use yuan_files::FileError;

/// Why a checkpoint could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file of tensors is damaged or out of reach.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The configuration was refused.
    #[error("{}: {cause}", path.display())]
    Config {
        /// The `config.json`.
        path: PathBuf,
        /// Why.
        cause: ConfigError,
    },
    /// Tensors are missing, superfluous, misshapen or in two places; all of them are listed.
    #[error("{}: {}", path.display(), problems.join("; "))]
    Tensors {
        /// The checkpoint's directory.
        path: PathBuf,
        /// One sentence for each.
        problems: Vec<String>,
    },
    /// A directory or file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Directory {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Values would become infinite in a narrower type.
    #[error(
        "{to:?} is too narrow for values of {}: use a wider type",
        tensors.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    )]
    Overflow {
        /// Names of the tensors.
        tensors: Vec<String>,
        /// The type.
        to: FloatDType,
    },
    /// Layers or experts were asked for that are not there.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl CheckpointError {
    pub(super) fn directory(path: &Path, reason: impl Into<String>) -> Self {
        Self::Directory { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(super) fn tensors(path: &Path, problems: Vec<String>) -> Self {
        Self::Tensors { path: path.to_path_buf(), problems }
    }
}

impl From<FileError> for CheckpointError {
    fn from(error: FileError) -> Self {
        Self::Storage(error.into())
    }
}

/// What is read of a checkpoint, and as what.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoadOptions {
    /// Type of the parameters: F32, F16 or BF16; absent: as they are stored.
    pub dtype: Option<FloatDType>,
    /// These layers only, as a model of its own; absent: all.
    pub layers: Option<Range<usize>>,
    /// The experts to read of every layer of the checkpoint, in their new order, routers cut to
    /// match; absent: all.
    pub experts: Option<Vec<Vec<usize>>>,
    /// Go on where values become infinite in a narrower type, which is refused otherwise.
    pub allow_overflow: bool,
}

/// An open checkpoint directory, of which only configuration and headers have been read.
///
/// ```
/// use burn::tensor::Device;
/// use yuan_model::{
///     YuanConfig, YuanModel,
///     hf::{HfCheckpoint, LoadOptions, SaveOptions},
/// };
///
/// let temp = tempfile::tempdir()?;
/// let directory = temp.path().join("published");
/// let model = YuanModel::new(&YuanConfig::tiny(96), &Device::flex())?;
/// model.save_hf(&directory, &SaveOptions::default())?;
///
/// // Headers are read and compared with the configuration; the weights follow with `load`.
/// let checkpoint = HfCheckpoint::open(&directory)?;
/// assert_eq!(checkpoint.config(), model.config());
/// let loaded = checkpoint.load(&Device::flex(), &LoadOptions::default())?;
/// assert_eq!(loaded.config().experts_per_layer, [8, 8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct HfCheckpoint {
    path: PathBuf,
    config: YuanConfig,
    raw_config: Value,
    shards: Shards,
    names: Names,
}

impl HfCheckpoint {
    /// Opens a directory and checks that its tensors are those of its configuration.
    ///
    /// # Errors
    ///
    /// A file that is missing or damaged; a configuration that is refused; or a list of every
    /// tensor that is missing, surplus, misshapen or of a type that parameters do not have.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (config, raw_config) = read_config(path)?;
        let shards = Shards::open(path)?;
        Self::of_files(path, config_of_files(config, &shards), raw_config, shards)
    }

    /// The language model of a directory alone: whatever image tower it has need not be one that this
    /// library knows, is not loaded, and comes along in a [copy](Self::rewrite) as it is.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_language(path: &Path) -> Result<Self, CheckpointError> {
        let (config, raw_config) = read_language_config(path)?;
        Self::of_files(path, config, raw_config, Shards::open(path)?)
    }

    /// The whole model, or the language model alone if the image tower is none that this library knows;
    /// then also why. For what copies a tower and does not run it.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), for the language model.
    pub fn open_known(path: &Path) -> Result<(Self, Option<CheckpointError>), CheckpointError> {
        match Self::open(path) {
            Ok(whole) => Ok((whole, None)),
            Err(error @ CheckpointError::Config { .. }) => {
                Self::open_language(path).map(|language| (language, Some(error)))
            }
            Err(error) => Err(error),
        }
    }

    fn of_files(
        path: &Path,
        config: YuanConfig,
        raw_config: Value,
        shards: Shards,
    ) -> Result<Self, CheckpointError> {
        let names = Names::of(&config, &raw_config, &shards);
        let checkpoint = Self { path: path.into(), config, raw_config, shards, names };
        let problems = problems(&checkpoint.config, &checkpoint.raw_config, &checkpoint.shards);
        if problems.is_empty() {
            Ok(checkpoint)
        } else {
            Err(CheckpointError::tensors(path, problems))
        }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model that it holds.
    pub fn config(&self) -> &YuanConfig {
        &self.config
    }

    /// `config.json` as it is, with the keys that this library does not know.
    pub fn raw_config(&self) -> &Value {
        &self.raw_config
    }

    /// Its files and all their tensors.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// Its tensors that are no parameters of the model: tables of angles, towers of another kind.
    pub fn extras(&self) -> impl Iterator<Item = &str> {
        extras(&self.config, &self.raw_config, &self.shards)
    }

    /// Type, shape and place of a tensor, by its name without prefix.
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.shards.get(&self.full_name(name))
    }

    /// The name of a tensor in the files; the head of a model with tied weights is its embedding.
    pub fn full_name(&self, name: &str) -> String {
        self.names.stored(name)
    }

    /// Whether the head is read from the embedding.
    pub(super) fn is_tied(&self) -> bool {
        self.names.is_tied
    }

    /// Where the files of a copy name a tensor, which has a head of its own.
    pub(super) fn name_in_copy(&self, name: &str) -> String {
        self.names.naming.full_name(name)
    }

    /// Reads one parameter: only the bytes of its tensors, one after the other.
    ///
    /// With a source of fewer [names](ParameterSource::names), a rank of a cluster reads its own
    /// experts.
    ///
    /// # Errors
    ///
    /// If a tensor is not there, cannot be read, or has values that become infinite.
    pub fn read(
        &self,
        source: &ParameterSource,
        dtype: Option<FloatDType>,
    ) -> Result<TensorData, CheckpointError> {
        self.read_with(source, dtype, false)
    }

    fn read_with(
        &self,
        source: &ParameterSource,
        dtype: Option<FloatDType>,
        allow_overflow: bool,
    ) -> Result<TensorData, CheckpointError> {
        let stored = source.names.first().and_then(|name| float_dtype(self.tensor(name)?.dtype));
        source.assemble(dtype.or(stored).unwrap_or(FloatDType::F32), |name| {
            let missing =
                || CheckpointError::tensors(&self.path, vec![format!("`{name}` is missing")]);
            let tensor = self.tensor(name).ok_or_else(missing)?;
            if tensor.shape != source.shape {
                let problem = misshapen(name, &tensor.shape, &source.shape);
                return Err(CheckpointError::tensors(&self.path, vec![problem]));
            }
            let bytes = self.shards.map(&self.full_name(name))?;
            if let Some((from, to)) = float_dtype(tensor.dtype).zip(dtype)
                && !allow_overflow
                && overflows(bytes.as_ref(), from, to)
            {
                return Err(CheckpointError::Overflow { tensors: vec![name.to_owned()], to });
            }
            Ok(Piece { dtype: tensor.dtype, bytes })
        })
    }

    /// Builds the model, or a part of it.
    ///
    /// Parameter by parameter, tensor by tensor: memory holds what is loaded so far and one tensor.
    ///
    /// # Errors
    ///
    /// Layers or experts that are not there, or a file that cannot be read.
    pub fn load(
        &self,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<YuanModel, CheckpointError> {
        let config = self.part(options)?;
        let layers = options.layers.clone().unwrap_or(0..self.config.num_layers());
        let sources = self.config.parameter_sources_of(layers, options.experts.as_deref());
        let sources: BTreeMap<&str, &ParameterSource> =
            sources.iter().map(|source| (source.path.as_str(), source)).collect();
        let model = YuanModel::new(&config, device)
            .map_err(|cause| CheckpointError::Config { path: self.path.join(CONFIG), cause })?;
        let mut result = Ok(());
        let model = named::write_parameters(model, |path, _| {
            if result.is_err() {
                return None;
            }
            let data = self.read_with(sources.get(path)?, options.dtype, options.allow_overflow);
            data.map_err(|error| result = Err(error)).ok()
        });
        result.map(|()| model)
    }

    /// The configuration of the part that the options ask for.
    fn part(&self, options: &LoadOptions) -> Result<YuanConfig, CheckpointError> {
        let mut config = self.config.clone();
        let layers = config.num_layers();
        if let Some(experts) = &options.experts {
            check_experts(&config, experts)?;
            config.experts_per_layer = experts.iter().map(Vec::len).collect();
        }
        if let Some(range) = &options.layers {
            if range.is_empty() || range.end > layers {
                return Err(ModelError::LayerCount { expected: layers, found: range.end }.into());
            }
            config.experts_per_layer = config.experts_per_layer[range.clone()].to_vec();
        }
        Ok(config)
    }
}

/// The model's configuration in a checkpoint directory.
pub(super) const CONFIG: &str = "config.json";

/// Checks that experts can be kept as listed.
pub(super) fn check_experts(config: &YuanConfig, experts: &[Vec<usize>]) -> Result<(), ModelError> {
    let layers = &config.experts_per_layer;
    if experts.len() != layers.len() {
        return Err(ModelError::LayerCount { expected: layers.len(), found: experts.len() });
    }
    let mut layers = layers.iter().zip(experts).enumerate();
    layers.try_for_each(|(layer, (&all, kept))| check_kept(layer, kept, all, config.top_k))
}

/// The configuration in a checkpoint directory, and `config.json` as it is.
///
/// # Errors
///
/// A file that cannot be read or a configuration that is refused.
pub fn read_config(directory: &Path) -> Result<(YuanConfig, Value), CheckpointError> {
    read_config_with(directory, YuanConfig::from_json)
}

/// The same of the language model alone, whatever image tower there is.
///
/// # Errors
///
/// As [`read_config`], for this part.
pub fn read_language_config(directory: &Path) -> Result<(YuanConfig, Value), CheckpointError> {
    read_config_with(directory, YuanConfig::language_from_json)
}

fn read_config_with(
    directory: &Path,
    parse: impl FnOnce(&str) -> Result<YuanConfig, ConfigError>,
) -> Result<(YuanConfig, Value), CheckpointError> {
    let path = directory.join(CONFIG);
    refuse_pointer(&path)?;
    let text = fs::read_to_string(&path).map_err(FileError::of("read", &path))?;
    let refused = |cause| CheckpointError::Config { path: path.clone(), cause };
    let config = parse(&text).map_err(refused)?;
    let raw = serde_json::from_str(&text)
        .map_err(|error| refused(ConfigError::Format(error.to_string())))?;
    Ok((config, raw))
}

/// The configuration of what the files hold: without an image tower if no tensor is one of it, for a
/// directory may hold the language model alone.
pub fn config_of_files(config: YuanConfig, shards: &Shards) -> YuanConfig {
    let naming = Naming::of(shards.names());
    let has_images = shards.names().any(|name| naming.is_of_images(name));
    YuanConfig { images: config.images.filter(|_| has_images), ..config }
}

/// Tensors that are no parameters of the model and yet belong there, such as tables of angles.
pub fn extras<'a>(
    config: &YuanConfig,
    raw_config: &Value,
    shards: &'a Shards,
) -> impl Iterator<Item = &'a str> {
    let names = Names::of(config, raw_config, shards);
    shards.names().filter(move |name| names.is_extra(name))
}

/// Everything that keeps the tensors from being those of the configuration, one sentence each.
pub fn problems(config: &YuanConfig, raw_config: &Value, shards: &Shards) -> Vec<String> {
    let found = shards.names().count();
    // A configuration can claim any number of experts; only so many names are worth forming.
    let expected = config.experts_per_layer.iter().fold(0_usize, |sum, experts| {
        sum.saturating_add(experts.saturating_mul(2)).saturating_add(8)
    });
    if expected > found.saturating_add(10_000) {
        return vec![format!(
            "the files hold {found} tensors, but config.json asks for over {expected}"
        )];
    }
    let names = Names::of(config, raw_config, shards);
    let expected = config.parameter_sources().into_iter().flat_map(|source| {
        let shape = source.shape;
        source.names.into_iter().map(move |name| (names.stored(&name), shape.clone()))
    });
    // Embedding and head may be one tensor, which is expected once.
    let mut seen = BTreeSet::new();
    let expected = expected.filter(|(name, _)| seen.insert(name.clone()));
    let found = shards.names().filter(|name| !names.is_extra(name));
    let found = found.filter_map(|name| Some((name, shards.get(name)?)));
    mismatches(expected, found, |dtype| float_dtype(dtype).is_some())
}
