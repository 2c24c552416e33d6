//! What is in a checkpoint, from its headers alone.

use std::{collections::BTreeMap, fmt, path::Path};

use serde::Serialize;
use yuan_model::{
    YuanConfig,
    hf::{self, CheckpointError, Shards},
    storage::{StoredTensor, TensorFile},
};

use crate::{
    Checkpoint, Problem, TrainError,
    diagnosis::{problems_of_run, problems_of_text},
    names,
};

/// Tensors, sizes and experts of a checkpoint, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inventory {
    /// `huggingface` or `run`.
    pub layout: &'static str,
    /// Its files of tensors.
    pub files: Vec<FileEntry>,
    /// Tensors by type.
    pub types: BTreeMap<String, TypeEntry>,
    /// Experts of every layer, by the configuration.
    pub experts_per_layer: Vec<usize>,
    /// Experts that each token visits.
    pub top_k: usize,
    /// Parameters of the model, by the configuration.
    pub parameters: u64,
    /// Parameters that one token uses, embedding and head included.
    pub active_parameters: u64,
    /// The image tower and its projector, if it sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<ImageEntry>,
    /// Elements of all tensors.
    pub stored_elements: u64,
    /// Tensors that are no parameters of the model, such as a vision tower.
    pub other_tensors: usize,
    /// What keeps it from being loaded, or a run from going on.
    pub problems: Vec<Problem>,
}

/// How a model sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageEntry {
    /// Parameters of the tower.
    pub tower: u64,
    /// Parameters of the projector.
    pub projector: u64,
    /// Pixels of a tile's side.
    pub tile_side: usize,
    /// Tiles of an image at most, the whole one that follows them aside.
    pub max_tiles: usize,
    /// Tokens of the language model that a tile takes.
    pub tokens_per_tile: usize,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileEntry {
    /// Its name.
    pub name: String,
    /// Its tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of them that the file does not have.
    pub missing_bytes: u64,
}

/// The tensors of one type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TypeEntry {
    /// How many.
    pub tensors: usize,
    /// Their elements.
    pub elements: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Inventory {
    /// Reads configuration and headers of published weights, a run or one of its checkpoints.
    ///
    /// Tensors that are missing or misshapen, and files that are cut off, are
    /// [`problems`](Self::problems).
    ///
    /// # Errors
    ///
    /// No model at all, or a configuration or header that cannot be read.
    pub fn of(path: &Path) -> Result<Self, TrainError> {
        Self::checked(path, false)
    }

    /// The same, with every file of a run read and compared with its checksum if `verify`.
    ///
    /// # Errors
    ///
    /// As [`of`](Self::of).
    pub fn checked(path: &Path, verify: bool) -> Result<Self, TrainError> {
        match Checkpoint::find(path)? {
            Some(checkpoint) => {
                let config = YuanConfig::load(&checkpoint.path.join(names::MODEL))?;
                let tensors = checkpoint.headers()?;
                let sources = config.parameter_sources().into_iter();
                let expected =
                    sources.map(|source| (source.path.clone(), source.parameter_shape()));
                let found = tensors.mismatches(expected)?.into_iter();
                let mut problems: Vec<Problem> =
                    found.map(|problem| Problem::new(problem, OF_RUN)).collect();
                if checkpoint.path != path {
                    problems.extend(problems_of_run(path, verify)?);
                } else if verify {
                    let problem = |error: TrainError| Problem::new(error.to_string(), OF_RUN);
                    problems.extend(checkpoint.verify().err().map(problem));
                }
                Ok(Self::new("run", &config, tensors.files(), problems, 0))
            }
            None => {
                let (config, raw_config) = match hf::read_config(path) {
                    // A tower of another kind is some tensors more.
                    Err(CheckpointError::Config { .. }) => hf::read_language_config(path)?,
                    read => read?,
                };
                let shards = Shards::open_headers(path)?;
                let config = hf::config_of_files(config, &shards);
                let problems = hf::problems(&config, &raw_config, &shards).into_iter();
                let mut problems: Vec<_> =
                    problems.map(|problem| Problem::new(problem, REMEDY)).collect();
                problems.extend(problems_of_text(path));
                let others = hf::extras(&config, &raw_config, &shards).count();
                Ok(Self::new("huggingface", &config, shards.files(), problems, others))
            }
        }
    }

    fn new(
        layout: &'static str,
        config: &YuanConfig,
        files: &[TensorFile],
        mut problems: Vec<Problem>,
        other_tensors: usize,
    ) -> Self {
        let mut types: BTreeMap<String, TypeEntry> = BTreeMap::new();
        let mut entries = Vec::new();
        for file in files {
            let name = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
            let bytes = file.tensors().values().map(|tensor| tensor.bytes as u64).sum();
            let missing_bytes = file.missing_bytes();
            if missing_bytes > 0 {
                let what =
                    format!("{name} is cut off: {missing_bytes} bytes of its tensors are missing");
                problems.push(Problem::new(what, REMEDY));
            }
            for tensor in file.tensors().values() {
                let entry = types.entry(format!("{:?}", tensor.dtype)).or_default();
                entry.tensors += 1;
                entry.elements += elements(tensor);
                entry.bytes += tensor.bytes as u64;
            }
            entries.push(FileEntry { name, tensors: file.tensors().len(), bytes, missing_bytes });
        }
        let count = config.parameter_count();
        Self {
            layout,
            files: entries,
            stored_elements: types.values().map(|entry| entry.elements).sum(),
            types,
            experts_per_layer: config.experts_per_layer.clone(),
            top_k: config.top_k,
            parameters: count.total(),
            active_parameters: count.active(),
            images: config.images.as_ref().map(|images| ImageEntry {
                tower: count.tower,
                projector: count.projector,
                tile_side: images.tower.image_size,
                max_tiles: images.max_tiles,
                tokens_per_tile: images.tower.tokens_per_tile(),
            }),
            other_tensors,
            problems,
        }
    }
}

