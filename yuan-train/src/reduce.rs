//! Gradients of copies: all take the sum of all.
//!
//! A fixed order of the additions makes a run repeat exactly, whichever device is first.

use std::{collections::HashMap, ops::Range};

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{Device, Tensor},
};
use yuan_model::{
    named::{self, StoredParameter, StoredPart},
    ops::{self, Target},
};

/// Adds up the gradients of all copies of a parameter and gives each copy the sum.
///
/// A trained parameter without a gradient, an expert's on a device where no token went, gets zeros,
/// as it would if all experts were on one device.
pub fn reduce_gradients<M: Module>(
    model: &M,
    gradients: GradientsParams,
    stored: &[StoredParameter],
) -> GradientsParams {
    let parts = || stored.iter().flat_map(|parameter| &parameter.parts);
    if parts().all(|part| part.copies.len() == 1)
        && stored.iter().all(|stored| stored.parts.len() == 1)
    {
        return gradients;
    }
    let devices = named::parameter_devices(model);
    let parts = parts().map(|part| (part.copies[0], part)).collect();
    let mut collect = Collect { gradients, parts, devices, shared: Vec::new(), flat: Vec::new() };
    model.visit(&mut collect);
    let Collect { gradients, shared, flat, .. } = collect;
    let sums = shared.into_iter().flatten().copied().zip(in_groups(flat).into_iter().flatten());
    let mut register = Register { gradients, sums: sums.collect() };
    model.visit(&mut register);
    register.gradients
}

/// Takes the gradients that several devices have a part of.
struct Collect<'a> {
    gradients: GradientsParams,
    /// By their first copies.
    parts: HashMap<ParamId, &'a StoredPart>,
    devices: HashMap<ParamId, (Device, bool)>,
    /// Copies of parameters, and their gradients.
    shared: Vec<&'a [ParamId]>,
    flat: Vec<Vec<Tensor<1>>>,
}

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(&part) = self.parts.get(&param.id).filter(|_| self.devices[&param.id].1) else {
            return;
        };
        let mut take = |copy: &ParamId| {
            let zeros = || Tensor::zeros(param.shape(), &self.devices[copy].0.clone().inner());
            self.gradients.remove::<D>(*copy).unwrap_or_else(zeros)
        };
        if let [copy] = part.copies[..] {
            // Nobody else has a part of it.
            let gradient = take(&copy);
            return self.gradients.register::<D>(copy, gradient);
        }
        self.flat.push(part.copies.iter().map(|copy| take(copy).flatten::<1>(0, D - 1)).collect());
        self.shared.push(&part.copies);
    }
}

/// Gives every copy its sum.
struct Register {
    gradients: GradientsParams,
    sums: HashMap<ParamId, Tensor<1>>,
}

impl ModuleVisitor for Register {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(sum) = self.sums.remove(&param.id) {
            self.gradients.register::<D>(param.id, sum.reshape(param.shape()));
        }
    }
}

/// Elements that are on their way at once, as far as tensors allow: what is on its way needs memory
/// twice.
const AT_ONCE: usize = 1 << 28;

fn in_groups(tensors: Vec<Vec<Tensor<1>>>) -> Vec<Vec<Tensor<1>>> {
    let (mut sums, mut group, mut elements) = (Vec::with_capacity(tensors.len()), Vec::new(), 0);
    for copies in tensors {
        let more = copies[0].dims()[0];
        if elements + more > AT_ONCE && !group.is_empty() {
            sums.extend(all_reduce(std::mem::take(&mut group)));
            elements = 0;
        }
        elements += more;
        group.push(copies);
    }
    sums.extend(all_reduce(group));
    sums
}

/// Elements from which every device adds up a part of a sum; what is smaller is added up at one
/// place.
const WORTH_SPLITTING: usize = 1 << 16;

