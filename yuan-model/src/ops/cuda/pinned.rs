//! Page-locked memory that tensors are copied to, kept for the next copies: to lock gigabytes takes
//! seconds, and to free them does too.

#![expect(unsafe_code, reason = "CUDA's libraries are C: pointers and handles have no safe form")]

use std::{
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
};

use burn_cubecl::{CubeDevice, tensor::CubeTensor};
use cudarc::driver::{result as driver, sys};

use super::{
    failure::text,
    queue::{run, run_now},
    tensors::contiguous,
};
use crate::ops::host::{HostMemory, PageLocked};

/// Memory that is locked.
#[derive(Debug)]
struct Block {
    address: usize,
    bytes: usize,
}

impl PageLocked for Block {
    fn values(&self) -> &[u8] {
        // SAFETY: the memory was allocated with as many bytes and lives as long as the block is known; a
        // device writes to it only before `HostCopies` hands parts of it out.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }
    }
}

/// Blocks that were locked, with the devices that they were locked for.
static BLOCKS: Mutex<Vec<(CubeDevice, Arc<Block>)>> = Mutex::new(Vec::new());

/// A block that nobody uses, of at least so many bytes; none if the host has no memory to lock.
pub(super) fn reserve(like: &CubeTensor, bytes: usize) -> HostMemory {
    let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    let is_free = |(device, block): &(CubeDevice, Arc<Block>)| {
        *device == like.device && Arc::strong_count(block) == 1
    };
    if let Some((_, block)) = blocks.iter().find(|known| is_free(known) && known.1.bytes >= bytes) {
        return HostMemory(Some(block.clone()));
    }
    // Too small ones would never be used again.
    let small: Vec<_> = blocks.extract_if(.., |known| is_free(known)).collect();
    let allocated = run_now(like, move |_, _| {
        for (_, block) in small {
            // SAFETY: the block was allocated so, and was the last one to know its memory.
            unsafe { sys::cuMemFreeHost(block.address as *mut c_void) }.result().map_err(text)?;
        }
        // SAFETY: the memory is used through the block alone.
        Ok(unsafe { driver::malloc_host(bytes, 0) }.ok().map(|memory| memory as usize))
    });
    HostMemory(allocated.map(|address| {
        let block = Arc::new(Block { address, bytes });
        blocks.push((like.device.clone(), block.clone()));
        block as Arc<dyn PageLocked>
    }))
}

/// Copies a tensor into a block when everything queued before is done.
pub(super) fn copy(tensor: CubeTensor, memory: HostMemory, at: usize) {
    let Some(memory) = memory.0 else { return };
    let tensor = contiguous(tensor);
    let bytes = tensor.meta.shape().num_elements() * tensor.dtype.size();
    let to = memory.values()[at..at + bytes].as_ptr() as usize;
    run([&tensor], move |lanes, [from]| {
        // SAFETY: the block has room for these bytes, as was checked, and the tensor has them.
        let copied =
            unsafe { sys::cuMemcpyDtoHAsync_v2(to as *mut c_void, from, bytes, lanes.stream()) };
        drop(memory);
        copied.result().map_err(text)
    });
}

/// Waits for the copies that were queued before.
pub(super) fn wait(tensor: &CubeTensor) {
    run_now(tensor, |lanes, _| {
        // SAFETY: the stream is CubeCL's, which lives as long as the device's thread.
        unsafe { sys::cuStreamSynchronize(lanes.stream()) }.result().map_err(text)
    });
}
