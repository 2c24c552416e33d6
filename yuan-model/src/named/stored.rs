//! Parameters as they are saved, whichever ranks hold them.

use std::{collections::HashMap, ops::Range};

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{DType, Tensor, TensorData},
};

use super::{for_each, parameter_names};
use crate::ModelError;

/// A parameter of the whole model, and what is held of it here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredParameter {
    /// Dotted path in the model.
    pub path: String,
    /// Identity of what is held here.
    pub id: ParamId,
    /// Its shape in the whole model.
    pub shape: Vec<usize>,
    /// Slices along its first axis that are held here: all of them, but for the experts of a model
    /// that is spread over ranks.
    pub held: Range<usize>,
}

impl StoredParameter {
    /// Slices along the first axis.
    pub fn slices(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements of one slice.
    pub fn slice_len(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Whether others hold other slices of it.
    pub fn is_spread(&self) -> bool {
        self.held.len() < self.slices()
    }

    /// Elements that are held here, counted through the whole parameter.
    pub fn elements(&self) -> Range<usize> {
        let slice = self.slice_len();
        self.held.start * slice..self.held.end * slice
    }

    /// The shape of what is held here.
    pub fn held_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = self.held.len();
        }
        shape
    }
}

/// The parameters of a model that is held whole.
pub fn stored_parameters<M: Module>(module: &M) -> Vec<StoredParameter> {
    let stored = |name: super::ParameterName| StoredParameter {
        held: 0..name.shape.first().copied().unwrap_or(1),
        shape: name.shape.to_vec(),
        path: name.path,
        id: name.id,
    };
    parameter_names(module).into_iter().map(stored).collect()
}

/// Reads a parameter from the device.
///
/// # Errors
///
/// If the device fails, or the module has no such parameter.
pub fn read_by_id<M: Module>(module: &M, id: ParamId) -> Result<TensorData, ModelError> {
    let mut found = None;
    for_each(module, |_, param| {
        if param.id() == id {
            found = Some(param.try_data());
        }
    });
    found.unwrap_or_else(|| Err(ModelError::Tensors(vec![format!("parameter {id} is missing")])))
}

/// Replaces the parameters for which `read` has data, keeping ids, devices and gradient settings;
/// `read` is asked for what is held here of each.
pub fn write_stored<M: Module>(
    module: M,
    stored: &[StoredParameter],
    read: impl FnMut(&StoredParameter) -> Option<TensorData>,
) -> M {
    let by_id = stored.iter().map(|parameter| (parameter.id, parameter)).collect();
    module.map(&mut Write { by_id, read })
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
    by_id: HashMap<ParamId, &'a StoredParameter>,
    read: F,
}

impl<F: FnMut(&StoredParameter) -> Option<TensorData>> ModuleMapper for Write<'_, F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let stored = self.by_id.get(&param.id).copied();
        match stored.and_then(|stored| (self.read)(stored)) {
            Some(data) => super::with_data(param, data),
            None => param,
        }
    }
}
