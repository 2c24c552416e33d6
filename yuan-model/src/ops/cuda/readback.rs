//! Numbers on their way from the device to the host: page-locked memory, and events that say when
//! it is filled.

#![expect(unsafe_code, reason = "CUDA's libraries are C: pointers and handles have no safe form")]

use std::{collections::HashMap, ffi::c_void};

use cudarc::driver::{result as driver, sys};

use super::failure::text;

/// Numbers on their way to the host, by the address that they come from.
#[derive(Default)]
pub(super) struct HostSlots {
    waiting: HashMap<u64, Slot>,
    free: Vec<Slot>,
}

/// Page-locked memory and the event after which it is filled.
#[derive(Clone, Copy)]
struct Slot {
    memory: *mut c_void,
    event: sys::CUevent,
    count: usize,
}

/// Bytes of a slot.
const SLOT: usize = 4096;

/// The most integers that are sent at once.
pub(super) const MOST_SENT: usize = SLOT / 4;

impl HostSlots {
    /// Sends `count` integers at `pointer` to the host on a stream.
    pub fn send(
        &mut self,
        stream: sys::CUstream,
        pointer: u64,
        count: usize,
    ) -> Result<(), String> {
        let slot = match self.waiting.remove(&pointer).or_else(|| self.free.pop()) {
            Some(slot) => slot,
            None => Slot {
                // SAFETY: the memory is never freed, only used again.
                memory: unsafe { driver::malloc_host(SLOT, 0) }.map_err(text)?,
                event: driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(text)?,
                count: 0,
            },
        };
        // SAFETY: the slot holds as many integers, and the caller's tensor too.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(slot.memory, pointer, 4 * count, stream)
                .result()
                .map_err(text)?;
            driver::event::record(slot.event, stream).map_err(text)?;
        }
        self.waiting.insert(pointer, Slot { count, ..slot });
        Ok(())
    }

    /// Forgets what was sent from `pointer`: nobody will ask for it, but for another tensor that gets
    /// its memory.
    pub fn forget(&mut self, pointer: u64) {
        // Copies to one slot are in the order of the stream.
        self.free.extend(self.waiting.remove(&pointer));
    }

    /// Waits for what was sent from `pointer`, if anything was.
    pub fn receive(&mut self, pointer: u64) -> Result<Option<Vec<i32>>, String> {
        let Some(slot) = self.waiting.remove(&pointer) else { return Ok(None) };
        // SAFETY: the event is alive; after it the copy is done, and nobody else uses the slot.
        let numbers = unsafe {
            driver::event::synchronize(slot.event).map_err(text)?;
            std::slice::from_raw_parts(slot.memory.cast::<i32>(), slot.count).to_vec()
        };
        self.free.push(slot);
        Ok(Some(numbers))
    }
}
