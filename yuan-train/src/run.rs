//! A run: its directory, and what is in it from the first file to the trainer.
//!
//! A run directory holds, beside what the trainer writes (checkpoints, `metrics.jsonl`, plans):
//!
//! - `run.json`, the [`TrainConfig`]; it is written last, so a directory with it can be resumed,
//! - `config.json`, the model at the start of the run,
//! - `tokenizer.json` and `tokenizer_config.json`,
//! - `train.tokens` and `validation.tokens`.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, FloatDType};
use yuan_model::{
    DeviceMesh, MeshModel, YuanConfig, YuanModel,
    files::{FileError, remove_directory, write_whole},
    named,
};

use crate::{
    Checkpoint, LanguageModel, MetricsFile, Place, SpeedModel, TrainConfig, TrainError, Trainer,
    data::{RowStream, TokenStreams, Tokenizer},
    model_directory::TOKENIZER,
};

pub(crate) mod check;
pub(crate) mod new;

use check::{check_mesh, check_settings};
use new::{NewRun, Start};

/// Name of the settings' file in a run directory.
const CONFIG: &str = "run.json";
/// Name of the model's file.
const MODEL: &str = "config.json";
/// For the libraries that read a tokenizer by these files.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TOKENIZER_CONFIG_JSON: &str =
    "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"eos_token\": \"<eod>\"\n}\n";

/// A run on disk, ready to be trained or gone on with.
///
/// ```
/// use burn::tensor::Device;
/// use yuan_model::YuanConfig;
/// use yuan_train::{LaepConfig, NewRun, Run, TrainConfig, Trigger, data::Document};
///
/// // Documents are usually read from a directory: `data::read_directory`.
/// let text = "the router sends every token to the experts that it scores highest. ".repeat(20);
/// let document = |i| Document { name: format!("{i}.txt"), text: text.clone() };
/// let documents = (0..60).map(document).collect();
///
/// let config = TrainConfig {
///     steps: 2,
///     batch_size: 2,
///     seq_len: 16,
///     laep: LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() },
///     ..TrainConfig::default()
/// };
/// let temp = tempfile::tempdir()?;
/// let directory = temp.path().join("first");
/// let run = Run::create(&directory, NewRun::new(config, YuanConfig::tiny(300), documents))?;
/// run.trainer(&Device::flex().autodiff())?.run()?;
///
/// // It can be opened at any time later, and goes on from its latest checkpoint.
/// let trainer = Run::open(&directory)?.trainer(&Device::flex().autodiff())?;
/// assert_eq!(trainer.step(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    directory: PathBuf,
    config: TrainConfig,
    model: YuanConfig,
    /// To train on, and to validate with.
    tokens: [u64; 2],
}

impl Run {
    /// Prepares a run in `directory`, which must be empty or not there yet: trains the tokenizer,
    /// tokenizes the documents and writes down what the run is.
    ///
    /// # Errors
    ///
    /// If the directory is taken, a setting does not fit the model, there is too little text, or a
    /// file cannot be written; nothing of the run is then left.
    pub fn create(directory: &Path, new: NewRun) -> Result<Self, TrainError> {
        Self::check_free(directory)?;
        check_settings(&new.config, new.model())?;
        let tokenizer = new.tokenizer()?;
        let streams = TokenStreams::new(&new.documents, &tokenizer)?;
        // Too little text, and a tokenizer of another model, are found out before anything is
        // written.
        row_streams(&streams, &new.config)?;
        let model = new.model_with(&tokenizer, streams.eod)?;
        let made = make_directory(directory)?;
        let written = Self::write(directory, new, model, &tokenizer, &streams);
        if written.is_err() {
            // Half a preparation is no run. What went wrong first is what the user should hear of.
            drop(if made { remove_directory(directory) } else { empty_directory(directory) });
        }
        written
    }

    /// Whether a run may be made in a directory: it is empty or not there.
    pub fn is_free(directory: &Path) -> bool {
        Self::check_free(directory).is_ok()
    }

