//! A run: its directory, and what is in it from the first file to the trainer.
//!
//! A run directory holds, beside what the trainer writes (checkpoints, `metrics.jsonl`, plans):
//!
//! - `run.json`, the [`TrainConfig`]; it is written last, so a directory with it can be resumed,
//! - `config.json`, the model at the start of the run,
//! - `tokenizer.json` and `tokenizer_config.json`, and what else another model has beside them,
//! - `data.json`, the [`DataSets`]: where its tokens are and in which shares they are mixed; those
//!   of text that was read for this run alone are in `data`,
//! - `run.lock` while a process writes into it ([`RunLock`]).

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, FloatDType};
use yuan_files::{copy_into, write_whole};
use yuan_model::{
    YuanConfig, YuanModel, named,
    ranks::{Grid, Ranks},
};

use crate::{
    Checkpoint, Event, MetricsFile, SpeedModel, TrainConfig, TrainError, Trainer,
    data::{DataSets, RunRows, Streams},
    names::{CONFIG, MODEL, OPTIONS},
};

pub(crate) mod check;
pub(crate) mod claim;
pub(crate) mod lock;
pub(crate) mod new;

use check::{check_rows, check_settings, check_use};
use claim::Claim;
use lock::RunLock;
use new::{NewRun, PreparedData, Start};

/// For the libraries that read a tokenizer by these files.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A run on disk, ready to be trained or gone on with.
///
/// ```
/// use burn::tensor::Device;
/// use yuan_model::YuanConfig;
/// use yuan_data::Document;
/// use yuan_train::{LaepConfig, NewRun, Run, TrainConfig, Trigger};
///
/// // Documents are usually read from files: `RunData::Text`, or prepared before:
/// // `RunData::Prepared`.
/// let text = "the router sends every token to the experts that it scores highest. ".repeat(20);
/// let document = |i| Document { name: format!("{i}.txt"), text: text.clone() };
/// let documents: Vec<Document> = (0..60).map(document).collect();
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
#[derive(Debug, Clone)]
pub struct Run {
    directory: PathBuf,
    config: TrainConfig,
    model: YuanConfig,
    data: DataSets,
    /// Settings that are written when a trainer can go on with them.
    is_changed: bool,
    /// Of a run that this process made or changed; trainers take it themselves.
    lock: Option<RunLock>,
}

impl Run {
    /// Name of the file with its settings; a directory with it is a run.
    pub const SETTINGS: &'static str = CONFIG;
    /// Name of the file with the options that it was made with, if a program keeps them
    /// ([`NewRun::with_options_file`]).
    pub const OPTIONS: &'static str = OPTIONS;

    /// Prepares a run in `directory`, which must be empty or not there yet: trains the tokenizer,
    /// tokenizes the documents and writes down what the run is.
    ///
    /// # Errors
    ///
    /// If the directory is taken, a setting does not fit the model, there is too little text, or a
    /// file cannot be written; nothing of the run is then left.
    pub fn create(directory: &Path, new: NewRun<'_>) -> Result<Self, TrainError> {
        Self::create_in(Claim::take(directory)?, new)
    }

    /// The same in a directory that was taken before, so that no other process makes a run of it
    /// while the text is read.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create).
    pub fn create_in(claim: Claim, new: NewRun<'_>) -> Result<Self, TrainError> {
        check_settings(&new.config, new.model())?;
        let run = Self::write(claim.directory(), new)?;
        Ok(Self { lock: claim.done(), ..run })
    }

