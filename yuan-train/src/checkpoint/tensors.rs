//! The tensors of a checkpoint, whoever wrote them: any elements of any of them.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

use burn::tensor::{DType, TensorData};
use yuan_model::storage::{self, Dtype, StorageError, StoredTensor, TensorFile};

use super::{
    index::{Entry, Index, Piece, files_of},
    state::{MODEL, OPTIMIZER, STATE, STEP, damaged},
};
use crate::TrainError;

/// Parameters or moments.
pub(crate) struct Tensors {
    directory: PathBuf,
    /// One file, or that of every rank.
    files: Vec<TensorFile>,
    index: Option<Index>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Model,
    Optimizer,
}

impl Tensors {
    /// Opens the files, which must be of this step; those of earlier versions do not say.
    pub fn open(directory: &Path, kind: Kind, step: Option<u64>) -> Result<Self, TrainError> {
        let tensors = Self::open_by(directory, kind, TensorFile::open)?;
        for file in &tensors.files {
            if let (Some(found), Some(step)) = (file.metadata().get(STEP), step)
                && *found != step.to_string()
            {
                let name = file.path().file_name().unwrap_or_default().to_string_lossy();
                let reason = format!("{name} is of step {found}, but {STATE} of step {step}");
                return Err(damaged(directory, reason));
            }
        }
        Ok(tensors)
    }

    /// Reads the headers alone, of files that may be cut off.
    pub fn open_headers(directory: &Path, kind: Kind) -> Result<Self, TrainError> {
        Self::open_by(directory, kind, TensorFile::open_header)
    }

    fn open_by(
        directory: &Path,
        kind: Kind,
        open: fn(&Path) -> Result<TensorFile, StorageError>,
    ) -> Result<Self, TrainError> {
        let index = Index::load(directory)?;
        let single = [MODEL, OPTIMIZER][kind as usize].to_owned();
        let of_rank = |rank| files_of(rank)[kind as usize].clone();
        // The first file that is missing ends it, however many are said to be there.
        let files = match &index {
            Some(index) => (0..index.ranks)
                .map(|rank| open(&directory.join(of_rank(rank))))
                .collect::<Result<_, _>>()?,
            None => vec![open(&directory.join(single))?],
        };
        Ok(Self { directory: directory.to_path_buf(), files, index })
    }

    /// The files.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Refuses tensors that are not the expected parameters.
    pub fn check(
        &self,
        expected: impl IntoIterator<Item = (String, Vec<usize>)>,
    ) -> Result<(), TrainError> {
        let mut wrong = self.mismatches(expected)?;
        if wrong.is_empty() {
            return Ok(());
        }
        wrong.sort_unstable();
        let name = if self.index.is_some() { Index::FILE } else { MODEL };
        Err(damaged(&self.directory, format!("{name}: {}", wrong.join("; "))))
    }

    /// What keeps these tensors from being the expected parameters, one sentence each.
    pub fn mismatches(
        &self,
        expected: impl IntoIterator<Item = (String, Vec<usize>)>,
    ) -> Result<Vec<String>, TrainError> {
        let Some(index) = &self.index else { return Ok(self.files[0].mismatches(expected)) };
        let of_entry = |(path, entry): (&String, &Entry)| {
            let (shape, dtype) = (entry.shape.clone(), self.dtype(path, entry)?);
            Ok((path.clone(), StoredTensor { dtype, shape, offset: 0, bytes: 0 }))
        };
        let found: BTreeMap<String, StoredTensor> =
            index.parameters.iter().map(of_entry).collect::<Result<_, TrainError>>()?;
        let found = found.iter().map(|(path, tensor)| (path.as_str(), tensor));
        Ok(storage::mismatches(expected, found, |dtype| dtype_of(dtype).is_some()))
    }

    fn dtype(&self, path: &str, entry: &Entry) -> Result<Dtype, TrainError> {
        let first =
            entry.pieces.first().and_then(|piece| self.files[piece.rank].tensors().get(path));
        let missing = || damaged(&self.directory, format!("`{path}` is missing"));
        Ok(first.ok_or_else(missing)?.dtype)
    }

    /// The shape of a tensor of the whole model, if it is there; `suffix` tells a moment from its
    /// parameter.
    pub fn shape(&self, path: &str, suffix: Option<&str>) -> Option<Vec<usize>> {
        match &self.index {
            Some(index) => {
                let entry = index.parameters.get(path)?;
                (suffix.is_none() || entry.moments).then(|| entry.shape.clone())
            }
            None => self.files[0].tensors().get(&name_of(path, suffix)).map(|t| t.shape.clone()),
        }
    }

    /// The type of a parameter.
    pub fn dtype_of(&self, path: &str) -> Option<DType> {
        let file = match &self.index {
            Some(index) => &self.files[index.parameters.get(path)?.pieces.first()?.rank],
            None => &self.files[0],
        };
        dtype_of(file.tensors().get(path)?.dtype)
    }

    /// Elements of a tensor, counted through all of it, one after the other.
    pub fn read(
        &self,
        path: &str,
        suffix: Option<&str>,
        elements: Range<usize>,
    ) -> Result<TensorData, TrainError> {
        let name = name_of(path, suffix);
        let Some(index) = &self.index else {
            return self.read_from(&self.files[0], &name, elements);
        };
        let missing = || damaged(&self.directory, format!("`{name}` is missing"));
        let entry = index.parameters.get(path).ok_or_else(missing)?;
        if elements.is_empty() {
            return Ok(TensorData::new(Vec::<f32>::new(), [0]));
        }
        let mut parts = Vec::new();
        for &Piece { rank, start, end } in &entry.pieces {
            let (from, to) = (start.max(elements.start), end.min(elements.end));
            if from < to {
                let within = from - start..to - start;
                parts.push(self.read_from(&self.files[rank], &name, within)?);
            }
        }
        if parts.len() == 1 {
            return Ok(parts.swap_remove(0));
        }
        let dtype = parts.first().ok_or_else(missing)?.dtype();
        if parts.iter().any(|part| part.dtype() != dtype) {
            return Err(damaged(&self.directory, format!("`{name}` is of several types")));
        }
        let bytes: Vec<u8> = parts.iter().flat_map(TensorData::as_bytes).copied().collect();
        Ok(TensorData::from_bytes_vec(bytes, [elements.len()], dtype))
    }

    fn read_from(
        &self,
        file: &TensorFile,
        name: &str,
        elements: Range<usize>,
    ) -> Result<TensorData, TrainError> {
        let bytes = file.map(name)?;
        let stored = &file.tensors()[name];
        let dtype = dtype_of(stored.dtype).ok_or_else(|| {
            damaged(file.path(), format!("`{name}` is {:?}, which no parameter is", stored.dtype))
        })?;
        let (size, held) = (dtype.size(), bytes.as_ref());
        let part = held.get(elements.start * size..elements.end * size).ok_or_else(|| {
            let found = held.len() / size;
            let reason = format!("`{name}` has {found} elements, expected {}", elements.end);
            damaged(file.path(), reason)
        })?;
        Ok(TensorData::from_bytes_vec(part.to_vec(), [elements.len()], dtype))
    }
}

fn name_of(path: &str, suffix: Option<&str>) -> String {
    match suffix {
        Some(suffix) => format!("{path}.{suffix}"),
        None => path.to_owned(),
    }
}

fn dtype_of(stored: Dtype) -> Option<DType> {
    match stored {
        Dtype::F64 => Some(DType::F64),
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}
