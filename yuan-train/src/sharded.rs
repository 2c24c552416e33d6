//! Updates over ranks, of which each keeps the moments of its part of every parameter (ZeRO-1,
//! Rajbhandari et al. 2020).
//!
//! The ranks that hold copies of a parameter cut it, flat, into parts of one length. Gradients are
//! added up part by part where each part belongs (reduce-scatter), the part is updated there, and
//! the updated parts are put together again on every rank (all-gather).

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ops::Range,
};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{DType, Tensor, TensorData},
};
use yuan_model::{
    named::{self, StoredParameter},
    ops::{self, Arriving},
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
        let spread = stored.iter().filter(|parameter| parameter.is_spread());
        Self { spread: spread.map(|parameter| parameter.id).collect(), ranks: ranks.clone() }
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

    /// Square of the global norm of the gradients, each element counted once.
    ///
    /// # Errors
    ///
    /// If the device or a rank fails.
    pub fn norm_squared(&self, own: f64) -> Result<f64, RankError> {
        Ok(self.ranks.world().sum(&[own])?[0])
    }

    /// Cuts tensors into as few lists as memory allows, each of tensors with one group.
    fn in_groups(&self, tensors: Parts) -> Vec<(&Communicator, Parts)> {
        let (spread, whole): (Parts, Parts) =
            tensors.into_iter().partition(|(id, _)| self.spread.contains(id));
        let mut lists: Vec<(&Communicator, Parts)> = Vec::new();
        for (tensors, group) in [(whole, self.ranks.world()), (spread, self.ranks.column())] {
            let (mut list, mut elements) = (Vec::new(), 0);
            for (id, tensor) in tensors {
                let more = tensor.dims()[0];
                if elements + more > AT_ONCE && !list.is_empty() {
                    lists.push((group, std::mem::take(&mut list)));
                    elements = 0;
                }
                elements += more;
                list.push((id, tensor));
            }
            if !list.is_empty() {
                lists.push((group, list));
            }
        }
        lists
    }

    /// The elements of a parameter, counted through all of it, that this rank updates.
    pub fn own_elements(&self, parameter: &StoredParameter) -> Range<usize> {
        let (group, held) = (self.group(parameter.id), parameter.elements());
        let part = held.len().div_ceil(group.size());
        let start = (held.start + group.rank() * part).min(held.end);
        start..(start + part).min(held.end)
    }

    /// Those elements with the zeros behind them that make all parts equally long.
    pub fn filled_up(&self, parameter: &StoredParameter, own: TensorData) -> TensorData {
        let part = parameter.elements().len().div_ceil(self.group(parameter.id).size());
        if own.num_elements() == part {
            return own;
        }
        let (dtype, mut bytes) = (own.dtype(), own.as_bytes().to_vec());
        bytes.resize(part * dtype.size(), 0);
        TensorData::from_bytes_vec(bytes, [part], dtype)
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

    /// The whole flat tensor, of so many elements, of which every rank has its part.
    pub fn whole(&self, param: ParamId, part: Tensor<1>, length: usize) -> Tensor<1> {
        let mut whole = ops::all_gather(vec![part], self.group(param)).wait();
        cut_to(whole.swap_remove(0), length)
    }
}

/// Takes off the zeros that made all parts equally long.
fn cut_to(flat: Tensor<1>, length: usize) -> Tensor<1> {
    match flat.dims()[0] > length {
        true => flat.slice_dim(0, 0..length),
        false => flat,
    }
}

/// Parts of parameters that the ranks have updated, on their way to all who hold them.
pub(crate) struct Gathering<'a> {
    holders: &'a Holders,
    /// What waits for more to go with it: parts that all ranks hold, and those of experts.
    open: [Parts; 2],
    begun: Vec<(Vec<ParamId>, Arriving)>,
}

impl<'a> Gathering<'a> {
    pub fn new(holders: &'a Holders) -> Self {
        Self { holders, open: Default::default(), begun: Vec::new() }
    }

    /// Sends the updated part of a parameter; parameters come in the order in which a forward pass
    /// uses them.
    pub fn add(&mut self, param: ParamId, part: Tensor<1>) {
        let which = usize::from(self.holders.spread.contains(&param));
        let elements = |parts: &Parts| parts.iter().map(|(_, part)| part.dims()[0]).sum::<usize>();
        let group = self.holders.group(param).size();
        if (elements(&self.open[which]) + part.dims()[0]) * group > AT_ONCE {
            self.begin(which);
        }
        self.open[which].push((param, part));
    }

    fn begin(&mut self, which: usize) {
        let (ids, parts): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.open[which]).into_iter().unzip();
        if let Some(&first) = ids.first() {
            let whole = ops::all_gather(parts, self.holders.group(first));
            self.begun.push((ids, whole));
        }
    }

    /// The model with the new values, which are not to be read before they are there.
    pub fn finish<M: Module>(mut self, model: M) -> (M, Arrivals) {
        self.begin(0);
        self.begin(1);
        let sizes: HashMap<ParamId, usize> = named::parameter_names(&model)
            .into_iter()
            .map(|name| (name.id, name.shape.num_elements()))
            .collect();
        let (mut values, mut arrivals) = (HashMap::new(), Arrivals::default());
        for (ids, arriving) in self.begun {
            let lengths = || ids.iter().map(|id| sizes[id]);
            let is_padded =
                arriving.unread().iter().zip(lengths()).any(|(x, length)| x.dims()[0] > length);
            if is_padded {
                let cut = arriving.wait().into_iter().zip(lengths());
                values.extend(ids.iter().copied().zip(cut.map(|(x, length)| cut_to(x, length))));
                continue;
            }
            values.extend(ids.iter().copied().zip(arriving.unread().iter().cloned()));
            arrivals.entry_of.extend(ids.iter().map(|&id| (id, arrivals.entries.len())));
            arrivals.entries.push(Some(arriving));
        }
        (model.map(&mut Write { values }), arrivals)
    }
}

