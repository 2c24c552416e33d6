//! Parameters as they are saved, whatever devices hold copies and parts of them.

use std::{collections::HashMap, ops::Range};

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{DType, Device, Tensor, TensorData},
};

use super::{for_each, parameter_names};
use crate::ModelError;

/// A parameter of the whole model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredParameter {
    /// Dotted path in the model on one device.
    pub path: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// What it consists of along its first axis, in order.
    pub parts: Vec<StoredPart>,
}

/// Neighbouring slices of a parameter along its first axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPart {
    /// How many.
    pub slices: usize,
    /// The parameters that hold them, all with the same values: one for each device that has a
    /// copy.
    pub copies: Vec<ParamId>,
}

impl StoredParameter {
    /// The parts with the slices that each holds.
    pub fn ranges(&self) -> impl Iterator<Item = (Range<usize>, &StoredPart)> {
        let mut end = 0;
        self.parts.iter().map(move |part| {
            end += part.slices;
            (end - part.slices..end, part)
        })
    }

    /// Elements of one slice.
    pub fn slice_len(&self) -> usize {
        self.shape.iter().skip(1).product()
    }
}

/// The parameters of a model on one device, each by itself.
pub fn stored_parameters<M: Module>(module: &M) -> Vec<StoredParameter> {
    let stored = |name: super::ParameterName| StoredParameter {
        parts: vec![StoredPart {
            slices: name.shape.first().copied().unwrap_or(1),
            copies: vec![name.id],
        }],
        shape: name.shape.to_vec(),
        path: name.path,
    };
    parameter_names(module).into_iter().map(stored).collect()
}

/// Reads a parameter from the first copies of its parts.
///
/// # Errors
///
/// If a device fails, or the module has no such parameter.
pub fn read_stored<M: Module>(
    module: &M,
    stored: &StoredParameter,
) -> Result<TensorData, ModelError> {
    let wanted: Vec<ParamId> = stored.parts.iter().map(|part| part.copies[0]).collect();
    let mut found = HashMap::new();
    for_each(module, |_, param| {
        if wanted.contains(&param.id()) {
            found.insert(param.id(), param.try_data());
        }
    });
    let parts = wanted.iter().map(|id| {
        let missing = || ModelError::Tensors(vec![format!("{} is missing", stored.path)]);
        found.remove(id).unwrap_or_else(|| Err(missing()))
    });
    Ok(joined(parts.collect::<Result<_, _>>()?, &stored.shape))
}

/// Slices of a tensor along its first axis.
///
/// # Panics
///
/// If there are not as many.
pub fn slices_of(data: &TensorData, slices: Range<usize>) -> TensorData {
    let mut shape = data.shape().to_vec();
    let (all, bytes) = (shape.first().copied().unwrap_or(1).max(1), data.as_bytes());
    let size = bytes.len() / all;
    let part = bytes[slices.start * size..slices.end * size].to_vec();
    if let Some(first) = shape.first_mut() {
        *first = slices.len();
    }
    TensorData::from_bytes_vec(part, shape, data.dtype())
}

/// Parts along the first axis as one.
pub fn joined(mut parts: Vec<TensorData>, shape: &[usize]) -> TensorData {
    if parts.len() == 1 {
        return parts.swap_remove(0);
    }
    let dtype = parts[0].dtype();
    let bytes: Vec<u8> = parts.iter().flat_map(TensorData::as_bytes).copied().collect();
    TensorData::from_bytes_vec(bytes, shape.to_vec(), dtype)
}

/// Replaces the parameters for which `read` has data, every copy and part of them, keeping ids,
/// devices and gradient settings; `read` is asked for the slices of a parameter, by path.
pub fn write_stored<M: Module>(
    module: M,
    stored: &[StoredParameter],
    read: impl FnMut(&str, Range<usize>) -> Option<TensorData>,
) -> M {
    let mut place_of = HashMap::new();
    for parameter in stored {
        for (range, part) in parameter.ranges() {
            for &id in &part.copies {
                place_of.insert(id, (parameter.path.as_str(), range.clone()));
            }
        }
    }
    module.map(&mut Write { place_of, read })
}

/// The device of every float parameter and whether it is trained.
pub fn parameter_devices<M: Module>(module: &M) -> HashMap<ParamId, (Device, bool)> {
    let mut devices = HashMap::new();
    for_each(module, |_, param| {
        devices.insert(param.id(), (param.device(), param.is_trained()));
    });
    devices
}

/// The type of every float parameter.
pub fn dtypes_by_id<M: Module>(module: &M) -> HashMap<ParamId, DType> {
    let mut dtypes = HashMap::new();
    for_each(module, |_, param| {
        dtypes.insert(param.id(), param.dtype());
    });
    dtypes
}

struct Write<'a, F> {
    place_of: HashMap<ParamId, (&'a str, Range<usize>)>,
    read: F,
}

impl<F: FnMut(&str, Range<usize>) -> Option<TensorData>> ModuleMapper for Write<'_, F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let data = match self.place_of.get(&param.id) {
            Some((path, slices)) => (self.read)(path, slices.clone()),
            None => None,
        };
        match data {
            Some(data) => super::with_data(param, data),
            None => param,
        }
    }
}
