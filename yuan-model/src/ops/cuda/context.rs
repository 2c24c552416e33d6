//! Streams of a CUDA context, between two events: what is launched here waits for everything that
//! the context was given before, and everything that it is given later waits for it.

#![expect(unsafe_code, reason = "CUDA's libraries are C: pointers and handles have no safe form")]

use std::{collections::HashSet, ffi::c_void, ptr};

use cudarc::driver::{result as driver, sys};

use super::{
    blas::{Blas, Matrix, ProductBatch},
    failure::text,
    kernels::{Arg, Kernel, Kernels},
    readback::HostSlots,
};

/// Streams that independent products may run on beside each other.
pub(super) const LANES: usize = 4;

/// CUDA 12.5: events of a whole context.
const CONTEXT_EVENTS: i32 = 12_050;

/// What a device needs for the work of this module; it lives on CubeCL's thread for that device.
pub(super) struct State {
    context: sys::CUcontext,
    has_context_events: bool,
    lanes: Vec<Lane>,
    blas: Blas,
    host: HostSlots,
    kernels: Kernels,
    /// Contexts of other devices whose memory this one may write.
    peers: HashSet<usize>,
}

struct Lane {
    stream: sys::CUstream,
    event: sys::CUevent,
}

impl State {
    pub fn new(context: sys::CUcontext) -> Result<Self, String> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        let mut lanes = Vec::with_capacity(LANES);
        for _ in 0..LANES {
            let stream =
                driver::stream::create(driver::stream::StreamKind::NonBlocking).map_err(text)?;
            let event =
                driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(text)?;
            lanes.push(Lane { stream, event });
        }
        // SAFETY: both calls write to locals that outlive them; the context is current.
        let (capability, version) = unsafe {
            let (mut device, mut version) = (0, 0);
            sys::cuCtxGetDevice(&mut device).result().map_err(text)?;
            sys::cuDriverGetVersion(&mut version).result().map_err(text)?;
            let get = |attribute| driver::device::get_attribute(device, attribute).map_err(text);
            (10 * get(MAJOR)? + get(MINOR)?, version)
        };
        Ok(Self {
            context,
            has_context_events: version >= CONTEXT_EVENTS,
            lanes,
            blas: Blas::new(LANES)?,
            host: HostSlots::default(),
            kernels: Kernels::new(capability),
            peers: HashSet::new(),
        })
    }

    /// Makes the first lane wait for all that the context was given.
    pub fn enter(&self) -> Result<(), String> {
        if !self.has_context_events {
            return driver::ctx::synchronize().map_err(text);
        }
        let lane = &self.lanes[0];
        // SAFETY: context, event and stream are alive and belong together.
        unsafe {
            sys::cuCtxRecordEvent(self.context, lane.event).result().map_err(text)?;
            sys::cuStreamWaitEvent(lane.stream, lane.event, 0).result().map_err(text)
        }
    }

    /// Makes all that the context will be given wait for the first lane.
    pub fn leave(&self) -> Result<(), String> {
        if !self.has_context_events {
            return driver::ctx::synchronize().map_err(text);
        }
        let lane = &self.lanes[0];
        // SAFETY: as above.
        unsafe {
            sys::cuEventRecord(lane.event, lane.stream).result().map_err(text)?;
            sys::cuCtxWaitEvent(self.context, lane.event).result().map_err(text)
        }
    }
}

/// Access to the device while its thread works for this module.
pub(super) struct Lanes<'a> {
    state: &'a mut State,
}

impl<'a> Lanes<'a> {
    pub fn new(state: &'a mut State) -> Self {
        Self { state }
    }
}