/// The sum of each list of tensors of one shape, on the device of every one of them, added in the
/// order in which they are given.
///
/// Of a large tensor every device adds up its part and hands it to the others, so that `2 (n - 1) /
/// n` of it leaves each of `n` devices, the least an all-reduce can do; of small ones some are
/// added up here, some there.
///
/// # Panics
///
/// If the tensors of a list are of different shapes.
pub fn all_reduce(lists: Vec<Vec<Tensor<1>>>) -> Vec<Vec<Tensor<1>>> {
    let mut owned: Vec<Vec<Owned>> = Vec::with_capacity(lists.len());
    for (turn, tensors) in lists.iter().enumerate() {
        owned.push(owners(tensors[0].dims()[0], tensors.len(), turn));
    }
    gather_sums(&lists, sum_at_owners(&lists, &owned))
}

/// The first half: every part of every list travels to its owner and is added up there, in the
/// order of the list. One sum a part, `[elements, 1]`.
fn sum_at_owners(lists: &[Vec<Tensor<1>>], owned: &[Vec<Owned>]) -> Vec<Vec<Tensor<2>>> {
    let (mut sources, mut targets) = (Vec::new(), Vec::new());
    for (tensors, parts) in lists.iter().zip(owned) {
        let first = sources.len();
        for tensor in tensors {
            sources.push(tensor.clone().reshape([tensor.dims()[0], 1]));
        }
        for Owned { device, elements } in parts {
            for copy in first..first + tensors.len() {
                let parts = vec![(copy, elements.clone())];
                targets.push(Target { at: first + device, parts });
            }
        }
    }
    let mut received = ops::exchange(sources, targets).into_iter().flatten();
    let mut sums = Vec::with_capacity(lists.len());
    for (tensors, parts) in lists.iter().zip(owned) {
        let mut of_list = Vec::with_capacity(parts.len());
        for _ in parts {
            let copies = received.by_ref().take(tensors.len());
            of_list.extend(copies.reduce(|sum, more| sum + more));
        }
        sums.push(of_list);
    }
    sums
}

/// The second half: the sums of a list's parts travel to all of its devices and make a whole there.
fn gather_sums(lists: &[Vec<Tensor<1>>], sums: Vec<Vec<Tensor<2>>>) -> Vec<Vec<Tensor<1>>> {
    let (mut sources, mut targets) = (Vec::new(), Vec::new());
    // A row that nobody takes stands for each device: a result lies where some source does.
    let mut places: Vec<(Device, usize)> = Vec::new();
    for (tensors, sums) in lists.iter().zip(sums) {
        let mut parts = Vec::with_capacity(sums.len());
        for sum in sums {
            parts.push((sources.len(), 0..sum.dims()[0]));
            sources.push(sum);
        }
        for tensor in tensors {
            let device = tensor.device();
            let known = places.iter().find(|(place, _)| *place == device);
            let at = match known {
                Some(&(_, at)) => at,
                None => {
                    sources.push(Tensor::empty([1, 1], (&device, tensor.dtype())));
                    places.push((device, sources.len() - 1));
                    sources.len() - 1
                }
            };
            targets.push(Target { at, parts: parts.clone() });
        }
    }
    let mut whole = ops::exchange(sources, targets).into_iter().flatten();
    let mut results = Vec::with_capacity(lists.len());
    for tensors in lists {
        let copies = whole.by_ref().take(tensors.len());
        results.push(copies.map(|sum| sum.flatten(0, 1)).collect());
    }
    results
}

/// A part of a sum, and the device of a list that adds it up.
struct Owned {
    device: usize,
    elements: Range<usize>,
}

/// Who adds up which elements of the sum of a list; lists take turns where it is one device.
fn owners(elements: usize, devices: usize, turn: usize) -> Vec<Owned> {
    if elements < WORTH_SPLITTING {
        return vec![Owned { device: turn % devices, elements: 0..elements }];
    }
    let share = elements.div_ceil(devices);
    let mut parts = Vec::with_capacity(devices);
    for device in 0..devices {
        let part = device * share..((device + 1) * share).min(elements);
        if !part.is_empty() {
            parts.push(Owned { device, elements: part });
        }
    }
    parts
}
