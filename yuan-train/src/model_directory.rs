//! Any directory that holds a model: a run, one of its checkpoints, or published weights.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType};
use yuan_files::{copy_into, create_parent, write_directory};
use yuan_model::{
    YuanConfig, YuanModel,
    hf::{self, CheckpointError, HfCheckpoint, LoadOptions},
    named,
};

use crate::{
    Checkpoint, TrainError,
    names::{MODEL, TOKENIZER, TOKENIZER_FILES},
};

/// A directory with a model, of which only headers have been read.
#[derive(Debug)]
pub enum ModelDirectory {
    /// A checkpoint of a run, the latest if the run was named.
    Run {
        /// The checkpoint.
        checkpoint: Checkpoint,
        /// Its configuration.
        config: Box<YuanConfig>,
    },
    /// A checkpoint in upstream's layout.
    Hf(Box<HfCheckpoint>),
}

impl ModelDirectory {
    /// Recognises what the directory is.
    ///
    /// # Errors
    ///
    /// It holds no model, or a damaged one.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        match Checkpoint::find(path)? {
            Some(checkpoint) => {
                let config = YuanConfig::load(&checkpoint.path.join(MODEL))?;
                Ok(Self::Run { checkpoint, config: Box::new(config) })
            }
            None => Ok(Self::Hf(Box::new(HfCheckpoint::open(path)?))),
        }
    }

    /// The model that it holds.
    pub fn config(&self) -> &YuanConfig {
        match self {
            Self::Run { config, .. } => config,
            Self::Hf(checkpoint) => checkpoint.config(),
        }
    }

    /// Loads the model, its parameters as they are stored or in another type.
    ///
    /// # Errors
    ///
    /// A damaged file, every tensor that is missing, surplus or misshapen, values that become
    /// infinite in another type, or a type that the device does not compute in.
    pub fn load(
        &self,
        device: &Device,
        dtype: Option<FloatDType>,
    ) -> Result<YuanModel, TrainError> {
        if let Some(dtype) = dtype.filter(|&dtype| !device.supports_dtype(dtype)) {
            return Err(TrainError::Precision(dtype));
        }
        match self {
            Self::Run { checkpoint, .. } => {
                let model: YuanModel = checkpoint.load_model(device)?;
                let Some(dtype) = dtype else { return Ok(model) };
                let tensors = hf::overflowing(&model, dtype);
                if !tensors.is_empty() {
                    return Err(CheckpointError::Overflow { tensors, to: dtype }.into());
                }
                Ok(named::cast_parameters(model, dtype))
            }
            Self::Hf(checkpoint) => {
                Ok(checkpoint.load(device, &LoadOptions { dtype, ..LoadOptions::default() })?)
            }
        }
    }

    /// Where the tokenizer's files are: with published weights, or in the run.
    pub fn tokenizer_directory(&self) -> PathBuf {
        match self {
            Self::Run { checkpoint, .. } if !checkpoint.path.join(TOKENIZER).is_file() => {
                let path = &checkpoint.path;
                match (path.file_name(), path.parent()) {
                    (Some(_), Some(run)) => run.to_path_buf(),
                    // Of `.` and the like.
                    _ => path.join(".."),
                }
            }
            Self::Run { checkpoint, .. } => checkpoint.path.clone(),
            Self::Hf(checkpoint) => checkpoint.path().to_path_buf(),
        }
    }

    /// The tokenizer's files, as far as they are there.
    pub fn tokenizer_files(&self) -> Vec<PathBuf> {
        let directory = self.tokenizer_directory();
        TOKENIZER_FILES
            .map(|name| directory.join(name))
            .into_iter()
            .filter(|path| path.is_file())
            .collect()
    }

    /// Writes a directory that holds a model as a run does at its first step: `config.json`,
    /// `checkpoint-00000000` with a fresh optimizer, and copies of the listed files.
    ///
    /// # Errors
    ///
    /// If it cannot be written; what was there before stays.
    pub fn write_run(
        directory: &Path,
        model: &YuanModel,
        side_files: &[PathBuf],
    ) -> Result<(), TrainError> {
        create_parent(directory)?;
        write_directory(directory, |unfinished| {
            side_files.iter().try_for_each(|file| copy_into(file, unfinished))?;
            let config = unfinished.join(MODEL);
            std::fs::write(&config, model.config().to_json())
                .map_err(TrainError::io("write", &config))?;
            Checkpoint::save_initial(unfinished, model).map(drop)
        })
    }
}
