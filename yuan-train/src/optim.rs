//! AdamW with moments that a prune can cut, and clipping by the global norm.
//!
//! Burn's own optimizer hides its moments behind a record, clips each parameter by itself and
//! makes a dozen passes over memory; this one keeps them in reach and updates in one pass
//! ([`ops::adamw_update`]).

use std::{collections::HashMap, ops::Range};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{Device, FloatDType, Shape, Tensor, TensorData},
};
use yuan_model::{
    ModelError, Selection,
    named::StoredParameter,
    ops::{self, AdamWStep},
    with_value,
};

use serde::{Deserialize, Serialize};

use crate::{
    TrainError,
    sharded::{Arrivals, Gathering, Holders, Parts},
};

/// Settings of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay of the first moment, β₁.
    pub beta_1: f64,
    /// Decay of the second moment, β₂.
    pub beta_2: f64,
    /// ε, added to the root of the corrected second moment.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices; norms and biases have none.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: 0.1 }
    }
}

impl AdamWConfig {
    /// The same with another decoupled weight decay.
    #[must_use]
    pub fn with_weight_decay(self, weight_decay: f64) -> Self {
        Self { weight_decay, ..self }
    }
}

/// AdamW (Loshchilov and Hutter 2019); matrices decay, norms and biases (rank one) do not.
#[derive(Debug, Clone)]
pub struct AdamW {
    config: AdamWConfig,
    updates: u64,
    moments: HashMap<ParamId, Moments>,
    /// Over ranks, each of which keeps the moments of its part of every parameter.
    holders: Option<Holders>,
}

/// First and second moment of one parameter, flat; over ranks, those of one part of it.
#[derive(Debug, Clone)]
struct Moments {
    /// That of the parameter.
    shape: Shape,
    first: Tensor<1>,
    second: Tensor<1>,
}

/// Names under which moments are saved, behind the parameter's path.
pub(crate) const SUFFIXES: [&str; 2] = ["first_moment", "second_moment"];

impl AdamW {
    /// An optimizer without moments: each starts at zero with its parameter's first gradient.
    pub fn new(config: &AdamWConfig) -> Self {
        Self { config: *config, updates: 0, moments: HashMap::new(), holders: None }
    }

    /// The same for a model that is spread over ranks.
    pub(crate) fn over_ranks(self, holders: Option<Holders>) -> Self {
        Self { holders, ..self }
    }

    /// Which ranks hold which parameters, if there are several.
    pub(crate) fn holders(&self) -> Option<&Holders> {
        self.holders.as_ref()
    }

