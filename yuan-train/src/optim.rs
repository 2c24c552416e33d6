//! AdamW with moments that a prune can cut, and clipping by the global norm.
//!
//! Burn's own optimizer hides its moments behind a record, clips each parameter by itself and
//! makes a dozen passes over memory; this one keeps them in reach and updates in one pass
//! ([`ops::adamw_update`]).

use std::collections::{HashMap, HashSet};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{FloatDType, Shape, Tensor, TensorData},
};
use yuan_model::{
    named,
    ops::{self, AdamWStep},
    surgery::Selection,
};

use crate::TrainConfig;

/// AdamW (Loshchilov and Hutter 2019); matrices decay, norms and biases (rank one) do not.
#[derive(Debug, Clone)]
pub struct AdamW {
    beta_1: f64,
    beta_2: f64,
    epsilon: f64,
    weight_decay: f64,
    updates: u64,
    moments: HashMap<ParamId, Moments>,
}

/// First and second moment of one parameter, flat.
#[derive(Debug, Clone)]
struct Moments {
    shape: Shape,
    first: Tensor<1>,
    second: Tensor<1>,
}

/// Names under which moments are saved, behind the parameter's path.
const SUFFIXES: [&str; 2] = ["first_moment", "second_moment"];

impl AdamW {
    /// An optimizer without moments: each starts at zero with its parameter's first gradient.
    pub fn new(config: &TrainConfig) -> Self {
        Self {
            beta_1: config.beta_1,
            beta_2: config.beta_2,
            epsilon: config.epsilon,
            weight_decay: config.weight_decay,
            updates: 0,
            moments: HashMap::new(),
        }
    }

    /// Updates made so far; a prune keeps the count.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Updates every parameter that has a gradient; gradients are first multiplied by `gradient_scale`.
    pub fn step<M: Module>(
        &mut self,
        model: M,
        gradients: GradientsParams,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> M {
        self.updates += 1;
        let step = AdamWStep {
            learning_rate,
            beta_1: self.beta_1,
            beta_2: self.beta_2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            step: self.updates,
            gradient_scale,
        };
        model.map(&mut Update { moments: &mut self.moments, gradients, step })
    }

    /// Cuts the moments as the parameters were cut; nothing of the dead slices remains.
    pub fn cut(&mut self, selections: &[Selection]) {
        for selection in selections {
            if let Some(moments) = self.moments.get_mut(&selection.param) {
                moments.cut(selection);
            }
        }
    }

    /// First and second moment of a parameter in its shape, if it was ever updated.
    pub fn moments<const D: usize>(&self, param: ParamId) -> Option<[Tensor<D>; 2]> {
        let moments = self.moments.get(&param)?;
        let shaped = |tensor: &Tensor<1>| tensor.clone().reshape(moments.shape.clone());
        Some([shaped(&moments.first), shaped(&moments.second)])
    }

    /// Hands every moment to `write` under the path of its parameter and a suffix.
    ///
    /// # Errors
    ///
    /// Stops at the first error of `write`.
    pub fn save<M: Module, E>(
        &self,
        model: &M,
        mut write: impl FnMut(String, TensorData) -> Result<(), E>,
    ) -> Result<(), E> {
        for name in named::parameter_names(model) {
            let Some(moments) = self.moments.get(&name.id) else { continue };
            for (suffix, tensor) in SUFFIXES.into_iter().zip([&moments.first, &moments.second]) {
                let data = reshaped(tensor.to_data(), moments.shape.clone());
                write(format!("{}.{suffix}", name.path), data)?;
            }
        }
        Ok(())
    }

    /// Takes the moments of a model's parameters from `read`, and the number of updates.
    ///
    /// # Errors
    ///
    /// Names the moment that is missing or has another shape than its parameter. Before the first update there
    /// are none.
    pub fn restore<M: Module>(
        &mut self,
        model: &M,
        updates: u64,
        mut read: impl FnMut(&str) -> Option<TensorData>,
    ) -> Result<(), String> {
        self.updates = updates;
        self.moments.clear();
        if updates == 0 {
            return Ok(());
        }
        let device = model.devices().into_iter().next().map(burn::tensor::Device::inner).unwrap_or_default();
        let mut trained = Trained(HashSet::new());
        model.visit(&mut trained);
        for parameter in named::parameter_names(model) {
            if !trained.0.contains(&parameter.id) {
                continue;
            }
            let mut flat = |suffix: &str| {
                let name = format!("{}.{suffix}", parameter.path);
                let data = read(&name).ok_or_else(|| format!("`{name}` is missing"))?;
                if *data.shape() != parameter.shape {
                    return Err(format!(
                        "`{name}` is {:?}, expected {:?}",
                        &data.shape()[..],
                        &parameter.shape[..]
                    ));
                }
                let elements = data.shape().num_elements();
                Ok(Tensor::<1>::from_data(reshaped(data, [elements].into()), &device))
            };
            let [first, second] = [flat(SUFFIXES[0])?, flat(SUFFIXES[1])?];
            self.moments.insert(parameter.id, Moments { shape: parameter.shape, first, second });
        }
        Ok(())
    }
}

impl Moments {
    fn cut(&mut self, selection: &Selection) {
        let (outer, inner) = (&self.shape[..selection.axis], &self.shape[selection.axis + 1..]);
        let blocks = [outer.iter().product(), self.shape[selection.axis], inner.iter().product::<usize>()];
        let along_axis = Selection { axis: 1, ..selection.clone() };
        let cut = |tensor: &Tensor<1>| along_axis.apply(tensor.clone().reshape(blocks)).flatten(0, 2);
        (self.first, self.second) = (cut(&self.first), cut(&self.second));
        self.shape[selection.axis] = selection.kept.len();
    }
}

fn reshaped(data: TensorData, shape: Shape) -> TensorData {
    let (bytes, _, dtype) = data.into_parts();
    TensorData::from_bytes(bytes, shape, dtype)
}

/// Parameters that have a gradient.
struct Trained(HashSet<ParamId>);

impl ModuleVisitor for Trained {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.val().is_require_grad() {
            self.0.insert(param.id);
        }
    }
}

