//! Streams of a device: the one that CubeCL works on, and more for work that may run beside it.

#![expect(unsafe_code, reason = "CUDA's libraries are C: pointers and handles have no safe form")]

use std::{collections::HashMap, ffi::c_void, ptr};

use cubecl_runtime::server::BufferBinding;
use cudarc::driver::{result as driver, sys};

use super::{
    blas::{Blas, Matrix, ProductBatch},
    failure::text,
    kernels::{Arg, Kernel, Kernels},
    readback::HostSlots,
};

/// Streams that independent products may run on beside each other.
pub(super) const LANES: usize = 4;

/// What a device needs for the work of this module; it lives on CubeCL's thread for that device.
pub(super) struct State {
    /// The first one is CubeCL's.
    lanes: Vec<Lane>,
    /// What ranks exchange while the first lane computes.
    beside: Lane,
    /// What is exchanged beside, by the address of the first result.
    arriving: HashMap<u64, Exchanged>,
    blas: Blas,
    host: HostSlots,
    kernels: Kernels,
}

/// Work beside the first lane.
struct Exchanged {
    /// After it the results are there.
    done: sys::CUevent,
    /// Keeps CubeCL from using the memory again, or moving it, before the first lane waits for the
    /// work: it would do so as soon as nobody holds a tensor, whatever is queued.
    _held: Vec<BufferBinding>,
}

struct Lane {
    stream: sys::CUstream,
    event: sys::CUevent,
}

impl Lane {
    fn new() -> Result<Self, String> {
        let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking);
        Ok(Self { stream: stream.map_err(text)?, event: event()? })
    }
}

fn event() -> Result<sys::CUevent, String> {
    driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(text)
}

impl State {
    pub fn new() -> Result<Self, String> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        let mut lanes = vec![Lane { stream: ptr::null_mut(), event: event()? }];
        for _ in 1..LANES {
            lanes.push(Lane::new()?);
        }
        // SAFETY: the calls write to a local that outlives them; the context is current.
        let capability = unsafe {
            let mut device = 0;
            sys::cuCtxGetDevice(&mut device).result().map_err(text)?;
            let get = |attribute| driver::device::get_attribute(device, attribute).map_err(text);
            10 * get(MAJOR)? + get(MINOR)?
        };
        Ok(Self {
            lanes,
            beside: Lane::new()?,
            arriving: HashMap::new(),
            blas: Blas::new(LANES)?,
            host: HostSlots::default(),
            kernels: Kernels::new(capability),
        })
    }

    /// Makes `stream`, which CubeCL works on, the first lane. Of several streams that CubeCL has, for
    /// several threads, each goes on where the one before it is.
    pub fn enter(&mut self, stream: sys::CUstream) -> Result<(), String> {
        let lane = &mut self.lanes[0];
        let before = std::mem::replace(&mut lane.stream, stream);
        if before == stream || before.is_null() {
            return Ok(());
        }
        // SAFETY: CubeCL keeps its streams as long as the process lives; the event is alive.
        unsafe {
            sys::cuEventRecord(lane.event, before).result().map_err(text)?;
            sys::cuStreamWaitEvent(stream, lane.event, 0).result().map_err(text)
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

    /// Forgets what was sent from `pointer`.
    pub fn forget(&mut self, pointer: u64) {
        self.state.host.forget(pointer);
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

    /// Starts work on a stream beside the first lane, after all that the first lane was given, and
    /// remembers when it is done under the address of its first result. The memory that it reads and
    /// writes is `held` until the first lane waits for it.
    pub fn beside(
        &mut self,
        result: u64,
        held: Vec<BufferBinding>,
        work: impl FnOnce(sys::CUstream) -> Result<(), String>,
    ) -> Result<(), String> {
        let (first, beside) = (&self.state.lanes[0], &self.state.beside);
        // SAFETY: events and streams are alive.
        unsafe {
            sys::cuEventRecord(beside.event, first.stream).result().map_err(text)?;
            sys::cuStreamWaitEvent(beside.stream, beside.event, 0).result().map_err(text)?;
        }
        work(beside.stream)?;
        let done = event()?;
        // SAFETY: as above.
        unsafe { sys::cuEventRecord(done, beside.stream) }.result().map_err(text)?;
        self.state.arriving.insert(result, Exchanged { done, _held: held });
        Ok(())
    }

    /// Makes the first lane wait for what was started [beside](Self::beside) it with this result.
    pub fn arrived(&mut self, result: u64) -> Result<(), String> {
        let Some(Exchanged { done, _held }) = self.state.arriving.remove(&result) else {
            return Ok(());
        };
        // SAFETY: the event is alive until here; CUDA keeps what waits for it.
        unsafe {
            sys::cuStreamWaitEvent(self.state.lanes[0].stream, done, 0).result().map_err(text)?;
            driver::event::destroy(done).map_err(text)
        }
    }

    /// Copies on the first lane.
    pub fn copy(&mut self, from: u64, to: u64, bytes: usize) -> Result<(), String> {
        // SAFETY: the callers' tensors have so many bytes.
        unsafe { driver::memcpy_dtod_async(to, from, bytes, self.state.lanes[0].stream) }
            .map_err(text)
    }

    /// Compute capability, `90` for Hopper.
    pub fn capability(&self) -> i32 {
        self.state.kernels.capability()
    }
}