/// New values of parameters that may still be on their way.
#[derive(Debug, Default)]
pub(crate) struct Arrivals {
    entries: Vec<Option<Arriving>>,
    entry_of: HashMap<ParamId, usize>,
}

impl Arrivals {
    /// Waits for those of some parameters.
    pub fn wait_for(&mut self, parameters: &[ParamId]) {
        for id in parameters {
            if let Some(arriving) = self.entry_of.get(id).and_then(|&at| self.entries[at].take()) {
                drop(arriving.wait());
            }
        }
    }

    /// Waits for all.
    pub fn wait_for_all(&mut self) {
        self.entries.drain(..).flatten().for_each(|arriving| drop(arriving.wait()));
        self.entry_of.clear();
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

/// Gradients that are added up over the ranks while others are still to come.
pub(crate) struct Sums<'a> {
    holders: &'a Holders,
    /// Parameters that learn, of which no gradient came yet.
    missing: HashSet<ParamId>,
    /// What is on its way, the oldest first, with whose sums it is.
    pending: VecDeque<(Vec<ParamId>, Arriving)>,
    done: HashMap<ParamId, Tensor<1>>,
}

/// Lists that are on their way at once: what they are made from is kept in memory.
const ON_THE_WAY: usize = 4;

impl<'a> Sums<'a> {
    /// Those of the parameters that learn, by their paths.
    pub fn new<M: Module>(holders: &'a Holders, model: &M, learns: impl Fn(&str) -> bool) -> Self {
        let names = named::parameter_names(model).into_iter();
        let learning = names.filter(|name| learns(&name.path)).map(|name| name.id).collect();
        let mut trained = Trained { learning, found: HashSet::new() };
        model.visit(&mut trained);
        let (pending, done) = (VecDeque::new(), HashMap::new());
        Self { holders, missing: trained.found, pending, done }
    }

    /// Takes the gradients of some parameters, the same ones on every rank.
    pub fn add<M: Module>(&mut self, model: &M, gradients: GradientsParams) {
        let mut flat = Flat { gradients, sums: self, found: Vec::new() };
        model.visit(&mut flat);
        let found = flat.found;
        self.begin(found);
    }

    fn begin(&mut self, gradients: Parts) {
        for (group, list) in self.holders.in_groups(gradients) {
            let (ids, tensors) = list.into_iter().unzip();
            self.pending.push_back((ids, ops::reduce_scatter(tensors, group)));
            while self.pending.len() > ON_THE_WAY {
                self.finish_oldest();
            }
        }
    }

    fn finish_oldest(&mut self) {
        if let Some((ids, sums)) = self.pending.pop_front() {
            self.done.extend(ids.into_iter().zip(sums.wait()));
        }
    }

    /// The part of every sum that this rank updates, in the order of the parameters. A gradient that
    /// is missing is zero, as it would be if all tokens were on one device.
    pub fn finish<M: Module>(mut self, model: &M) -> Parts {
        let mut zeros = Zeros { missing: std::mem::take(&mut self.missing), found: Vec::new() };
        model.visit(&mut zeros);
        let padded = |(id, zeros)| (id, padded(zeros, self.holders.group(id).size()));
        let zeros = zeros.found.into_iter().map(padded).collect();
        self.begin(zeros);
        while !self.pending.is_empty() {
            self.finish_oldest();
        }
        let names = named::parameter_names(model).into_iter();
        names.filter_map(|name| Some((name.id, self.done.remove(&name.id)?))).collect()
    }
}

/// The parameters of some that want gradients.
struct Trained {
    learning: HashSet<ParamId>,
    found: HashSet<ParamId>,
}

impl ModuleVisitor for Trained {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.learning.contains(&param.id) && param.val().is_require_grad() {
            self.found.insert(param.id);
        }
    }
}

/// Takes the gradients that are there of parameters that learn.
struct Flat<'a, 'b> {
    gradients: GradientsParams,
    sums: &'a mut Sums<'b>,
    found: Parts,
}

impl ModuleVisitor for Flat<'_, '_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return };
        if self.sums.missing.remove(&param.id) {
            let group = self.sums.holders.group(param.id);
            self.found.push((param.id, padded(gradient.flatten::<1>(0, D - 1), group.size())));
        }
    }
}

/// Makes gradients of zeros.
struct Zeros {
    missing: HashSet<ParamId>,
    found: Parts,
}

impl ModuleVisitor for Zeros {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.missing.contains(&param.id) {
            let on = (&param.val().device().inner(), DType::F32);
            self.found.push((param.id, Tensor::zeros([param.shape().num_elements()], on)));
        }
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
