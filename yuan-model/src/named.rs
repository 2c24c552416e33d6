//! Parameters by path, such as `blocks.0.moe.router.weight`: for checkpoints and for loading.

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{DType, FloatDType, Shape, Tensor, TensorData},
};

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
    let mut visitor = Names::default();
    module.visit(&mut visitor);
    visitor.found
}

/// Hands every float parameter to `read`, one at a time, with its path.
///
/// # Errors
///
/// Stops at the first error of `read`.
pub fn read_parameters<M: Module, E>(
    module: &M,
    read: impl FnMut(&str, TensorData) -> Result<(), E>,
) -> Result<(), E> {
    let mut visitor = Reader { path: Vec::new(), read, result: Ok(()) };
    module.visit(&mut visitor);
    visitor.result
}

/// Draws the initial value of every parameter now, in the order of the fields.
///
/// Burn draws it when a parameter is first used, by when the device's random state may be another one.
pub fn initialized<M: Module>(module: M) -> M {
    module.visit(&mut Dtypes::default());
    module
}

/// The type of every float parameter, by path.
pub fn parameter_dtypes<M: Module>(module: &M) -> Vec<(String, DType)> {
    let mut visitor = Dtypes::default();
    module.visit(&mut visitor);
    visitor.found
}

/// The data of one float parameter, or of one slice along its first axis; nothing else is copied.
pub fn read_part<M: Module>(module: &M, path: &str, index: Option<usize>) -> Option<TensorData> {
    let mut visitor = Part { path: Vec::new(), wanted: path, index, found: None };
    module.visit(&mut visitor);
    visitor.found
}

/// Replaces every float parameter for which `write` has data, keeping id, device and gradient setting.
///
/// `write` is asked with the path and must answer with data of the parameter's shape; its type becomes the
/// parameter's.
pub fn write_parameters<M: Module>(module: M, write: impl FnMut(&str, &Shape) -> Option<TensorData>) -> M {
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

#[derive(Default)]
struct Names {
    path: Vec<String>,
    found: Vec<ParameterName>,
}

impl ModuleVisitor for Names {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.found.push(ParameterName { path: self.path.join("."), id: param.id, shape: param.lazy_shape() });
    }
}

struct Reader<F, E> {
    path: Vec<String>,
    read: F,
    result: Result<(), E>,
}

impl<E, F: FnMut(&str, TensorData) -> Result<(), E>> ModuleVisitor for Reader<F, E> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.result.is_ok() {
            self.result = (self.read)(&self.path.join("."), param.val().into_data());
        }
    }
}

#[derive(Default)]
struct Dtypes {
    path: Vec<String>,
    found: Vec<(String, DType)>,
}

impl ModuleVisitor for Dtypes {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.found.push((self.path.join("."), param.val().dtype()));
    }
}

struct Part<'a> {
    path: Vec<String>,
    wanted: &'a str,
    index: Option<usize>,
    found: Option<TensorData>,
}

impl ModuleVisitor for Part<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.found.is_none() && self.path.join(".") == self.wanted {
            let value = param.val();
            let part = match self.index {
                Some(index) => value.slice_dim(0, index..index + 1),
                None => value,
            };
            self.found = Some(part.into_data());
        }
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
            Some(data) => {
                let (id, device, dtype) = (param.id, param.lazy_device(), data.dtype());
                param.transform_for_load(Tensor::from_data(data, (&device, dtype)), id)
            }
            None => param,
        }
    }
}