    /// Updates made so far; a prune keeps the count.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Updates every parameter that has a gradient; gradients are first multiplied by
    /// `gradient_scale`.
    pub fn step<M: Module>(
        &mut self,
        model: M,
        gradients: GradientsParams,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> M {
        let step = self.next_step(learning_rate, gradient_scale);
        model.map(&mut Update { moments: &mut self.moments, gradients, step })
    }

    /// The same over ranks, with the part of every gradient that belongs to this one. The new values
    /// are not to be read before they have arrived.
    pub(crate) fn step_parts<M: Module>(
        &mut self,
        model: M,
        gradients: Parts,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> (M, Arrivals) {
        let step = self.next_step(learning_rate, gradient_scale);
        let holders = self.holders.as_ref().expect("only what is spread over ranks has parts");
        let mut update = UpdateParts {
            moments: &mut self.moments,
            gradients: gradients.into_iter().collect(),
            step,
            holders,
            gathering: Gathering::new(holders),
        };
        model.visit(&mut update);
        update.gathering.finish(model)
    }

    fn next_step(&mut self, learning_rate: f64, gradient_scale: f64) -> AdamWStep {
        self.updates += 1;
        AdamWStep {
            learning_rate,
            beta_1: self.config.beta_1,
            beta_2: self.config.beta_2,
            epsilon: self.config.epsilon,
            weight_decay: self.config.weight_decay,
            step: self.updates,
            gradient_scale,
        }
    }

    /// Cuts the moments as the parameters were cut; nothing of the dead slices remains. Returns the
    /// bytes that went from one device to another.
    pub fn cut(&mut self, selections: &[Selection]) -> u64 {
        if let Some(holders) = self.holders.clone() {
            return self.cut_parts(selections, &holders);
        }
        for selection in selections {
            let Some(Moments { mut shape, first, second }) = self.moments.remove(&selection.param)
            else {
                continue;
            };
            let cut = |moment: Tensor<1>| selection.apply_flat(moment, &shape);
            let (first, second) = (cut(first), cut(second));
            shape[selection.axis] = selection.kept.len();
            self.moments.insert(selection.param, Moments { shape, first, second });
        }
        0
    }

    /// Every rank gets the moments of whole parameters, cuts them as the parameters were cut, and
    /// keeps its part again.
    fn cut_parts(&mut self, selections: &[Selection], holders: &Holders) -> u64 {
        let mut moved = 0;
        for selection in selections {
            let id = selection.param;
            let Some(Moments { mut shape, first, second }) = self.moments.remove(&id) else {
                continue;
            };
            let cut = |moment: Tensor<1>| {
                let flat = holders.whole(id, moment, shape.num_elements());
                holders.own_part(id, selection.apply_flat(flat, &shape))
            };
            let (first, second) = (cut(first), cut(second));
            shape[selection.axis] = selection.kept.len();
            let slice = shape.num_elements() / shape[selection.axis].max(1);
            moved += (2 * selection.moved * slice * first.dtype().size()) as u64;
            self.moments.insert(id, Moments { shape, first, second });
        }
        moved
    }

    /// The first (0) or second (1) moment of a parameter, flat; over ranks, the part of this one.
    pub(crate) fn moment(&self, param: ParamId, which: usize) -> Option<&Tensor<1>> {
        let moments = self.moments.get(&param)?;
        Some(if which == 0 { &moments.first } else { &moments.second })
    }

    /// First and second moment of a parameter in its shape, if it was ever updated; none over ranks,
    /// of which each has a part.
    pub fn moments<const D: usize>(&self, param: ParamId) -> Option<[Tensor<D>; 2]> {
        let moments = self.moments.get(&param).filter(|_| self.holders.is_none())?;
        let shaped = |tensor: &Tensor<1>| tensor.clone().reshape(moments.shape.clone());
        Some([shaped(&moments.first), shaped(&moments.second)])
    }

    /// Hands every moment to `write` under the path of its parameter and a suffix; over ranks, of which
    /// each has a part of all, they cannot be asked for.
    ///
    /// # Errors
    ///
    /// If a device fails, and at the first error of `write`.
    pub fn save(
        &self,
        parameters: &[StoredParameter],
        mut write: impl FnMut(String, TensorData) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        for parameter in parameters {
            let Some(moments) = self.moments.get(&parameter.id) else { continue };
            for (suffix, moment) in SUFFIXES.into_iter().zip([&moments.first, &moments.second]) {
                let data = moment.clone().try_into_data().map_err(ModelError::device)?;
                let data = reshaped(data, moments.shape.clone());
                write(format!("{}.{suffix}", parameter.path), data)?;
            }
        }
        Ok(())
    }

    /// Takes the moments of a model's parameters from `read`, and the number of updates. It is asked
    /// for the elements of a parameter that this process updates, and has none of one that never
    /// learnt.
    ///
    /// # Errors
    ///
    /// The first error of `read`.
    pub(crate) fn restore(
        &mut self,
        parameters: &[StoredParameter],
        updates: u64,
        device: &Device,
        mut read: impl FnMut(
            &StoredParameter,
            Range<usize>,
        ) -> Result<Option<[TensorData; 2]>, TrainError>,
    ) -> Result<(), TrainError> {
        self.updates = updates;
        self.moments.clear();
        let device = device.clone().inner();
        for parameter in parameters {
            let own = match &self.holders {
                Some(holders) => holders.own_elements(parameter),
                None => parameter.elements(),
            };
            let Some(moments) = read(parameter, own)? else { continue };
            let [first, second] = moments.map(|data| {
                let part = match &self.holders {
                    Some(holders) => holders.filled_up(parameter, data),
                    None => data,
                };
                Tensor::from_data(part, &device)
            });
            let shape = parameter.held_shape().into();
            self.moments.insert(parameter.id, Moments { shape, first, second });
        }
        Ok(())
    }
}

fn reshaped(data: TensorData, shape: Shape) -> TensorData {
    let (bytes, _, dtype) = data.into_parts();
    TensorData::from_bytes(bytes, shape, dtype)
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
        with_value(param, |tensor| {
            let shape = tensor.shape();
            let value = tensor.inner().flatten::<1>(0, D - 1);
            let (value, [first, second]) =
                ops::adamw_update(value, gradient, [moments.first, moments.second], step);
            self.moments.insert(id, Moments { shape: moments.shape, first, second });
            value.reshape(shape)
        })
    }
}

/// Updates the part of every parameter that belongs to this rank.
struct UpdateParts<'a> {
    moments: &'a mut HashMap<ParamId, Moments>,
    gradients: HashMap<ParamId, Tensor<1>>,
    step: AdamWStep,
    holders: &'a Holders,
    gathering: Gathering<'a>,
}

impl ModuleVisitor for UpdateParts<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.gradients.remove(&param.id) else { return };
        let flat = param.val().inner().flatten::<1>(0, D - 1);
        let value = self.holders.own_part(param.id, flat);
        let moments = self.moments.remove(&param.id).unwrap_or_else(|| Moments {
            shape: param.shape(),
            first: gradient.zeros_like(),
            second: gradient.zeros_like(),
        });
        let weight_decay = if D == 1 { 0.0 } else { self.step.weight_decay };
        let step = AdamWStep { weight_decay, ..self.step };
        let (value, [first, second]) =
            ops::adamw_update(value, gradient, [moments.first, moments.second], step);
        self.moments.insert(param.id, Moments { shape: moments.shape, first, second });
        self.gathering.add(param.id, value);
    }
}

/// Square of the global norm: the sum of squares over all gradients, `[1]`.
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
