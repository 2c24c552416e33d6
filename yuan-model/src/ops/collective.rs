//! Tensors that ranks exchange and add up.
//!
//! Every rank of the group calls the same function at the same time. A rank that is gone ends the
//! call with a panic, since an operation has no other way to fail; whoever started the rank turns it
//! into an error.

use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    ExtensionType, tensor::FloatTensor,
};
use burn::tensor::{Int, Tensor};

use super::YuanOps;
use crate::ranks::Communicator;

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

/// Rows that every rank of a group sends to every other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowsToRanks {
    /// Who takes part.
    pub group: Communicator,
    /// Rows for each rank; those for the first rank come first.
    pub send: Vec<usize>,
    /// Rows from each rank.
    pub receive: Vec<usize>,
}

impl RowsToRanks {
    /// What brings them back.
    #[must_use]
    pub fn back(self) -> Self {
        Self { group: self.group, send: self.receive, receive: self.send }
    }
}

/// Sends rows, `[rows, width]`, to the ranks of a group: `[received rows, width]`, those of the first
/// rank first. Where nothing arrives there is one row of zeros instead, since a tensor has one at
/// least. Rows behind those that are sent are left out.
///
/// Its gradient brings the gradients of the rows back.
///
/// # Panics
///
/// If there are fewer rows than are sent, or a rank is gone.
pub fn all_to_all(rows: Tensor<2>, to: RowsToRanks) -> Tensor<2> {
    let [held, _] = rows.dims();
    assert!(to.send.iter().sum::<usize>() <= held, "{held} rows, {:?} to send", to.send);
    assert_eq!([to.send.len(), to.receive.len()], [to.group.size(); 2], "a count for every rank");
    if to.group.size() == 1 {
        return rows;
    }
    Tensor::from_dispatch(Dispatch::all_to_all(rows.into_dispatch(), to))
}

/// The sum of a tensor over the ranks, added in their order: the same bits on all of them.
///
/// Its gradient passes unchanged: every rank computes the same from the sum, and differentiates it
/// for its own part.
///
/// # Panics
///
/// If the ranks bring tensors of different sizes, or one is gone.
pub fn all_reduce<const D: usize>(x: Tensor<D>, group: &Communicator) -> Tensor<D> {
    match group.size() {
        1 => x,
        _ => Tensor::from_dispatch(Dispatch::sum_over_ranks(x.into_dispatch(), group.clone())),
    }
}

/// Begins to add up tensors: of each, `[n]`, the part of the sum that belongs to this rank, `[n /
/// ranks]`, added in the order of the ranks where their backend does not say otherwise (NCCL has its
/// own). Not differentiable.
///
/// # Panics
///
/// If a length is no multiple of the number of ranks, the ranks bring different ones, or one is
/// gone.
pub fn reduce_scatter(tensors: Vec<Tensor<1>>, group: &Communicator) -> Arriving {
    assert!(tensors.iter().all(|x| x.dims()[0].is_multiple_of(group.size())), "equal parts");
    begin(tensors, group, Dispatch::reduce_scatter)
}

/// Begins to put the parts of all ranks together, one after the other: of tensors `[n]`, `[n ·
/// ranks]`. Not differentiable.
///
/// # Panics
///
/// If the ranks bring tensors of different sizes, or one is gone.
pub fn all_gather(tensors: Vec<Tensor<1>>, group: &Communicator) -> Arriving {
    begin(tensors, group, Dispatch::all_gather)
}

fn begin(
    sources: Vec<Tensor<1>>,
    group: &Communicator,
    operation: impl FnOnce(TensorList<Dispatch>, Communicator) -> TensorList<Dispatch>,
) -> Arriving {
    if group.size() == 1 || sources.is_empty() {
        return Arriving { results: sources, sources: Vec::new() };
    }
    let list = TensorList(sources.iter().map(|x| x.clone().into_dispatch()).collect());
    let results = operation(list, group.clone()).0.into_iter().map(Tensor::from_dispatch).collect();
    Arriving { results, sources }
}

