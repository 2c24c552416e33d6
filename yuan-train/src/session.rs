//! Model and optimizer, which change together or not at all.

use std::cell::RefCell;

use burn::{
    module::{Module, ParamId},
    optim::GradientsParams,
    tensor::DType,
};
use yuan_model::{RefusedCut, Selection, named};

use crate::{
    AdamW, TrainError,
    sharded::{Arrivals, Parts},
};

/// A model and the optimizer that holds its moments.
#[derive(Debug)]
pub struct Session<M> {
    /// Absent only while it is being changed.
    model: Option<M>,
    optimizer: AdamW,
    /// Values of the model that other ranks have updated and that may still be on their way.
    arrivals: RefCell<Arrivals>,
}

impl<M> Session<M> {
    pub(crate) fn new(model: M, optimizer: AdamW) -> Self {
        Self { model: Some(model), optimizer, arrivals: RefCell::default() }
    }

    pub(crate) fn model(&self) -> &M {
        self.arrivals.borrow_mut().wait_for_all();
        self.unread_model()
    }

    /// The model, some of whose values may not be there yet: only those that were
    /// [waited for](Self::wait_for) may be read.
    pub(crate) fn unread_model(&self) -> &M {
        self.model.as_ref().expect("the model is only away while it changes")
    }

    /// Waits, on the device, for the values of some parameters.
    pub(crate) fn wait_for(&self, parameters: &[ParamId]) {
        self.arrivals.borrow_mut().wait_for(parameters);
    }

    pub(crate) fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// Replaces the optimizer; its moments must be those of this model.
    pub(crate) fn set_optimizer(&mut self, optimizer: AdamW) {
        self.optimizer = optimizer;
    }

    /// Replaces the model's values; ids and shapes of its parameters stay.
    pub(crate) fn update(&mut self, update: impl FnOnce(M) -> M) {
        let model = self.take_model();
        self.model = Some(update(model));
    }

    fn take_model(&mut self) -> M {
        self.arrivals.get_mut().wait_for_all();
        self.model.take().expect("the model is only away while it changes")
    }
}

impl<M: Module> Session<M> {
    /// One update over ranks, with the part of every gradient that belongs to this one.
    pub(crate) fn step_parts(&mut self, gradients: Parts, learning_rate: f64, scale: f64) {
        let model = self.take_model();
        let (model, arrivals) = self.optimizer.step_parts(model, gradients, learning_rate, scale);
        (self.model, *self.arrivals.get_mut()) = (Some(model), arrivals);
    }

    /// One update of every parameter that has a gradient.
    pub(crate) fn step(&mut self, gradients: GradientsParams, learning_rate: f64, scale: f64) {
        let model = self.take_model();
        self.model = Some(self.optimizer.step(model, gradients, learning_rate, scale));
    }

    /// Cuts the model and, by the same selections, the moments; returns the bytes that went from
    /// one rank to another.
    pub(crate) fn cut(
        &mut self,
        cut: impl FnOnce(M) -> Result<(M, Vec<Selection>), RefusedCut<M>>,
    ) -> Result<u64, TrainError> {
        match cut(self.take_model()) {
            Ok((model, selections)) => {
                let moved = bytes_moved(&model, &selections) + self.optimizer.cut(&selections);
                self.model = Some(model);
                match self.optimizer.holders() {
                    Some(holders) => Ok(holders.ranks().world().sum_counts(&[moved])?[0]),
                    None => Ok(moved),
                }
            }
            Err(RefusedCut { model, error }) => {
                self.model = Some(*model);
                Err(error.into())
            }
        }
    }
}

/// Bytes of a cut model's parameters that came from other ranks.
fn bytes_moved<M: Module>(model: &M, selections: &[Selection]) -> u64 {
    if selections.iter().all(|selection| selection.moved == 0) {
        return 0;
    }
    let names = named::parameter_names(model);
    let dtypes = named::dtypes_by_id(model);
    let mut bytes = 0;
    for selection in selections {
        let Some(name) = names.iter().find(|name| name.id == selection.param) else { continue };
        let slice = name.shape.num_elements() / name.shape[selection.axis].max(1);
        let size = dtypes.get(&selection.param).map_or(0, DType::size);
        bytes += (selection.moved * slice * size) as u64;
    }
    bytes
}
