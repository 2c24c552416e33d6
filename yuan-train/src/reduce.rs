//! Gradients of copies: every device adds its own, all take the sum.
//!
//! A fixed order of the additions makes a run repeat exactly, whichever device is first.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{Device, Tensor},
};
use yuan_model::{
    named::{self, Part, StoredParameter},
    ops,
};

/// Adds up the gradients of all copies of a parameter and gives each copy the sum.
///
/// A trained parameter without a gradient, an expert's on a device where no token went, gets zeros, as it would if
/// all experts were on one device.
pub fn reduce_gradients<M: Module>(
    model: &M,
    gradients: GradientsParams,
    stored: &[StoredParameter],
) -> GradientsParams {
    let parts = || stored.iter().flat_map(|parameter| &parameter.parts);
    if parts().all(|part| part.copies.len() == 1) && stored.iter().all(|stored| stored.parts.len() == 1) {
        return gradients;
    }
    let devices = named::parameter_devices(model);
    let parts = parts().map(|part| (part.copies[0], part)).collect();
    let mut reduce = Reduce { gradients, parts, devices };
    model.visit(&mut reduce);
    reduce.gradients
}

struct Reduce<'a> {
    gradients: GradientsParams,
    /// By their first copies.
    parts: HashMap<ParamId, &'a Part>,
    devices: HashMap<ParamId, (Device, bool)>,
}

impl ModuleVisitor for Reduce<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(part) = self.parts.get(&param.id).filter(|_| self.devices[&param.id].1) else { return };
        let of_copies = part.copies.iter().filter_map(|&copy| self.gradients.remove::<D>(copy));
        let sum = of_copies.reduce(|sum, more| sum.clone() + ops::transfer(more, &sum.device()));
        let sum = sum.unwrap_or_else(|| param.val().inner().zeros_like());
        for copy in &part.copies {
            let device = self.devices[copy].0.clone().inner();
            self.gradients.register(*copy, ops::transfer(sum.clone(), &device));
        }
    }
}
