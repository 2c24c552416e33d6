//! Tensors in safetensors files: read by mapping one at a time, written one at a time.
//!
//! Files are untrusted: a header is checked against the length of its file before anything is
//! allocated or mapped, and every problem is an error that names the file.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, sync_channel},
    thread,
};

use burn::tensor::{DType, FloatDType, TensorData};
pub use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use yuan_files::{Checksum, FileError, Summing};

use crate::ops::host::HostPart;

mod header;
mod mapping;
mod tensor;

pub use mapping::MappedTensor;
use mapping::ReadAhead;
pub use tensor::StoredTensor;

/// Why a file of tensors could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is no safetensors file, or a damaged one.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl StorageError {
    fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// An open safetensors file, of which only the header has been read.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, StoredTensor>,
    metadata: BTreeMap<String, String>,
    missing_bytes: u64,
    read_ahead: ReadAhead,
}

impl TensorFile {
    /// Reads the header of a complete file.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, is cut off or too long, or whose header is damaged: no JSON, a
    /// tensor twice, offsets that overlap, leave gaps or disagree with shape and type.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        let file = Self::open_header(path)?;
        match file.missing_bytes {
            0 => Ok(file),
            missing => Err(StorageError::damaged(
                path,
                format!("the file is cut off: {missing} bytes of its tensors are missing"),
            )),
        }
    }

    /// Reads the header only, of a file whose tensors may be [missing](Self::missing_bytes) in
    /// part.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), less the cut.
    pub fn open_header(path: &Path) -> Result<Self, StorageError> {
        let mut file = File::open(path).map_err(FileError::of("read", path))?;
        let length = file.metadata().map_err(FileError::of("read", path))?.len();
        let damaged = |reason: String| StorageError::damaged(path, reason);
        let mut size = [0; 8];
        if length < 8 {
            return Err(damaged(format!("{length} bytes are no safetensors file")));
        }
        refuse_pointer(path)?;
        file.read_exact(&mut size).map_err(FileError::of("read", path))?;
        let size = u64::from_le_bytes(size);
        if size > header::LARGEST || size > length - 8 {
            return Err(damaged(format!(
                "its header of {size} bytes does not fit the file's {length}: not a safetensors file, or cut off"
            )));
        }
        let mut text = vec![0; size as usize];
        file.read_exact(&mut text).map_err(FileError::of("read", path))?;
        let start = 8 + size;
        let (tensors, metadata) = header::parse(&text, start).map_err(damaged)?;
        let end = tensors
            .values()
            .map(|tensor| tensor.offset + tensor.bytes as u64)
            .max()
            .unwrap_or(start);
        if end < length {
            return Err(damaged(format!("{} bytes follow its last tensor", length - end)));
        }
        Ok(Self {
            path: path.into(),
            file,
            tensors,
            metadata,
            missing_bytes: end - length,
            read_ahead: ReadAhead::default(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in it, by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// What else the header says, text by key.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Bytes that the header promises and the file does not have.
    pub fn missing_bytes(&self) -> u64 {
        self.missing_bytes
    }

    /// What keeps its tensors from being the expected parameters; see [`mismatches`].
    pub fn mismatches(
        &self,
        expected: impl IntoIterator<Item = (String, Vec<usize>)>,
    ) -> Vec<String> {
        let found = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        mismatches(expected, found, |dtype| dtype == Dtype::F64 || float_dtype(dtype).is_some())
    }

    /// The bytes of one tensor, mapped into memory until they are dropped.
    ///
    /// # Errors
    ///
    /// A tensor that is not there, or a file that has become shorter since it was opened.
    pub fn map(&self, name: &str) -> Result<MappedTensor, StorageError> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(StorageError::damaged(&self.path, format!("it has no tensor `{name}`")));
        };
        let length = self.file.metadata().map_err(FileError::of("read", &self.path))?.len();
        if tensor.offset + tensor.bytes as u64 > length {
            return Err(StorageError::damaged(
                &self.path,
                format!("`{name}` lies beyond the end of the file"),
            ));
        }
        let map = || {
            self.read_ahead.after(&self.file, tensor, length)?;
            MappedTensor::new(&self.file, tensor)
        };
        Ok(map().map_err(FileError::of("map", &self.path))?)
    }
}

/// What keeps stored tensors from being the expected parameters, one sentence each: what is
/// missing, of another shape, of a type that `is_type` refuses, or surplus.
pub fn mismatches<'a>(
    expected: impl IntoIterator<Item = (String, Vec<usize>)>,
    found: impl IntoIterator<Item = (&'a str, &'a StoredTensor)>,
    is_type: impl Fn(Dtype) -> bool,
) -> Vec<String> {
    let mut left: BTreeMap<&str, &StoredTensor> = found.into_iter().collect();
    let mut problems = Vec::new();
    for (name, shape) in expected {
        match left.remove(name.as_str()) {
            None => problems.push(format!("`{name}` is missing")),
            Some(tensor) if tensor.shape != shape => {
                problems.push(misshapen(&name, &tensor.shape, &shape));
            }
            Some(tensor) if !is_type(tensor.dtype) => {
                problems.push(format!("`{name}` is {:?}; expected F32, F16 or BF16", tensor.dtype));
            }
            Some(_) => {}
        }
    }
    problems.extend(left.keys().map(|name| format!("`{name}` is no parameter of this model")));
    problems
}

