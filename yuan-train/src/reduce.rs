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
    named::{self, Part, StoredParameter},
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
    parts: HashMap<ParamId, &'a Part>,
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
    let (mut sources, mut targets) = (Vec::new(), Vec::new());
    let mut pieces: Vec<Vec<(usize, Range<usize>)>> = Vec::with_capacity(lists.len());
    for (turn, tensors) in lists.iter().enumerate() {
        let (elements, first) = (tensors[0].dims()[0], sources.len());
        let of_list = owners(elements, tensors.len(), turn);
        sources.extend(tensors.iter().map(|tensor| tensor.clone().reshape([elements, 1])));
        for (owner, range) in &of_list {
            let from =
                |copy| Target { at: first + owner, parts: vec![(first + copy, range.clone())] };
            targets.extend((0..tensors.len()).map(from));
        }
        pieces.push(of_list);
    }
    let mut received = ops::exchange(sources, targets).into_iter().flatten();
    let (mut sources, mut targets): (Vec<Tensor<2>>, Vec<Target>) = (Vec::new(), Vec::new());
    // Sums of pieces, in their order.
    let mut places: Vec<Vec<(usize, Range<usize>)>> = Vec::with_capacity(lists.len());
    for (tensors, pieces) in lists.iter().zip(&pieces) {
        let place = |(_, range): &(usize, Range<usize>)| {
            let sum = received.by_ref().take(tensors.len()).reduce(|sum, more| sum + more);
            sources.extend(sum);
            (sources.len() - 1, 0..range.len())
        };
        places.push(pieces.iter().map(place).collect());
    }
    // A row that nobody takes stands for each device.
    let mut rows: Vec<(Device, usize)> = Vec::new();
    for (tensors, parts) in lists.iter().zip(places) {
        for tensor in tensors {
            let device = tensor.device();
            let known = rows.iter().find(|(row, _)| *row == device).map(|(_, place)| *place);
            let at = known.unwrap_or_else(|| {
                sources.push(Tensor::empty([1, 1], (&device, tensor.dtype())));
                rows.push((device, sources.len() - 1));
                sources.len() - 1
            });
            targets.push(Target { at, parts: parts.clone() });
        }
    }
    let mut whole = ops::exchange(sources, targets).into_iter().flatten();
    let of_list =
        |tensors: Vec<_>| whole.by_ref().take(tensors.len()).map(|sum| sum.flatten(0, 1)).collect();
    lists.into_iter().map(of_list).collect()
}

/// Who adds up which elements.
fn owners(elements: usize, devices: usize, turn: usize) -> Vec<(usize, Range<usize>)> {
    if elements < WORTH_SPLITTING {
        return vec![(turn % devices, 0..elements)];
    }
    let share = elements.div_ceil(devices);
    let range = |device: usize| (device, device * share..((device + 1) * share).min(elements));
    (0..devices).map(range).filter(|(_, range)| !range.is_empty()).collect()
}