    fn write(directory: &Path, mut new: NewRun<'_>) -> Result<Self, TrainError> {
        if let Start::From(from) = &new.start {
            // The chat template and the tokens that end an answer stay the model's.
            from.tokenizer_files().iter().try_for_each(|file| copy_into(file, directory))?;
        }
        for (name, text) in &new.files {
            write_whole(&directory.join(name), text.as_bytes())?;
        }
        if new.config.freeze.language && !new.has_images() {
            return Err(TrainError::NothingLearns);
        }
        let PreparedData { sets: data, tokenizer, tokenizer_file, eod } = new.prepare(directory)?;
        let model = new.model_with(&tokenizer, eod)?;
        // Too little text is found out before a model is written.
        if !data.learns_from_rewards() {
            data.streams(directory, &new.config, eod, model.vocab_size)?;
        }
        data.save(directory)?;
        match &new.start {
            Start::Fresh(_) => {
                copy_into(&tokenizer_file, directory)?;
                let config = serde_json::json!({
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "eos_token": tokenizer.id_to_token(eod),
                });
                let config = serde_json::to_string_pretty(&config).expect("texts are plain data");
                write_whole(&directory.join(TOKENIZER_CONFIG), config.as_bytes())?;
            }
            Start::From(from) => {
                // Its weights are the run's first checkpoint.
                let weights = from.load(&yuan_model::host_device(), Some(FloatDType::F32))?;
                let weights = match new.isolate_documents {
                    true => weights.with_isolated_documents(),
                    false => weights,
                };
                let rule = model.image_positions();
                let weights = match rule {
                    Some(rule) => weights.with_image_positions(rule),
                    None => weights,
                };
                Checkpoint::save_initial(directory, &weights)?;
            }
        }
        write_whole(&directory.join(MODEL), model.to_json().as_bytes())?;
        let config = new.config;
        let directory = directory.to_path_buf();
        let run = Self { directory, config, model, data, is_changed: false, lock: None };
        // Last, since a directory with this file is a run that can be resumed.
        run.write_config()?;
        Ok(run)
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
                match directory.join(RunLock::FILE).exists() {
                    true => TrainError::Unprepared(directory.to_path_buf()),
                    false => TrainError::NoRun(directory.to_path_buf()),
                }
            }
            _ => TrainError::io("read", &path)(error),
        })?;
        let damaged = |reason: String| TrainError::Damaged { path: path.clone(), reason };
        let config: TrainConfig = serde_json::from_str(&text)
            .map_err(|error| damaged(format!("not a run's configuration: {error}")))?;
        let model = YuanConfig::load(&directory.join(MODEL))?;
        check_use(&config, &model).map_err(|error| damaged(error.to_string()))?;
        if directory.join("train.tokens").is_file() && !directory.join(DataSets::FILE).is_file() {
            return Err(TrainError::EarlierRun(directory.to_path_buf()));
        }
        let data = DataSets::load(directory)?;
        let directory = directory.to_path_buf();
        Ok(Self { directory, config, model, data, is_changed: false, lock: None })
    }

    /// Changes settings of a run that is not being trained, from the next trainer on: the number of
    /// steps, how often it is validated and kept, and the groups of experts with the multiple that
    /// they need. The learning rate follows the schedule of the new number of steps; the metrics
    /// tell of the change when the run goes on.
    ///
    /// # Errors
    ///
    /// [`TrainError::FixedSetting`] names another setting that differs; and if a new value is out
    /// of range, another process has the run, or the settings cannot be read or written.
    pub fn reconfigure(&mut self, change: impl FnOnce(&mut TrainConfig)) -> Result<(), TrainError> {
        let lock = RunLock::take(&self.directory)?;
        // Another process may have changed them since.
        let current = Self::open(&self.directory)?.config;
        let mut config = current.clone();
        change(&mut config);
        self.lock = Some(lock);
        if config != current {
            if let Some(name) = check::fixed_setting(&current, &config) {
                return Err(TrainError::FixedSetting(name));
            }
            check_settings(&config, &self.model)?;
        }
        self.is_changed = config != current;
        self.config = config;
        Ok(())
    }

    fn write_config(&self) -> Result<(), TrainError> {
        Ok(write_whole(&self.directory.join(CONFIG), text_of(&self.config).as_bytes())?)
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
        self.data.tokens()
    }

    /// The data sets that it learns.
    pub fn data(&self) -> &DataSets {
        &self.data
    }

    /// The same run, which other processes may train from now on; settings that were changed are
    /// written for them.
    ///
    /// # Errors
    ///
    /// If the settings cannot be written.
    pub fn unlocked(self) -> Result<Self, TrainError> {
        if self.is_changed {
            self.write_config()?;
        }
        Ok(Self { lock: None, is_changed: false, ..self })
    }

    /// A trainer on one device that computes gradients (`device.autodiff()`): at the latest
    /// checkpoint, or at the start.
    ///
    /// # Errors
    ///
    /// If the run's tokens or its latest checkpoint are damaged.
    pub fn trainer(&self, device: &Device) -> Result<Trainer<YuanModel>, TrainError> {
        self.trainer_with(device, |config| Ok(self.streams(config)?.into()))
    }

    /// The same with rows that are made in another way than from data sets.
    ///
    /// # Errors
    ///
    /// As [`trainer`](Self::trainer), and what `rows` fails with.
    pub fn trainer_with(
        &self,
        device: &Device,
        rows: impl FnOnce(&TrainConfig) -> Result<RunRows<YuanModel>, TrainError>,
    ) -> Result<Trainer<YuanModel>, TrainError> {
        // Before anything is read that another process may be about to change.
        let _lock = RunLock::take(&self.directory)?;
        let config = self.with_speed(self.current_config()?, device, None)?;
        let rows = rows(&config)?;
        let trainer = match Checkpoint::latest(&self.directory)? {
            Some(checkpoint) => Trainer::resume(config, &self.directory, device, &checkpoint, rows)
                .map_err(|error| self.with_way_out(error, &checkpoint))?,
            None if tells_of_checkpoints(&self.directory) => {
                return Err(TrainError::CheckpointsGone(self.directory.clone()));
            }
            None => {
                let model = fresh_model(&self.model, config.seed, device)?;
                Trainer::new(config, &self.directory, device, model, rows)?
            }
        };
        let trainer = trainer.with_callback(MetricsFile::default())?;
        self.write_current(trainer.config())?;
        Ok(trainer)
    }

    /// The same on one of several ranks, with its device; all of them call it together. The first
    /// one writes the files of the run. A fresh model is drawn on the first rank's device, parameter by
    /// parameter.
    ///
    /// # Errors
    ///
    /// As [`trainer`](Self::trainer), if there are too few rows or experts for the ranks, or if one
    /// is gone.
    pub fn trainer_on_rank(
        &self,
        device: &Device,
        ranks: &Ranks,
    ) -> Result<Trainer<YuanModel>, TrainError> {
        self.trainer_on_rank_with(device, ranks, |config| Ok(self.streams(config)?.into()))
    }

    /// The same with rows that are made in another way than from data sets.
    ///
    /// # Errors
    ///
    /// As [`trainer_on_rank`](Self::trainer_on_rank), and what `rows` fails with.
    pub fn trainer_on_rank_with(
        &self,
        device: &Device,
        ranks: &Ranks,
        rows: impl FnOnce(&TrainConfig) -> Result<RunRows<YuanModel>, TrainError>,
    ) -> Result<Trainer<YuanModel>, TrainError> {
        check_rows(&self.config, ranks.grid())?;
        let is_first = ranks.world().is_first();
        // Before anything is read that another process may be about to change.
        let lock = if is_first { Some(RunLock::take(&self.directory)?) } else { None };
        ranks.world().barrier()?;
        let config = self.current_config()?;
        ranks.world().agree("settings of the run", text_of(&config).as_bytes())?;
        let config = self.with_speed(config, device, Some(ranks))?;
        let rows = rows(&config)?;
        let latest = Checkpoint::latest(&self.directory)?;
        let step = latest.as_ref().map_or(0, |latest| latest.step);
        ranks.world().agree("latest checkpoint", &step.to_le_bytes())?;
        let trainer = match latest {
            Some(latest) => {
                let directory = &self.directory;
                Trainer::resume_on_rank(config, directory, device, ranks, &latest, rows)
                    .map_err(|error| self.with_way_out(error, &latest))?
            }
            None if tells_of_checkpoints(&self.directory) => {
                return Err(TrainError::CheckpointsGone(self.directory.clone()));
            }
            None => {
                let empty = YuanModel::new_on_rank(&self.model, ranks, device)?;
                let whole = match is_first {
                    true => Some(undrawn_model(&self.model, config.seed, &device.clone().inner())?),
                    false => None,
                };
                let model = empty.filled_from_first(whole)?;
                Trainer::new(config, &self.directory, device, model, rows)?
            }
        };
        drop(lock);
        match is_first {
            true => {
                let trainer = trainer.with_callback(MetricsFile::default())?;
                self.write_current(trainer.config())?;
                Ok(trainer)
            }
            false => Ok(trainer),
        }
    }

    /// Measures what the devices sustain, if the run wants predictions of speed and was not measured
    /// on as many ranks yet; the same numbers on all of them.
    fn with_speed(
        &self,
        mut config: TrainConfig,
        device: &Device,
        ranks: Option<&Ranks>,
    ) -> Result<TrainConfig, TrainError> {
        let grid = ranks.map_or(Grid::ONE, Ranks::grid);
        let laep = &mut config.laep;
        // What the images of a batch cost is not predicted.
        let is_known = self.model.images.is_none();
        if is_known
            && laep.predict_speed
            && !laep.speed.as_ref().is_some_and(|speed| speed.is_of(grid))
        {
            let work = config.work();
            config.laep.speed = Some(SpeedModel::measure(&self.model, device, ranks, work)?);
        }
        Ok(config)
    }

    /// The settings as they are now: another process may have changed them since this one opened the
    /// run.
    fn current_config(&self) -> Result<TrainConfig, TrainError> {
        match self.is_changed {
            true => Ok(self.config.clone()),
            false => Ok(Self::open(&self.directory)?.config),
        }
    }

    /// Writes down the settings that a trainer begins with, if they are not those that the run has.
    fn write_current(&self, config: &TrainConfig) -> Result<(), TrainError> {
        match self.is_changed || *config != self.config {
            true => Self { config: config.clone(), ..self.clone() }.write_config(),
            false => Ok(()),
        }
    }

    fn streams(&self, config: &TrainConfig) -> Result<Streams, TrainError> {
        let eod = self.model.tokens.eod.ok_or_else(|| {
            let path = self.directory.join(MODEL);
            TrainError::Damaged { path, reason: "eod_token_id is missing".into() }
        })?;
        self.data.streams(&self.directory, config, eod, self.model.vocab_size)
    }
}