pub(crate) fn misshapen(name: &str, found: &[usize], expected: &[usize]) -> String {
    format!("`{name}` is {found:?}, expected {expected:?}")
}

/// What a tensor that is about to be written will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingTensor {
    /// Its name in the file.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl OutgoingTensor {
    /// Its size.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Bytes of a tensor that is written, wherever they are.
#[derive(Debug)]
pub enum TensorBytes {
    /// In another file.
    Mapped(MappedTensor),
    /// Made for the purpose.
    Owned(Vec<u8>),
    /// As they were computed with.
    Data(TensorData),
    /// Copied from a device.
    Host(HostPart),
}

impl AsRef<[u8]> for TensorBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes.as_ref(),
            Self::Owned(bytes) => bytes,
            Self::Data(data) => data.as_bytes(),
            Self::Host(part) => part.as_ref(),
        }
    }
}

/// Writes a safetensors file from tensors that `data` hands over one after the other, in the given
/// order, with `metadata` in its header; returns the checksum of the file.
///
/// # Errors
///
/// A file that cannot be written, two tensors of one name, or what `data` returns.
///
/// # Panics
///
/// If `data` hands over another number of bytes than was announced.
pub fn write_tensors<E: From<StorageError>>(
    path: &Path,
    tensors: &[OutgoingTensor],
    metadata: &[(&str, String)],
    mut data: impl FnMut(usize) -> Result<TensorBytes, E>,
) -> Result<Checksum, E> {
    let header =
        header::render(tensors, metadata).map_err(|reason| StorageError::damaged(path, reason))?;
    let failed = |cause| StorageError::from(FileError::of("write", path)(cause));
    let mut file = Summing::new(File::create(path).map_err(failed)?);
    file.write_all(&header).map_err(failed)?;
    // One tensor is written while the next is made; none waits in between, which would cost its
    // memory.
    let (sender, receiver) = sync_channel::<TensorBytes>(0);
    thread::scope(|scope| {
        let writer = scope.spawn(move || write_in_turn(file, &receiver));
        let mut made = Ok(());
        for (index, tensor) in tensors.iter().enumerate() {
            let bytes = match data(index) {
                Ok(bytes) => bytes,
                Err(error) => {
                    made = Err(error);
                    break;
                }
            };
            assert_eq!(bytes.as_ref().len(), tensor.bytes(), "bytes of `{}`", tensor.name);
            if sender.send(bytes).is_err() {
                break; // the writer has failed, and says why
            }
        }
        drop(sender);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        made.and(written.map_err(failed).map_err(E::from))
    })
}

fn write_in_turn(
    mut file: Summing<File>,
    receiver: &Receiver<TensorBytes>,
) -> io::Result<Checksum> {
    receiver.iter().try_for_each(|bytes| file.write_all(bytes.as_ref()))?;
    Ok(file.checksum())
}

/// Refuses what git-LFS leaves in place of a file that it has not fetched.
///
/// # Errors
///
/// That it is such a pointer; what cannot be read is for the caller to find out.
pub fn refuse_pointer(path: &Path) -> Result<(), StorageError> {
    const START: &[u8] = b"version https://git-lfs";
    let mut start = [0; START.len()];
    let is_pointer =
        File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == START;
    if !is_pointer {
        return Ok(());
    }
    let reason = "it is a pointer of git-LFS and not the file itself: fetch it with `git lfs pull`";
    Err(StorageError::damaged(path, reason))
}

/// A floating-point type by its usual name: `f32`, `f16` or `bf16`, or as PyTorch calls it.
///
/// # Errors
///
/// Says what was expected.
pub fn parse_float_dtype(name: &str) -> Result<FloatDType, String> {
    match name {
        "f32" | "float32" => Ok(FloatDType::F32),
        "f16" | "float16" => Ok(FloatDType::F16),
        "bf16" | "bfloat16" => Ok(FloatDType::BF16),
        _ => Err("expected f32, f16 or bf16".into()),
    }
}

/// The type of tensors as a type that is stored, if it is a parameter's.
pub fn stored_dtype(dtype: DType) -> Option<Dtype> {
    match dtype {
        DType::F64 => Some(Dtype::F64),
        DType::F32 | DType::Flex32 => Some(Dtype::F32),
        DType::F16 => Some(Dtype::F16),
        DType::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

/// The type of stored elements as a type that tensors compute in, if they do.
pub fn float_dtype(dtype: Dtype) -> Option<FloatDType> {
    match dtype {
        Dtype::F32 => Some(FloatDType::F32),
        Dtype::F16 => Some(FloatDType::F16),
        Dtype::BF16 => Some(FloatDType::BF16),
        _ => None,
    }
}
