//! Rows of tensors on several devices, put together into others: what the exchange of tokens and
//! sums over devices are made of.
//!
//! All copies of an exchange are one operation, so that they can run beside each other: links carry
//! both directions, and no pair of devices waits for another one.

use std::ops::Range;

use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    ExtensionType, TensorMetadata, get_or_init_device_settings, tensor::FloatTensor,
};
use burn::tensor::{Shape, Slice, Tensor};

use super::YuanOps;

mod recorded;

pub(super) use recorded::recorded;

/// One result of an [`exchange`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// A source on whose device the result lies.
    pub at: usize,
    /// Sources and rows of theirs, in the order of the result.
    pub parts: Vec<(usize, Range<usize>)>,
}

impl Target {
    /// Rows of the result.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows.len()).sum()
    }

    /// The parts, those that follow each other in a source as one.
    pub fn merged(&self) -> Vec<(usize, Range<usize>)> {
        let mut merged: Vec<(usize, Range<usize>)> = Vec::new();
        for (source, rows) in self.parts.iter().filter(|(_, rows)| !rows.is_empty()) {
            match merged.last_mut() {
                Some((last, before)) if last == source && before.end == rows.start => {
                    before.end = rows.end;
                }
                _ => merged.push((*source, rows.clone())),
            }
        }
        merged
    }
}

/// Puts rows of the sources, `[rows, width]` of one width and type on any devices, together: each
/// target gets its parts one after the other, `[rows, width]` on its device, or nothing where there
/// are none.
///
/// Gradients flow where every row of a source goes to exactly one place, or none does.
///
/// # Panics
///
/// If a part lies outside its source, the sources are of different widths, or gradients are asked
/// for where rows go to several places.
pub fn exchange(sources: Vec<Tensor<2>>, targets: Vec<Target>) -> Vec<Option<Tensor<2>>> {
    let sizes: Vec<[usize; 2]> = sources.iter().map(Tensor::dims).collect();
    for target in &targets {
        assert!(target.at < sizes.len(), "a result beside source {} of {}", target.at, sizes.len());
        for (source, rows) in &target.parts {
            let held = sizes.get(*source).map_or(0, |[rows, _]| *rows);
            assert!(rows.end <= held, "rows {rows:?} of source {source}, which has {held}");
        }
    }
    assert!(
        sizes.windows(2).all(|pair| pair[0][1] == pair[1][1]),
        "sources of one width: {sizes:?}"
    );
    let nothing: Vec<bool> = targets.iter().map(|target| target.rows() == 0).collect();
    if nothing.iter().all(|nothing| *nothing) {
        return vec![None; targets.len()];
    }
    let sources = TensorList(sources.into_iter().map(Tensor::into_dispatch).collect());
    let results = Dispatch::exchange(sources, targets).0.into_iter().zip(nothing);
    results.map(|(result, nothing)| (!nothing).then(|| Tensor::from_dispatch(result))).collect()
}

/// As many tensors as there are, on their way through Burn's dispatch.
#[derive(Debug, Clone)]
pub struct TensorList<B: Backend>(pub Vec<FloatTensor<B>>);

impl<B: Backend> ExtensionType<B> for TensorList<B> {
    type Target = TensorList<Dispatch>;

    fn map_to_dispatch<F>(
        self,
        map_kind: F,
        autodiff: DispatchAutodiffContext,
    ) -> TensorList<Dispatch>
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let wrap =
            |tensor| DispatchTensor { kind: map_kind(BackendTensor::Float(tensor)), autodiff };
        TensorList(self.0.into_iter().map(wrap).collect())
    }

    fn map_from_dispatch<F>(target: TensorList<Dispatch>, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        Self(target.0.into_iter().map(|tensor| unwrap_kind(tensor).float()).collect())
    }

    fn routing_tensor(target: &TensorList<Dispatch>) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn routing_float_tensor(target: &TensorList<Dispatch>) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn autodiff_context(target: &TensorList<Dispatch>) -> DispatchAutodiffContext {
        let contexts = target.0.iter().map(|tensor| tensor.autodiff);
        contexts.fold(DispatchAutodiffContext::Disabled, DispatchAutodiffContext::merge)
    }
}

/// By slices and copies, whatever the backend; a target without rows gets a row of zeros, which
/// nobody reads.
pub(super) fn portable<B: YuanOps>(
    sources: &[FloatTensor<B>],
    targets: &[Target],
) -> Vec<FloatTensor<B>> {
    targets.iter().map(|target| assembled::<B>(sources, target)).collect()
}

fn assembled<B: YuanOps>(sources: &[FloatTensor<B>], target: &Target) -> FloatTensor<B> {
    let like = &sources[target.at];
    let (device, parts) = (like.device(), target.merged());
    if parts.is_empty() {
        return B::float_zeros(Shape::from([1, like.shape()[1]]), &device, like.dtype().into());
    }
    // What comes from one source travels at once, and is cut where it arrives.
    let mut arrived: Vec<Option<(FloatTensor<B>, usize)>> = vec![None; sources.len()];
    let mut pieces = Vec::with_capacity(parts.len());
    for (source, rows) in &parts {
        let (all, start) = arrived[*source].get_or_insert_with(|| {
            let of_source = parts.iter().filter(|(other, _)| other == source);
            let slices = of_source.map(|(_, rows)| slice::<B>(&sources[*source], rows.clone()));
            (moved::<B>(joined::<B>(slices.collect()), &device), 0)
        });
        pieces.push(slice::<B>(all, *start..*start + rows.len()));
        *start += rows.len();
    }
    joined::<B>(pieces)
}

fn slice<B: Backend>(tensor: &FloatTensor<B>, rows: Range<usize>) -> FloatTensor<B> {
    if rows == (0..tensor.shape()[0]) {
        return tensor.clone();
    }
    B::float_slice(tensor.clone(), &[Slice::from(rows), Slice::full()])
}

fn joined<B: Backend>(mut tensors: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    match tensors.len() {
        1 => tensors.remove(0),
        _ => B::float_cat(tensors, 0),
    }
}

fn moved<B: YuanOps>(tensor: FloatTensor<B>, device: &B::Device) -> FloatTensor<B> {
    if tensor.device() == *device {
        return tensor;
    }
    let dtype = get_or_init_device_settings::<B>(device).int_dtype;
    B::transfer(tensor, B::int_empty(Shape::from([1]), device, dtype))
}

#[cfg(test)]
mod tests {
    use super::Target;

    #[test]
    fn neighbours_are_one_part() {
        let target = Target {
            at: 0,
            parts: vec![(0, 0..2), (0, 2..3), (1, 3..3), (0, 3..4), (0, 5..6), (1, 6..7)],
        };
        assert_eq!(target.rows(), 6);
        assert_eq!(target.merged(), [(0, 0..4), (0, 5..6), (1, 6..7)]);
    }
}