impl Lanes<'_> {
    /// Launches a kernel on the first lane.
    pub fn launch(
        &mut self,
        kernel: Kernel,
        grid: [usize; 2],
        threads: usize,
        shared_bytes: usize,
        args: &[Arg],
    ) -> Result<(), String> {
        if grid[0] == 0 || grid[1] == 0 {
            return Ok(());
        }
        let function = self.state.kernels.function(kernel)?;
        // Little-endian: the first four bytes of a word are its low half.
        let mut words: Vec<u64> = args
            .iter()
            .map(|arg| match *arg {
                Arg::Pointer(pointer) => pointer,
                Arg::Int(value) | Arg::Long(value) => value as u64,
                Arg::Float(value) => u64::from((value as f32).to_bits()),
            })
            .collect();
        let mut params: Vec<*mut c_void> =
            words.iter_mut().map(|word| ptr::from_mut(word).cast()).collect();
        let size = |value: usize| u32::try_from(value).map_err(text);
        if shared_bytes > 48 * 1024 {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe { sys::cuFuncSetAttribute(function, attribute, shared_bytes as i32) }
                .result()
                .map_err(text)?;
        }
        // SAFETY: the arguments are those of the kernel of this name, kept beside it, and `words`
        // outlives the call.
        unsafe {
            driver::launch_kernel(
                function,
                (size(grid[0])?, size(grid[1])?, 1),
                (size(threads)?, 1, 1),
                size(shared_bytes)?,
                self.state.lanes[0].stream,
                &mut params,
            )
        }
        .map_err(|error| format!("kernel {}: {error:?}", kernel.name))
    }

    /// Zeroes memory on the first lane.
    pub fn zero(&mut self, pointer: u64, bytes: usize) -> Result<(), String> {
        // SAFETY: the caller's tensor is at least so large.
        unsafe { driver::memset_d8_async(pointer, 0, bytes, self.state.lanes[0].stream) }
            .map_err(text)
    }

    /// Lets the other lanes start where the first one is.
    pub fn fork(&mut self) -> Result<(), String> {
        let (first, others) = self.state.lanes.split_at(1);
        // SAFETY: events and streams are alive.
        unsafe {
            sys::cuEventRecord(first[0].event, first[0].stream).result().map_err(text)?;
            for lane in others {
                sys::cuStreamWaitEvent(lane.stream, first[0].event, 0).result().map_err(text)?;
            }
        }
        Ok(())
    }

    /// Lets the first lane go on where all others are done.
    pub fn join(&mut self) -> Result<(), String> {
        let (first, others) = self.state.lanes.split_at(1);
        // SAFETY: events and streams are alive.
        unsafe {
            for lane in others {
                sys::cuEventRecord(lane.event, lane.stream).result().map_err(text)?;
                sys::cuStreamWaitEvent(first[0].stream, lane.event, 0).result().map_err(text)?;
            }
        }
        Ok(())
    }

    /// `c = alpha · a · b + beta · c` on a lane, in f32 arithmetic; `c` is not transposed.
    pub fn product(
        &mut self,
        lane: usize,
        parts: [Matrix; 3],
        alpha: f32,
        beta: f32,
        batch: Option<ProductBatch>,
    ) -> Result<(), String> {
        let stream = self.state.lanes[lane].stream;
        self.state.blas.product((lane, stream), parts, alpha, beta, batch)
    }

    /// Sends `count` integers at `pointer` to the host, where [`receive`](Self::receive) waits for
    /// them.
    pub fn send(&mut self, pointer: u64, count: usize) -> Result<(), String> {
        self.state.host.send(self.state.lanes[0].stream, pointer, count)
    }

    /// Waits for what was sent from `pointer`, if anything was; it is to be asked for once.
    pub fn receive(&mut self, pointer: u64) -> Result<Option<Vec<i32>>, String> {
        self.state.host.receive(pointer)
    }

    /// What tells the GPU from all others, on any machine.
    pub fn gpu(&self) -> Result<[u8; 16], String> {
        let mut device = 0;
        // SAFETY: the call writes to a local that outlives it; the context is current.
        unsafe { sys::cuCtxGetDevice(&raw mut device) }.result().map_err(text)?;
        let uuid = driver::device::get_uuid(device).map_err(text)?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// The stream of the first lane, for libraries that launch on one.
    pub fn stream(&self) -> sys::CUstream {
        self.state.lanes[0].stream
    }

    /// Compute capability, `90` for Hopper.
    pub fn capability(&self) -> i32 {
        self.state.kernels.capability()
    }
}

/// An event of the first lane, which another device waits for once.
#[derive(Debug)]
pub(super) struct Mark(usize);

impl Lanes<'_> {
    /// Where the first lane is.
    pub fn mark(&self) -> Result<Mark, String> {
        let event =
            driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(text)?;
        // SAFETY: event and stream are of this context.
        unsafe { driver::event::record(event, self.state.lanes[0].stream) }.map_err(text)?;
        Ok(Mark(event as usize))
    }

    /// Makes the first lane wait for another device's mark, which is then used up.
    pub fn wait(&self, mark: Mark) -> Result<(), String> {
        let event = mark.0 as sys::CUevent;
        // SAFETY: the event is alive until here; CUDA keeps what waits for it.
        unsafe {
            sys::cuStreamWaitEvent(self.state.lanes[0].stream, event, 0).result().map_err(text)?;
            driver::event::destroy(event).map_err(text)
        }
    }

    /// The device's context, as the others name it.
    pub fn context(&self) -> usize {
        self.state.context as usize
    }

    /// Copies on a lane, to memory of this context or of another one, over the link between the
    /// devices where there is one.
    pub fn copy(
        &mut self,
        lane: usize,
        from: u64,
        to: u64,
        context: usize,
        bytes: usize,
    ) -> Result<(), String> {
        let state = &mut *self.state;
        let (stream, peer) = (state.lanes[lane].stream, context as sys::CUcontext);
        // SAFETY: both contexts live as long as CubeCL's devices; the callers' tensors have so many
        // bytes.
        unsafe {
            if peer == state.context {
                return driver::memcpy_dtod_async(to, from, bytes, stream).map_err(text);
            }
            if state.peers.insert(context) {
                // Without it, copies take a detour through the host; not every pair of devices can.
                sys::cuCtxEnablePeerAccess(peer, 0).result().ok();
            }
            sys::cuMemcpyPeerAsync(to, peer, from, state.context, bytes, stream)
                .result()
                .map_err(text)
        }
    }
}