    /// Checks that a run may be made in a directory.
    ///
    /// # Errors
    ///
    /// If something is in it, it is a file, or it cannot be read.
    pub fn check_free(directory: &Path) -> Result<(), TrainError> {
        match directory.read_dir().map(|mut entries| entries.next().is_none()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(TrainError::RunExists(directory.to_path_buf())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(TrainError::io("use", directory)(error)),
        }
    }

    fn write(
        directory: &Path,
        new: NewRun,
        model: YuanConfig,
        tokenizer: &Tokenizer,
        streams: &TokenStreams,
    ) -> Result<Self, TrainError> {
        streams.save(directory)?;
        let text = tokenizer.to_string(true);
        let text = text.map_err(|error| TrainError::Tokenizer(error.to_string()))?;
        write_whole(&directory.join(TOKENIZER), text.as_bytes())?;
        write_whole(&directory.join(TOKENIZER_CONFIG), TOKENIZER_CONFIG_JSON.as_bytes())?;
        if let Start::From(from) = &new.start {
            // Another model's weights are the run's first checkpoint.
            let weights = from.load(&yuan_model::host_device(), Some(FloatDType::F32))?;
            Checkpoint::save_initial(directory, &weights)?;
        }
        write_whole(&directory.join(MODEL), model.to_json().as_bytes())?;
        let mut config = new.config;
        if let Some(mesh) = &new.speed_on {
            config.laep.speed = Some(SpeedModel::measure(&model, mesh, config.work())?);
        }
        let text = serde_json::to_string_pretty(&config).expect("settings are plain data");
        // Last, since a directory with this file is a run that can be resumed.
        write_whole(&directory.join(CONFIG), text.as_bytes())?;
        let tokens = [streams.train.len() as u64, streams.validation.len() as u64];
        Ok(Self { directory: directory.to_path_buf(), config, model, tokens })
    }

    /// Opens a run that was created before.
    ///
    /// # Errors
    ///
    /// If the directory holds no run, or a file of it is damaged.
    pub fn open(directory: &Path) -> Result<Self, TrainError> {
        let path = directory.join(CONFIG);
        let text = fs::read_to_string(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => {
                TrainError::NoRun(directory.to_path_buf())
            }
            _ => TrainError::io("read", &path)(error),
        })?;
        let config = serde_json::from_str(&text).map_err(|error| {
            let reason = format!("not a run's configuration: {error}");
            TrainError::Damaged { path, reason }
        })?;
        let model = YuanConfig::load(&directory.join(MODEL))?;
        let tokens = TokenStreams::sizes(directory)?;
        Ok(Self { directory: directory.to_path_buf(), config, model, tokens })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its settings.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The model at its start; a prune changes that of later checkpoints.
    pub fn model(&self) -> &YuanConfig {
        &self.model
    }

    /// Tokens to train on, and to validate with.
    pub fn tokens(&self) -> [u64; 2] {
        self.tokens
    }

    /// A trainer on one device that computes gradients (`device.autodiff()`): at the latest
    /// checkpoint, or at the start.
    ///
    /// # Errors
    ///
    /// If the run's tokens or its latest checkpoint are damaged.
    pub fn trainer(&self, device: &Device) -> Result<Trainer<YuanModel>, TrainError> {
        self.trainer_at(device, Ok)
    }

    /// The same on a mesh of devices.
    ///
    /// # Errors
    ///
    /// As [`trainer`](Self::trainer), and what [`check_mesh`] finds.
    pub fn trainer_on_mesh(&self, mesh: &DeviceMesh) -> Result<Trainer<MeshModel>, TrainError> {
        check_mesh(&self.config, &self.model, mesh)?;
        self.trainer_at(mesh, |model| Ok(MeshModel::distribute(&model, mesh)?))
    }

    /// `spread` brings a fresh model to where it is trained.
    fn trainer_at<M: LanguageModel>(
        &self,
        place: &M::Place,
        spread: impl FnOnce(YuanModel) -> Result<M, TrainError>,
    ) -> Result<Trainer<M>, TrainError> {
        let config = self.config.clone();
        let eod = self.model.tokens.eod.ok_or_else(|| {
            let path = self.directory.join(MODEL);
            TrainError::Damaged { path, reason: "eod_token_id is missing".into() }
        })?;
        let streams = row_streams(&TokenStreams::load(&self.directory, eod)?, &config)?;
        let trainer = match Checkpoint::latest(&self.directory)? {
            Some(checkpoint) => {
                Trainer::resume(config, &self.directory, place, &checkpoint, streams)?
            }
            None => {
                let home = &place.devices()[0];
                let model = spread(fresh_model(&self.model, config.seed, home)?)?;
                Trainer::new(config, &self.directory, place, model, streams)?
            }
        };
        trainer.with_callback(MetricsFile::default())
    }
}

/// A model with the weights that a run of this seed starts from, on `device`.
///
/// # Errors
///
/// If the configuration contradicts itself.
pub fn fresh_model(
    config: &YuanConfig,
    seed: u64,
    device: &Device,
) -> Result<YuanModel, TrainError> {
    // The seed of the first step (`trainer::step`); another one changes the weights of every run.
    device.seed(seed.wrapping_add(1));
    Ok(named::initialized(YuanModel::new(config, device)?))
}

/// The rows of both splits, in the order that the seed decides.
///
/// # Errors
///
/// If there are too few tokens for a row.
pub fn row_streams(
    streams: &TokenStreams,
    config: &TrainConfig,
) -> Result<[RowStream; 2], TrainError> {
    let rows = |tokens: &[u32], seed, what: &str| {
        RowStream::new(tokens.to_vec(), streams.eod, config.seq_len, seed)
            .map_err(|error| TrainError::Corpus(format!("{what}: {error}")))
    };
    Ok([
        rows(&streams.train, Some(config.seed), "too little text to train on")?,
        rows(
            &streams.validation,
            None,
            "too little text to validate on: about one file in twenty is kept for it, so bring \
             more files",
        )?,
    ])
}

/// Makes a directory, or takes an empty one; whether it was made here. Of two processes that want
/// the same new directory one is refused.
fn make_directory(directory: &Path) -> Result<bool, TrainError> {
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent).map_err(TrainError::io("create", parent))?;
    }
    match fs::create_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(TrainError::io("create", directory)(error))
        }
        Err(_) if Run::is_free(directory) => Ok(false),
        Err(_) => Err(TrainError::RunExists(directory.to_path_buf())),
    }
}

/// Removes the files and directories of a failed preparation from a directory that was empty.
fn empty_directory(directory: &Path) -> Result<(), FileError> {
    for entry in directory.read_dir().map_err(FileError::of("read", directory))?.flatten() {
        let path = entry.path();
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(FileError::of("remove", &path))?;
    }
    Ok(())
}
