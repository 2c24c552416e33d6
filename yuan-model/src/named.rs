//! Parameters by path, such as `blocks.0.moe.router.weight`: for checkpoints and for loading.

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Shape, Tensor, TensorData},
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

/// Replaces every float parameter for which `write` has data, keeping id, device and gradient setting.
///
/// `write` is asked with the path and must answer with data of the parameter's shape.
pub fn write_parameters<M: Module>(module: M, write: impl FnMut(&str, &Shape) -> Option<TensorData>) -> M {
    module.map(&mut Writer { path: Vec::new(), write })
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
                let (id, device) = (param.id, param.lazy_device());
                param.transform_for_load(Tensor::from_data(data, &device), id)
            }
            None => param,
        }
    }
}