impl Run {
    /// Adds to the error of a damaged checkpoint which one is whole, and how to go on from it.
    fn with_way_out(&self, error: TrainError, latest: &Checkpoint) -> TrainError {
        // Anything else, such as a device that is missing, is no fault of the checkpoint.
        if latest.state().is_ok() && latest.verify().is_ok() {
            return error;
        }
        let earlier = Checkpoint::list(&self.directory).unwrap_or_default().into_iter();
        let mut earlier = earlier.filter(|other| other.step < latest.step);
        match earlier.rfind(|other| other.state().is_ok() && other.verify().is_ok()) {
            Some(good) => TrainError::LatestDamaged {
                cause: Box::new(error),
                latest: latest.path.clone(),
                good: good.path,
            },
            None => error,
        }
    }
}

fn text_of(config: &TrainConfig) -> String {
    serde_json::to_string_pretty(config).expect("settings are plain data")
}

/// Whether the metrics of a run say that it had a checkpoint.
fn tells_of_checkpoints(run_dir: &Path) -> bool {
    let metrics = fs::read_to_string(run_dir.join(MetricsFile::NAME)).unwrap_or_default();
    let mut events = metrics.lines().filter_map(|line| serde_json::from_str(line).ok());
    events.any(|event| matches!(event, Event::Checkpoint { .. }))
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
    Ok(named::initialized(undrawn_model(config, seed, device)?))
}

/// The same before any of its weights is drawn, which their first use does.
fn undrawn_model(config: &YuanConfig, seed: u64, device: &Device) -> Result<YuanModel, TrainError> {
    // The seed of the first step (`trainer::step`); another one changes the weights of every run.
    device.seed(seed.wrapping_add(1));
    Ok(YuanModel::new(config, device)?)
}
