//! The files of a checkpoint directory as one set of tensors.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path},
};

use serde_json::Value;

use super::CheckpointError;
use crate::storage::{MappedTensor, StoredTensor, TensorFile, refuse_pointer};
use yuan_files::FileError;

/// Weights that fit into one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Which tensor is in which file.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// All tensors of a directory, of whose files only the headers have been read.
#[derive(Debug)]
pub struct Shards {
    files: Vec<TensorFile>,
    file_of: BTreeMap<String, usize>,
}

impl Shards {
    /// Whether a directory holds published weights: one of the files that [`open`](Self::open)
    /// looks for.
    pub fn are_in(directory: &Path) -> bool {
        [SINGLE, INDEX].iter().any(|name| directory.join(name).is_file())
    }

    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    ///
    /// Neither is there, a file is damaged or cut off, or index and files disagree about what is
    /// where.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(directory, TensorFile::open)
    }

    /// The same from headers alone: the tensors themselves may be missing.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), less files that are cut off.
    pub fn open_headers(directory: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(directory, TensorFile::open_header)
    }

    fn open_with(
        directory: &Path,
        open: impl Fn(&Path) -> Result<TensorFile, crate::storage::StorageError>,
    ) -> Result<Self, CheckpointError> {
        let single = directory.join(SINGLE);
        if single.is_file() {
            let file = open(&single)?;
            let file_of = file.tensors().keys().map(|name| (name.clone(), 0)).collect();
            return Ok(Self { files: vec![file], file_of });
        }
        let index_path = directory.join(INDEX);
        if !index_path.is_file() {
            let reason = format!("it holds neither {SINGLE} nor {INDEX}");
            return Err(CheckpointError::directory(directory, reason));
        }
        let index = read_index(&index_path)?;
        let names: BTreeSet<&String> = index.values().collect();
        let files: Vec<TensorFile> =
            names.iter().map(|name| open(&directory.join(name))).collect::<Result<_, _>>()?;
        let mut wrong = Vec::new();
        let mut file_of = BTreeMap::new();
        for (number, (file, name)) in files.iter().zip(&names).enumerate() {
            for tensor in file.tensors().keys() {
                match index.get(tensor) {
                    None => wrong.push(format!("`{tensor}` is in {name} but not in the index")),
                    Some(expected) if expected != *name => {
                        wrong.push(format!(
                            "`{tensor}` is in {name}, but the index says {expected}"
                        ));
                    }
                    Some(_) => drop(file_of.insert(tensor.clone(), number)),
                }
            }
        }
        let absent = index.iter().filter(|(tensor, _)| !file_of.contains_key(*tensor));
        wrong
            .extend(absent.map(|(tensor, name)| {
                format!("`{tensor}` is not in {name}, where the index says")
            }));
        if wrong.is_empty() {
            Ok(Self { files, file_of })
        } else {
            Err(CheckpointError::tensors(directory, wrong))
        }
    }

    /// The files.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// Type, shape and place of a tensor.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.files[*self.file_of.get(name)?].tensors().get(name)
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    ///
    /// If it is not there or cannot be mapped.
    pub fn map(&self, name: &str) -> Result<MappedTensor, CheckpointError> {
        match self.file_of.get(name) {
            Some(&file) => Ok(self.files[file].map(name)?),
            None => Err(CheckpointError::Tensors {
                path: self.files.first().map_or_else(Default::default, |file| file.path().into()),
                problems: vec![format!("`{name}` is missing")],
            }),
        }
    }
}

/// File of every tensor; all of them plain names, so that no index can point out of its directory.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    refuse_pointer(path)?;
    let text = fs::read_to_string(path).map_err(FileError::of("read", path))?;
    let refuse = |reason: String| CheckpointError::directory(path, reason);
    let index: Value =
        serde_json::from_str(&text).map_err(|error| refuse(format!("it is no JSON: {error}")))?;
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(refuse("it has no `weight_map`".into()));
    };
    let plain = |file: &str| {
        let mut parts = Path::new(file).components();
        matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
    };
    let entry = |(tensor, file): (&String, &Value)| match file.as_str() {
        Some(file) if plain(file) => Ok((tensor.clone(), file.to_owned())),
        _ => Err(refuse(format!(
            "`weight_map` says that `{tensor}` is in {file}; expected a file name"
        ))),
    };
    map.iter().map(entry).collect()
}