struct Update<'a> {
    moments: &'a mut HashMap<ParamId, Moments>,
    gradients: GradientsParams,
    step: AdamWStep,
}

impl ModuleMapper for Update<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return param };
        let gradient = gradient.flatten::<1>(0, D - 1);
        let moments = self.moments.remove(&param.id).unwrap_or_else(|| Moments {
            shape: param.shape(),
            first: gradient.zeros_like(),
            second: gradient.zeros_like(),
        });
        let id = param.id;
        let weight_decay = if D == 1 { 0.0 } else { self.step.weight_decay };
        let step = AdamWStep { weight_decay, ..self.step };
        param.map(|tensor| {
            let (shape, strategy) = (tensor.shape(), tensor.gradient_checkpointing_strategy());
            let requires_grad = tensor.is_require_grad();
            let value = tensor.inner().flatten::<1>(0, D - 1);
            let (value, [first, second]) =
                ops::adamw_update(value, gradient, [moments.first, moments.second], step);
            self.moments.insert(id, Moments { shape: moments.shape, first, second });
            let value = value.reshape(shape);
            match strategy {
                Some(strategy) => value
                    .autodiff()
                    .with_gradient_checkpointing_strategy(strategy)
                    .set_require_grad(requires_grad),
                None => value,
            }
        })
    }
}

/// Square of the global norm: the sum of squares over all gradients, `[1]`, on their device.
pub fn global_norm_squared<M: Module>(model: &M, gradients: &GradientsParams) -> Option<Tensor<1>> {
    let mut visitor = SumOfSquares { gradients, sum: None };
    model.visit(&mut visitor);
    visitor.sum
}

struct SumOfSquares<'a> {
    gradients: &'a GradientsParams,
    sum: Option<Tensor<1>>,
}

impl ModuleVisitor for SumOfSquares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.gradients.get::<D>(param.id) else { return };
        let squares = ops::sum_of_squares(gradient.cast(FloatDType::F32));
        self.sum = Some(match self.sum.take() {
            Some(sum) => sum + squares,
            None => squares,
        });
    }
}

/// Factor that brings a gradient of this global norm down to `clip_norm` (PyTorch's rule).
pub fn clip_factor(norm: f64, clip_norm: f64) -> f64 {
    (clip_norm / (norm + 1e-6)).min(1.0)
}
