//! Parameters by path, such as `blocks.0.moe.router.weight`: for checkpoints and for loading.

use std::ops::Range;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{DType, FloatDType, Shape, Tensor, TensorData},
};

use crate::ModelError;

mod stored;

pub use stored::{StoredParameter, dtypes_by_id, read_by_id, stored_parameters, write_stored};

/// Where a parameter is, what it is called and how large it is; naming it allocates nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterName {
    /// Dotted path in the module.
    pub path: String,
    /// Identity that ties the parameter to its gradient and optimizer state.
    pub id: ParamId,
    /// Its shape.
    pub shape: Shape,
}

/// All float parameters of a module, in the order of its fields.
pub fn parameter_names<M: Module>(module: &M) -> Vec<ParameterName> {
    let mut found = Vec::new();
    for_each(module, |path, param| {
        found.push(ParameterName { path: path(), id: param.id(), shape: param.shape() });
    });
    found
}

/// Hands every float parameter to `read`, one at a time, with its path.
///
/// # Errors
///
/// Stops at the first error of `read`.
pub fn read_parameters<M: Module, E>(
    module: &M,
    mut read: impl FnMut(&str, TensorData) -> Result<(), E>,
) -> Result<(), E> {
    let mut result = Ok(());
    for_each(module, |path, param| {
        if result.is_ok() {
            result = read(&path(), param.data(None));
        }
    });
    result
}

/// Draws the initial value of every parameter now, in the order of the fields.
///
/// Burn draws it when a parameter is first used, by when the device's random state may be another
/// one.
pub fn initialized<M: Module>(module: M) -> M {
    for_each(&module, |_, param| {
        param.dtype(); // any look at the value draws it
    });
    module
}

/// The type of every float parameter, by path.
pub fn parameter_dtypes<M: Module>(module: &M) -> Vec<(String, DType)> {
    let mut found = Vec::new();
    for_each(module, |path, param| found.push((path(), param.dtype())));
    found
}

/// The data of one float parameter, or of slices along its first axis; nothing else is copied.
pub fn read_part<M: Module>(
    module: &M,
    path: &str,
    slices: Option<Range<usize>>,
) -> Option<TensorData> {
    let mut found = None;
    for_each(module, |this, param| {
        if found.is_none() && this() == path {
            found = Some(param.data(slices.clone()));
        }
    });
    found
}

/// The data of one float parameter, drawn now if it was not yet, and the module without it: a single
/// number stands in its place.
pub fn take_parameter<M: Module>(module: M, path: &str) -> (M, Option<TensorData>) {
    let mut take = Take { path: Vec::new(), wanted: path, found: None };
    let module = module.map(&mut take);
    (module, take.found)
}

struct Take<'a> {
    path: Vec<String>,
    wanted: &'a str,
    found: Option<TensorData>,
}

impl ModuleMapper for Take<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.found.is_some() || self.path.join(".") != self.wanted {
            return param;
        }
        let (id, value) = (param.id, param.val());
        let nothing = Tensor::zeros([1; D], &value.device().inner());
        self.found = Some(value.into_data());
        param.transform_for_load(nothing, id)
    }
}

/// Replaces every float parameter for which `write` has data, keeping id, device and gradient
/// setting.
///
/// `write` is asked with the path and must answer with data of the parameter's shape; its type
/// becomes the parameter's.
pub fn write_parameters<M: Module>(
    module: M,
    write: impl FnMut(&str, &Shape) -> Option<TensorData>,
) -> M {
    module.map(&mut Writer { path: Vec::new(), write })
}

/// Turns every float parameter into another type, keeping id, device and gradient setting.
pub fn cast_parameters<M: Module>(module: M, dtype: FloatDType) -> M {
    module.map(&mut Cast(dtype))
}

struct Cast(FloatDType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let requires_grad = tensor.is_require_grad();
            tensor.detach().cast(self.0).set_require_grad(requires_grad)
        })
    }
}

/// A float parameter whatever its rank; only id and shape are known without drawing its initial
/// value.
trait FloatParam {
    fn id(&self) -> ParamId;
    fn shape(&self) -> Shape;
    fn dtype(&self) -> DType;
    /// All of it, or slices along its first axis.
    fn data(&self, slices: Option<Range<usize>>) -> TensorData;
    /// All of it, unless the device fails.
    fn try_data(&self) -> Result<TensorData, ModelError>;
}

impl<const D: usize> FloatParam for Param<Tensor<D>> {
    fn id(&self) -> ParamId {
        self.id
    }

    fn shape(&self) -> Shape {
        self.lazy_shape()
    }

    fn dtype(&self) -> DType {
        self.val().dtype()
    }

    fn try_data(&self) -> Result<TensorData, ModelError> {
        self.val().try_into_data().map_err(ModelError::device)
    }

    fn data(&self, slices: Option<Range<usize>>) -> TensorData {
        let value = self.val();
        let part = match slices {
            Some(slices) => value.slice_dim(0, slices),
            None => value,
        };
        part.into_data()
    }
}

/// Shows every float parameter, with what tells its path.
fn for_each<M: Module>(module: &M, show: impl FnMut(&dyn Fn() -> String, &dyn FloatParam)) {
    module.visit(&mut ForEach { path: Vec::new(), show });
}

struct ForEach<F> {
    path: Vec<String>,
    show: F,
}

impl<F: FnMut(&dyn Fn() -> String, &dyn FloatParam)> ModuleVisitor for ForEach<F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        (self.show)(&|| self.path.join("."), param);
    }
}

struct Writer<F> {
    path: Vec<String>,
    write: F,
}

impl<F: FnMut(&str, &Shape) -> Option<TensorData>> ModuleMapper for Writer<F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match (self.write)(&self.path.join("."), &param.lazy_shape()) {
            Some(data) => with_data(param, data),
            None => param,
        }
    }
}

/// The parameter with other data, whose type becomes its own.
fn with_data<const D: usize>(param: Param<Tensor<D>>, data: TensorData) -> Param<Tensor<D>> {
    let (id, device, dtype) = (param.id, param.lazy_device(), data.dtype());
    param.transform_for_load(Tensor::from_data(data, (&device, dtype)), id)
}
