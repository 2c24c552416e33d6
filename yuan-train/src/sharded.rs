//! Updates over ranks, of which each keeps the moments of its part of every parameter (ZeRO-1,
//! Rajbhandari et al. 2020).
//!
//! The ranks that hold copies of a parameter cut it, flat, into parts of one length. Gradients are
//! added up part by part where each part belongs (reduce-scatter), the part is updated there, and
//! the updated parts are put together again on every rank (all-gather).

use std::collections::{HashMap, HashSet};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{DType, Tensor},
};
use yuan_model::{
    named::{self, StoredParameter},
    ops,
    ranks::{Communicator, RankError, Ranks},
    with_value,
};

/// Which ranks hold copies of each parameter of this one.
#[derive(Debug, Clone)]
pub(crate) struct Holders {
    ranks: Ranks,
    /// Parameters of which other ranks of the row hold other parts: the experts.
    spread: HashSet<ParamId>,
}

/// The part of every gradient that this rank updates, flat, in the order of the parameters.
pub(crate) type Parts = Vec<(ParamId, Tensor<1>)>;

impl Holders {
    /// Those of a model that is spread over ranks, with the parameters that this one holds.
    pub fn new(ranks: &Ranks, stored: &[StoredParameter]) -> Self {
        let spread = stored.iter().filter(|parameter| parameter.parts.len() > 1);
        let own = spread.flat_map(|parameter| parameter.parts.iter().flat_map(|part| &part.copies));
        Self { spread: own.copied().collect(), ranks: ranks.clone() }
    }

    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// The ranks that hold a copy of a parameter.
    pub fn group(&self, param: ParamId) -> &Communicator {
        match self.spread.contains(&param) {
            true => self.ranks.column(),
            false => self.ranks.world(),
        }
    }

    /// Adds up the gradients of the parameters that learn, by their paths, over the ranks that hold
    /// them. A gradient that is missing is zero, as it would be if all tokens were on one device.
    pub fn sum_gradients<M: Module>(
        &self,
        model: &M,
        gradients: GradientsParams,
        learns: impl Fn(&str) -> bool,
    ) -> Parts {
        let names = named::parameter_names(model).into_iter();
        let learning: HashSet<ParamId> =
            names.filter(|name| learns(&name.path)).map(|name| name.id).collect();
        let mut flat = Flat { gradients, learning, found: Vec::new(), holders: self };
        model.visit(&mut flat);
        self.in_groups(flat.found, ops::reduce_scatter)
    }

    /// Square of the global norm of the gradients, each element counted once.
    ///
    /// # Errors
    ///
    /// If the device or a rank fails.
    pub fn norm_squared(&self, own: f64) -> Result<f64, RankError> {
        Ok(self.ranks.world().sum(&[own])?[0])
    }

    /// Calls a collective with as many tensors at once as memory allows, group by group.
    fn in_groups(
        &self,
        tensors: Parts,
        collective: fn(Vec<Tensor<1>>, &Communicator) -> Vec<Tensor<1>>,
    ) -> Parts {
        let order: Vec<ParamId> = tensors.iter().map(|(id, _)| *id).collect();
        let (spread, whole): (Parts, Parts) =
            tensors.into_iter().partition(|(id, _)| self.spread.contains(id));
        let mut done = HashMap::new();
        for (tensors, group) in [(whole, self.ranks.world()), (spread, self.ranks.column())] {
            let (mut ids, mut list, mut elements) = (Vec::new(), Vec::new(), 0);
            let mut flush = |ids: &mut Vec<ParamId>, list: &mut Vec<Tensor<1>>| {
                let results = collective(std::mem::take(list), group);
                done.extend(ids.drain(..).zip(results));
            };
            for (id, tensor) in tensors {
                let more = tensor.dims()[0];
                if elements + more > AT_ONCE && !list.is_empty() {
                    flush(&mut ids, &mut list);
                    elements = 0;
                }
                elements += more;
                ids.push(id);
                list.push(tensor);
            }
            flush(&mut ids, &mut list);
        }
        let take = |id| (id, done.remove(&id).expect("every tensor has a result"));
        order.into_iter().map(take).collect()
    }

    /// The part of a flat tensor that belongs to this rank; behind its end there are zeros.
    pub fn own_part(&self, param: ParamId, flat: Tensor<1>) -> Tensor<1> {
        let group = self.group(param);
        let padded = padded(flat, group.size());
        let part = padded.dims()[0] / group.size();
        match group.size() {
            1 => padded,
            _ => padded.slice_dim(0, group.rank() * part..(group.rank() + 1) * part),
        }
    }

    /// Whole flat tensors of the parts that the ranks hold, of the lengths that are given.
    pub fn whole(&self, parts: Parts, lengths: &[usize]) -> Parts {
        let whole = self.in_groups(parts, ops::all_gather).into_iter().zip(lengths);
        whole.map(|((id, flat), &length)| (id, flat.slice_dim(0, 0..length))).collect()
    }

    /// Gives every parameter its new value, of which each rank has made its part.
    pub fn write<M: Module>(&self, model: M, parts: Parts) -> M {
        let sizes: HashMap<ParamId, usize> = named::parameter_names(&model)
            .into_iter()
            .map(|name| (name.id, name.shape.num_elements()))
            .collect();
        let lengths: Vec<usize> = parts.iter().map(|(id, _)| sizes[id]).collect();
        let values = self.whole(parts, &lengths).into_iter().collect();
        model.map(&mut Write { values })
    }
}

/// Elements that are on their way at once, as far as tensors allow: what is on its way needs memory
/// twice.
const AT_ONCE: usize = 1 << 26;

/// Adds zeros until the length is a multiple.
fn padded(flat: Tensor<1>, of: usize) -> Tensor<1> {
    let length = flat.dims()[0];
    match length.next_multiple_of(of) - length {
        0 => flat,
        missing => {
            let zeros = Tensor::zeros([missing], (&flat.device(), flat.dtype()));
            Tensor::cat(vec![flat, zeros], 0)
        }
    }
}

/// Takes the gradients of all parameters that learn.
struct Flat<'a> {
    gradients: GradientsParams,
    learning: HashSet<ParamId>,
    found: Parts,
    holders: &'a Holders,
}

impl ModuleVisitor for Flat<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.remove::<D>(param.id);
        let value = param.val();
        if !self.learning.contains(&param.id) || !value.is_require_grad() {
            return;
        }
        let gradient = match gradient {
            Some(gradient) => gradient.flatten::<1>(0, D - 1),
            None => {
                Tensor::zeros([param.shape().num_elements()], (&value.device().inner(), DType::F32))
            }
        };
        let group = self.holders.group(param.id);
        self.found.push((param.id, padded(gradient, group.size())));
    }
}

struct Write {
    values: HashMap<ParamId, Tensor<1>>,
}

impl ModuleMapper for Write {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.values.remove(&param.id) {
            Some(value) => {
                let shape = param.shape();
                with_value(param, |_| value.reshape(shape))
            }
            None => param,
        }
    }
}
