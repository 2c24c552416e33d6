//! The options of commands that write weights: their type, their files, and whether they may
//! replace what is there.

use std::path::{Path, PathBuf};

use anyhow::bail;
use burn::tensor::FloatDType;
use clap::Args;
use yuan::{
    files::is_free,
    model::{
        hf::{HfCheckpoint, SaveOptions, Saved, Shards, parse_shard_size},
        storage::parse_float_dtype,
    },
    train::{Checkpoint, ModelDirectory, Run, RunLock},
};

use crate::console::Console;

/// How weights are written.
#[derive(Args)]
#[command(next_help_heading = "Output")]
pub struct WeightOptions {
    /// Type of the weights: f32, f16 or bf16; default: as they are
    #[arg(long, value_name = "TYPE", value_parser = parse_float_dtype)]
    pub dtype: Option<FloatDType>,
    /// Largest size of one file, such as 5GB or 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_shard_size)]
    shard_size: u64,
    /// Replace TO if it exists
    #[arg(long)]
    overwrite: bool,
    /// Write f16 or bf16 although values are too large for it and become infinite
    #[arg(long)]
    allow_overflow: bool,
}

impl WeightOptions {
    /// Refuses to write where something is that may not be replaced: without `--overwrite`
    /// anything, with it whatever is no model, the model that is read, and a run that is trained.
    /// A run that is replaced is locked for as long as what is returned lives.
    pub fn check_free(&self, from: &Path, to: &Path) -> anyhow::Result<Option<RunLock>> {
        let shown = to.display();
        if !to.exists() {
            return Ok(None);
        }
        if !to.is_dir() {
            bail!("{shown} is a file: name a directory to write");
        }
        if !self.overwrite {
            bail!("{shown} already exists: add --overwrite to replace it");
        }
        let [source, target] = [from, to].map(Path::canonicalize);
        if source?.starts_with(target?) {
            bail!("{shown} holds {}, which is read: name another directory", from.display());
        }
        // It may be a run, one in preparation, or a checkpoint of one.
        let is_run = |directory: &Path| {
            [Run::SETTINGS, RunLock::FILE].iter().any(|name| directory.join(name).exists())
        };
        let above = to.canonicalize()?.parent().map(Path::to_path_buf);
        let mut runs =
            [Some(to), above.as_deref()].into_iter().flatten().filter(|path| is_run(path));
        let lock = runs.next().map(RunLock::take).transpose()?;
        if !is_free(to) && !holds_only_a_model(to)? {
            bail!("{shown} is no directory of a model alone, and --overwrite replaces only those");
        }
        Ok(lock)
    }

    /// The options for the library, with files that go beside the weights.
    pub fn save_options(&self, side_files: Vec<PathBuf>) -> SaveOptions {
        SaveOptions {
            dtype: self.dtype,
            shard_size: self.shard_size,
            overwrite: self.overwrite,
            side_files,
            allow_overflow: self.allow_overflow,
        }
    }

    /// Says which tensors have values that became infinite, if that was allowed.
    pub fn warn(&self, saved: &Saved, console: &Console) {
        for name in &saved.overflowed {
            console.note(format_args!("`{name}` has values that became infinite"));
        }
    }
}

/// Opens a model whose weights are copied; an image tower that this program does not know comes along as
/// it is.
pub fn open(path: &Path, console: &Console) -> anyhow::Result<ModelDirectory> {
    if Checkpoint::find(path)?.is_some() {
        return Ok(ModelDirectory::open(path)?);
    }
    let (checkpoint, unknown) = HfCheckpoint::open_known(path)?;
    if let Some(error) = unknown {
        console.note(format_args!("The image tower is copied as it is: {error}"));
    }
    Ok(ModelDirectory::Hf(Box::new(checkpoint)))
}

/// Whether a directory has weights or checkpoints in it, and no directories but those.
fn holds_only_a_model(directory: &Path) -> anyhow::Result<bool> {
    let has_weights =
        Shards::are_in(directory) || matches!(Checkpoint::find(directory), Ok(Some(_)));
    for entry in directory.read_dir()? {
        let path = entry?.path();
        if path.is_dir() && !path.join("state.json").is_file() {
            return Ok(false);
        }
    }
    Ok(has_weights && directory.join("config.json").is_file())
}