/// Tensors that may still be on their way while the device computes something else.
#[derive(Debug)]
#[must_use]
pub struct Arriving {
    results: Vec<Tensor<1>>,
    /// Memory that is read until they are there; empty if they were never on their way.
    sources: Vec<Tensor<1>>,
}

impl Arriving {
    /// The tensors before they are there: they may be handed on, and not be read before
    /// [`wait`](Self::wait).
    pub fn unread(&self) -> &[Tensor<1>] {
        &self.results
    }

    /// The tensors: what the device computes from now on comes after them.
    pub fn wait(mut self) -> Vec<Tensor<1>> {
        self.arrive();
        std::mem::take(&mut self.results)
    }

    fn arrive(&mut self) {
        if !self.sources.is_empty() {
            let list = self.results.iter().map(|x| x.clone().into_dispatch()).collect();
            drop(Dispatch::arrived(TensorList(list)));
            self.sources.clear();
        }
    }
}

impl Drop for Arriving {
    /// What the device computes later comes after it, as after [`wait`](Self::wait).
    fn drop(&mut self) {
        // A device that has failed would fail once more.
        if !std::thread::panicking() {
            self.arrive();
        }
    }
}

/// The counts of every rank, `[ranks · n]`, those of the first rank first: of each, `[n]`. They stay on
/// the device and are on their way to the host, where [`read_counts`](super::read_counts) has them.
///
/// # Panics
///
/// If the ranks bring different numbers of counts, or one is gone.
pub fn gather_counts(counts: Tensor<1, Int>, group: &Communicator) -> Tensor<1, Int> {
    match group.size() {
        1 => counts,
        _ => Tensor::from_dispatch(Dispatch::gather_counts(counts.into_dispatch(), group.clone())),
    }
}

