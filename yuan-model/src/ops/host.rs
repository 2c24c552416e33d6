//! Copies on the host of what is on a device, at the speed of its bus.

use std::{fmt, ops::Range, sync::Arc};

use burn::{backend::Dispatch, tensor::Tensor};

use super::YuanOps;

/// Memory of the host that a device writes to by itself.
pub trait PageLocked: Send + Sync + fmt::Debug {
    /// Its values.
    fn values(&self) -> &[u8];
}

/// Such memory, if the device has any.
#[derive(Debug, Clone)]
pub struct HostMemory(pub(in crate::ops) Option<Arc<dyn PageLocked>>);

/// Tensors on their way from a device to the host, all in one piece of memory that is used again by the
/// next ones.
#[derive(Debug)]
pub struct HostCopies {
    memory: Arc<dyn PageLocked>,
    used: usize,
    parts: Vec<Range<usize>>,
    last: Option<Tensor<1>>,
}

/// Where a copy may begin.
const ALIGNMENT: usize = 64;

impl HostCopies {
    /// Room for so many tensors of so many bytes together, on the host of a tensor's device; none where
    /// tensors are not copied in this way: on a CPU, or where the host has no such memory left.
    ///
    /// The first room of a size takes as long as writing it; the next ones are the same memory.
    pub fn reserve(like: &Tensor<1>, tensors: usize, bytes: usize) -> Option<Self> {
        let like = like.clone().into_dispatch();
        let memory = Dispatch::host_memory(like, bytes + tensors * ALIGNMENT).0?;
        Some(Self { memory, used: 0, parts: Vec::new(), last: None })
    }

    /// Copies a tensor as soon as the device has it. The tensor may be changed afterwards: its device does
    /// one after the other.
    ///
    /// # Panics
    ///
    /// If there is no room for it, or it is on another device.
    pub fn push(&mut self, tensor: Tensor<1>) {
        let bytes = tensor.dims()[0] * tensor.dtype().size();
        let start = self.used.next_multiple_of(ALIGNMENT);
        self.used = start + bytes;
        assert!(self.used <= self.memory.values().len(), "room for all tensors was reserved");
        self.parts.push(start..self.used);
        if bytes > 0 {
            let memory = HostMemory(Some(self.memory.clone()));
            let copied = Dispatch::copy_to_host(tensor.clone().into_dispatch(), memory, start);
            assert!(copied, "the tensor is on the device that the room was reserved for");
            self.last = Some(tensor);
        }
    }

    /// Waits until all copies are there, and returns them in order.
    ///
    /// # Panics
    ///
    /// If the device fails.
    pub fn finish(self) -> Vec<HostPart> {
        if let Some(last) = self.last {
            let waited = Dispatch::wait_for_copies(last.into_dispatch());
            assert!(waited, "the device that copied can be waited for");
        }
        let part = |range| HostPart { memory: self.memory.clone(), range };
        self.parts.into_iter().map(part).collect()
    }
}

/// A tensor that was copied to the host. Its memory is used again when all parts are dropped.
#[derive(Clone)]
pub struct HostPart {
    memory: Arc<dyn PageLocked>,
    range: Range<usize>,
}

impl AsRef<[u8]> for HostPart {
    fn as_ref(&self) -> &[u8] {
        &self.memory.values()[self.range.clone()]
    }
}

impl fmt::Debug for HostPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostPart").field("range", &self.range).finish_non_exhaustive()
    }
}
