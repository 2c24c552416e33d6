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
    Checkpoint, LanguageModel, MetricsFile, ModelDirectory, Place, SpeedModel, TrainConfig,
    TrainError, Trainer, Trigger,
    data::{self, Document, RowStream, TokenStreams, Tokenizer},
    model_directory::TOKENIZER,
};

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

/// What a new run is made from.
#[derive(Debug)]
pub struct NewRun {
    config: TrainConfig,
    start: Start,
    documents: Vec<Document>,
    speed_on: Option<DeviceMesh>,
    show_progress: bool,
}

/// What the model starts as.
#[derive(Debug)]
enum Start {
    /// Fresh weights, and a tokenizer that is trained on the documents; its vocabulary and its
    /// end-of-document token go into the configuration.
    Fresh(Box<YuanConfig>),
    /// Weights and tokenizer of another model.
    From(ModelDirectory),
}

impl NewRun {
    /// A model with fresh weights and a tokenizer of up to `model.vocab_size` entries, trained on
    /// the documents.
    pub fn new(config: TrainConfig, model: YuanConfig, documents: Vec<Document>) -> Self {
        Self::with_start(config, Start::Fresh(Box::new(model)), documents)
    }

    /// Weights and tokenizer of another model: a run, one of its checkpoints, or published weights.
    pub fn from_model(
        config: TrainConfig,
        model: ModelDirectory,
        documents: Vec<Document>,
    ) -> Self {
        Self::with_start(config, Start::From(model), documents)
    }

    fn with_start(config: TrainConfig, start: Start, documents: Vec<Document>) -> Self {
        Self { config, start, documents, speed_on: None, show_progress: false }
    }

    /// Measures these devices, so that every prune comes with a prediction of the speed after it.
    #[must_use]
    pub fn with_speed_prediction(self, mesh: DeviceMesh) -> Self {
        Self { speed_on: Some(mesh), ..self }
    }

    /// Shows a progress bar while the tokenizer is trained.
    #[must_use]
    pub fn with_progress(self, show: bool) -> Self {
        Self { show_progress: show, ..self }
    }

    fn model(&self) -> &YuanConfig {
        match &self.start {
            Start::Fresh(model) => model,
            Start::From(directory) => directory.config(),
        }
    }

    /// The model with what the tokenizer says of it.
    fn model_with(&self, tokenizer: &Tokenizer, eod: u32) -> Result<YuanConfig, TrainError> {
        let refuse = |message: String| Err(TrainError::Setting(message));
        let (mut model, entries) = (self.model().clone(), tokenizer.get_vocab_size(true));
        match &self.start {
            Start::Fresh(_) => model.vocab_size = entries,
            Start::From(_) if model.vocab_size < entries => {
                let rows = model.vocab_size;
                return refuse(format!(
                    "the tokenizer has {entries} entries, the model only {rows}"
                ));
            }
            Start::From(_) => {
                if let Some(other) = model.tokens.eod.filter(|&other| other != eod) {
                    return refuse(format!(
                        "config.json says that {other} ends a document, the tokenizer {eod}"
                    ));
                }
            }
        }
        model.tokens.eod = Some(eod);
        model.validate()?;
        Ok(model)
    }

    fn tokenizer(&self) -> Result<Tokenizer, TrainError> {
        match &self.start {
            Start::Fresh(model) => {
                data::train_tokenizer(&self.documents, model.vocab_size, self.show_progress)
            }
            Start::From(directory) => {
                data::read_tokenizer(&directory.tokenizer_directory().join(TOKENIZER))
            }
        }
    }
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
        if !Self::is_free(directory) {
            return Err(TrainError::RunExists(directory.to_path_buf()));
        }
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
        match directory.read_dir() {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) => error.kind() == ErrorKind::NotFound,
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
        let Ok(text) = fs::read_to_string(&path) else {
            return Err(TrainError::NoRun(directory.to_path_buf()));
        };
        let config = serde_json::from_str(&text).map_err(|error| {
            let path = path.display();
            TrainError::Setting(format!("{path} is no run's configuration: {error}"))
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
            TrainError::Setting(format!("{}: eod_token_id is missing", path.display()))
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
    // As if the first step drew them.
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

/// Checks settings and model together, so that nothing is found out in the middle of the run.
///
/// # Errors
///
/// Names the setting that is out of range or does not fit the model.
pub fn check_settings(config: &TrainConfig, model: &YuanConfig) -> Result<(), TrainError> {
    config.validate()?;
    let (experts, top_k) = (&model.experts_per_layer, model.top_k);
    if let Some(plan) = &config.laep.plan {
        return Ok(plan.check_against(experts, top_k)?);
    }
    if config.laep.trigger != Trigger::Never {
        config.laep.limits.check_model(experts, top_k)?;
    }
    Ok(())
}

/// Checks that rows, experts and groups can be spread over the devices of a mesh.
///
/// # Errors
///
/// Names what cannot.
pub fn check_mesh(
    config: &TrainConfig,
    model: &YuanConfig,
    mesh: &DeviceMesh,
) -> Result<(), TrainError> {
    let refuse = |message: String| Err(TrainError::Setting(message));
    let (rows, devices) = (config.batch_size, mesh.devices().len());
    if !rows.is_multiple_of(devices) {
        return refuse(format!(
            "a batch of {rows} rows cannot be spread evenly over {devices} devices"
        ));
    }
    let sharing = mesh.expert();
    MeshModel::check(model, mesh)?;
    let groups = config.laep.groups;
    let is_spread = config.laep.trigger != Trigger::Never || config.laep.rearrange_every.is_some();
    if is_spread && !groups.is_multiple_of(sharing) {
        return refuse(format!(
            "{groups} groups cannot be spread over the {sharing} devices that share the experts"
        ));
    }
    Ok(())
}

/// Makes a directory, or takes an empty one; whether it was made here. Of two processes that want the
/// same new directory one is refused.
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