/// By way of the host, whatever the backend: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    };
    use burn::tensor::{DType, Shape, TensorData, read_sync};

    use super::RowsToRanks;
    use crate::ops::parts::zeros_like;
    use crate::ranks::{Communicator, RankError};

    /// See [`all_to_all`](super::all_to_all).
    pub fn all_to_all<B: Backend>(rows: FloatTensor<B>, to: &RowsToRanks) -> FloatTensor<B> {
        let (width, dtype, device) = (rows.shape()[1], rows.dtype(), rows.device());
        let nothing = || zeros_like::<B>(&rows, Shape::from([1, width]));
        let (size, bytes) = (width * dtype.size(), bytes_of::<B>(rows.clone()));
        let mut rest = &bytes[..];
        let parts = to.send.iter().map(|&count| {
            let (part, behind) = rest.split_at(count * size);
            rest = behind;
            part.to_vec()
        });
        let expected: Vec<usize> = to.receive.iter().map(|&count| count * size).collect();
        let received = exchange(&to.group, parts.collect(), &expected).concat();
        match received.len() / size {
            0 => nothing(),
            count => tensor_of::<B>(received, [count, width].into(), dtype, &device),
        }
    }

    /// See [`all_reduce`](super::all_reduce).
    ///
    /// # Panics
    ///
    /// As there.
    pub fn all_reduce<B: Backend>(x: FloatTensor<B>, group: &Communicator) -> FloatTensor<B> {
        let (shape, dtype, device) = (x.shape(), x.dtype(), x.device());
        let bytes = bytes_of::<B>(x);
        let expected = vec![bytes.len(); group.size()];
        let received = exchange(group, vec![bytes; group.size()], &expected).into_iter();
        let tensors = received.map(|bytes| tensor_of::<B>(bytes, shape.clone(), dtype, &device));
        tensors.reduce(|sum, more| B::float_add(sum, more)).expect("a group has a rank")
    }

    /// See [`gather_counts`](super::gather_counts).
    ///
    /// # Panics
    ///
    /// As there.
    pub fn gather_counts<B: Backend>(counts: IntTensor<B>, group: &Communicator) -> IntTensor<B> {
        let (count, dtype, device) = (counts.shape()[0], counts.dtype(), counts.device());
        let data = read_sync(B::int_into_data(counts));
        let data = data.unwrap_or_else(|error| panic!("the device failed: {error}"));
        let own = data.as_bytes().to_vec();
        let expected = vec![own.len(); group.size()];
        let bytes = exchange(group, vec![own; group.size()], &expected).concat();
        let shape = [count * group.size()];
        B::int_from_data(TensorData::from_bytes_vec(bytes, shape, dtype), &device)
    }

    /// See [`reduce_scatter`](super::reduce_scatter).
    ///
    /// # Panics
    ///
    /// As there.
    pub fn reduce_scatter<B: Backend>(
        tensors: Vec<FloatTensor<B>>,
        group: &Communicator,
    ) -> Vec<FloatTensor<B>> {
        let mut parts = vec![Vec::new(); group.size()];
        let mut kinds = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let length = tensor.shape()[0] / group.size();
            kinds.push((length, tensor.dtype(), tensor.device()));
            let bytes = bytes_of::<B>(tensor);
            let size = bytes.len() / group.size();
            for (rank, part) in parts.iter_mut().enumerate() {
                part.extend_from_slice(&bytes[rank * size..(rank + 1) * size]);
            }
        }
        let expected = vec![parts[0].len(); group.size()];
        let received = exchange(group, parts, &expected);
        let mut start = 0;
        let sum = |(length, dtype, device): (usize, DType, B::Device)| {
            let end = start + length * dtype.size();
            let of_rank = |bytes: &Vec<u8>| {
                tensor_of::<B>(bytes[start..end].to_vec(), [length].into(), dtype, &device)
            };
            let tensors = received.iter().map(of_rank);
            let sum = tensors.reduce(|sum, more| B::float_add(sum, more));
            start = end;
            sum.expect("a group has a rank")
        };
        kinds.into_iter().map(sum).collect()
    }

    /// See [`all_gather`](super::all_gather).
    pub fn all_gather<B: Backend>(
        tensors: Vec<FloatTensor<B>>,
        group: &Communicator,
    ) -> Vec<FloatTensor<B>> {
        let (mut own, mut kinds) = (Vec::new(), Vec::with_capacity(tensors.len()));
        for tensor in tensors {
            kinds.push((tensor.shape()[0], tensor.dtype(), tensor.device()));
            own.extend(bytes_of::<B>(tensor));
        }
        let expected = vec![own.len(); group.size()];
        let received = exchange(group, vec![own; group.size()], &expected);
        let mut start = 0;
        let whole = |(length, dtype, device): (usize, DType, B::Device)| {
            let end = start + length * dtype.size();
            let bytes: Vec<u8> =
                received.iter().flat_map(|bytes| &bytes[start..end]).copied().collect();
            start = end;
            tensor_of::<B>(bytes, [length * group.size()].into(), dtype, &device)
        };
        kinds.into_iter().map(whole).collect()
    }

    /// [`Communicator::exchange`] of parts of which everybody knows the sizes.
    fn exchange(group: &Communicator, parts: Vec<Vec<u8>>, expected: &[usize]) -> Vec<Vec<u8>> {
        let received = group.exchange(parts).unwrap_or_else(|error| panic!("{error}"));
        for (rank, (bytes, &expected)) in received.iter().zip(expected).enumerate() {
            let found = bytes.len();
            assert!(found == expected, "{}", RankError::OutOfStep { rank, found, expected });
        }
        received
    }

    fn bytes_of<B: Backend>(tensor: FloatTensor<B>) -> Vec<u8> {
        let data = read_sync(B::float_into_data(tensor));
        data.unwrap_or_else(|error| panic!("the device failed: {error}")).as_bytes().to_vec()
    }

    fn tensor_of<B: Backend>(
        bytes: Vec<u8>,
        shape: Shape,
        dtype: DType,
        device: &B::Device,
    ) -> FloatTensor<B> {
        B::float_from_data(TensorData::from_bytes_vec(bytes, shape, dtype), device)
    }
}

step!(AllToAll, 1, kept 0, RowsToRanks, |[], to, grad| [B::all_to_all(grad, to.back())]);

step!(AllReduce, 1, kept 0, (), |[], (), grad| [grad]);