fn elements(tensor: &StoredTensor) -> u64 {
    tensor.shape.iter().map(|&size| size as u64).product()
}

/// For tensors that are not as they should be.
const REMEDY: &str = "copy the file anew from where it came from, or correct config.json";
/// For those of a run's own checkpoint.
const OF_RUN: &str = "remove the checkpoint, and the run goes on from the one before";

/// A count in the unit that people say: 1.01 T, 40.2 B, 29.9 M.
fn count(number: u64) -> String {
    unit(number, &[(1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")], "")
}

fn size(bytes: u64) -> String {
    unit(bytes, &[(1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")], " bytes")
}

fn unit(number: u64, units: &[(f64, &str)], otherwise: &str) -> String {
    let number = number as f64;
    match units.iter().find(|(scale, _)| number >= *scale) {
        Some((scale, name)) => {
            let value = number / scale;
            let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
            format!("{value:.digits$}{name}")
        }
        None => format!("{number}{otherwise}"),
    }
}

/// Runs of equal counts: `16, 12 × 3, 8`.
fn runs(counts: &[usize]) -> String {
    let groups = counts.chunk_by(|a, b| a == b);
    let text = groups.map(|run| match run.len() {
        1 => run[0].to_string(),
        length => format!("{} × {length}", run[0]),
    });
    text.collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.files.iter().map(|file| file.bytes).sum();
        let layout =
            if self.layout == "run" { "checkpoint of a run" } else { "Hugging Face's layout" };
        let tensors: usize = self.files.iter().map(|file| file.tensors).sum();
        writeln!(f, "layout             {layout}, {} in {} files", size(bytes), self.files.len())?;
        writeln!(
            f,
            "parameters         {} ({}), {} active per token",
            count(self.parameters),
            self.parameters,
            count(self.active_parameters)
        )?;
        let (layers, experts) =
            (self.experts_per_layer.len(), self.experts_per_layer.iter().sum::<usize>());
        writeln!(
            f,
            "experts            {experts} in {layers} layers, {} for each token",
            self.top_k
        )?;
        writeln!(f, "experts per layer  {}", runs(&self.experts_per_layer))?;
        if let Some(images) = &self.images {
            let (tower, projector) = (count(images.tower), count(images.projector));
            let ImageEntry { tile_side: side, max_tiles, tokens_per_tile, .. } = images;
            writeln!(f, "images             a tower of {tower}, a projector of {projector}")?;
            writeln!(
                f,
                "tiles              up to {max_tiles} of {side} x {side} pixels, {tokens_per_tile} \
                 tokens each"
            )?;
        }
        writeln!(
            f,
            "tensors            {tensors}, {} of them no parameters of the model",
            self.other_tensors
        )?;
        for (name, entry) in &self.types {
            let (elements, bytes) = (count(entry.elements), size(entry.bytes));
            writeln!(f, "  {name:<16} {} tensors, {elements} elements, {bytes}", entry.tensors)?;
        }
        for file in self.files.iter().filter(|_| self.files.len() > 1) {
            writeln!(f, "  {:<16} {} tensors, {}", file.name, file.tensors, size(file.bytes))?;
        }
        match &self.problems[..] {
            [] => write!(f, "problems           none"),
            problems => {
                write!(f, "problems           {}", problems.len())?;
                problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}
