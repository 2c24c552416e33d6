//! Work of our own on a CUDA device, in order with CubeCL's.
//!
//! CubeCL owns the device's memory and a stream that it does not hand out. What we launch runs on a
//! stream of our own in the same context, between two events: it waits for everything that was
//! queued before, and everything queued later waits for it.
//!
//! All of it happens on CubeCL's own thread for the device, in the order of CubeCL's queue, and
//! nobody waits for that thread but who asks for a number: a program that drives several devices
//! fills the queue of one while the others empty theirs.

#![expect(unsafe_code, reason = "CUDA's libraries are C: pointers and handles have no safe form")]

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet, hash_map::Entry},
    ffi::{CString, c_void},
    ptr,
    sync::{Mutex, OnceLock, PoisonError},
};

use burn_cubecl::{CubeDevice, tensor::CubeTensor};
use cubecl_common::device_handle::DeviceHandle;
use cubecl_cuda::CudaRuntime;
use cubecl_runtime::{
    runtime::Runtime,
    server::{BufferBinding, ServerStorage},
};
use cudarc::{
    driver::{result as driver, sys},
    nvrtc::{CompileOptions, compile_ptx_with_opts},
};

use super::blas::{Batch, Blas, Matrix};

type CudaServer = <CudaRuntime as Runtime>::Server;

/// Streams that independent products may run on beside each other.
pub(super) const LANES: usize = 4;

/// CUDA 12.5: events of a whole context.
const CONTEXT_EVENTS: i32 = 12_050;

/// What a device needs for our work; it lives on CubeCL's thread for that device.
struct State {
    context: sys::CUcontext,
    /// Compute capability, as in `compute_90`.
    capability: i32,
    has_context_events: bool,
    lanes: Vec<Lane>,
    blas: Blas,
    host: HostSlots,
    functions: HashMap<Kernel, sys::CUfunction>,
    modules: HashMap<(Source, bool, usize), sys::CUmodule>,
    /// Contexts of other devices whose memory this one may write.
    peers: HashSet<usize>,
}

struct Lane {
    stream: sys::CUstream,
    event: sys::CUevent,
}

/// Numbers on their way to the host, by the address that they come from.
#[derive(Default)]
struct HostSlots {
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

thread_local! {
    static STATES: RefCell<HashMap<usize, State>> = RefCell::new(HashMap::new());
}

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Source {
    Dispatch,
    Elementwise,
    Flash,
    Optimizer,
    Rows,
    Softmax,
}

impl Source {
    fn text(self) -> &'static str {
        match self {
            Self::Dispatch => include_str!("kernels/dispatch.cu"),
            Self::Elementwise => include_str!("kernels/elementwise.cu"),
            Self::Flash => include_str!("kernels/flash.cu"),
            Self::Optimizer => include_str!("kernels/optimizer.cu"),
            Self::Rows => include_str!("kernels/rows.cu"),
            Self::Softmax => include_str!("kernels/softmax.cu"),
        }
    }
}

/// A kernel, compiled for f32 or for bf16 activations, and for one head dimension where it depends
/// on that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kernel {
    pub source: Source,
    pub name: &'static str,
    pub bf16: bool,
    pub head_dim: usize,
}

impl Kernel {
    pub fn new(source: Source, name: &'static str, bf16: bool) -> Self {
        Self { source, name, bf16, head_dim: 0 }
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    Pointer(u64),
    Int(usize),
    Long(usize),
    Float(f64),
}

/// Access to the device while it is ours.
pub(super) struct Session<'a> {
    state: &'a mut State,
}

/// Queues `work` with the addresses of the tensors' memory, after everything queued on their device
/// so far.
///
/// # Panics
///
/// If work queued before failed, or the device does: as Burn's own operations, what fails is known
/// later.
pub(super) fn run<const N: usize>(
    tensors: [&CubeTensor; N],
    work: impl FnOnce(&mut Session<'_>, [u64; N]) -> Result<(), String> + Send + 'static,
) {
    run_all(&tensors, |session, pointers| {
        work(session, pointers.try_into().expect("as many addresses as tensors"))
    });
}

/// [`run`] with any number of tensors but none.
pub(super) fn run_all(
    tensors: &[&CubeTensor],
    work: impl FnOnce(&mut Session<'_>, &[u64]) -> Result<(), String> + Send + 'static,
) {
    raise_failure();
    let bindings = tensors.iter().map(|tensor| binding(tensor)).collect();
    device(tensors[0]).submit(move |server| {
        if let Err(message) = on_device(server, bindings, work) {
            *FAILURE.lock().unwrap_or_else(PoisonError::into_inner) = Some(message.clone());
            // Caught by CubeCL's thread, after it was printed: nobody may come to read the failure.
            panic!("CUDA: {message}");
        }
    });
}

/// Lets the device start what is queued, which waits for more until somebody waits for it.
pub(super) fn start(tensor: &CubeTensor) {
    device(tensor).flush_queue();
}

/// Runs `work` after everything queued so far and waits for its result.
fn run_now<R: Send>(
    tensor: &CubeTensor,
    work: impl FnOnce(&mut Session<'_>, u64) -> Result<R, String> + Send,
) -> R {
    raise_failure();
    let bindings = vec![binding(tensor)];
    let result = device(tensor).submit_blocking(|server| {
        on_device(server, bindings, |session, pointers| work(session, pointers[0]))
    });
    raise_failure();
    match result {
        Ok(Ok(result)) => result,
        Ok(Err(message)) => panic!("CUDA: {message}"),
        Err(error) => panic!("CUDA: {error:?}"),
    }
}

/// What failed on a device's thread, until somebody is told.
static FAILURE: Mutex<Option<String>> = Mutex::new(None);

fn raise_failure() {
    let failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(message) = failure {
        panic!("CUDA: {message}");
    }
}

/// CubeCL's thread for a tensor's device.
fn device(tensor: &CubeTensor) -> DeviceHandle<CudaServer> {
    DeviceHandle::new(tensor.client.service_id().device)
}

fn binding(tensor: &CubeTensor) -> BufferBinding {
    tensor.handle.clone().binding()
}

/// What [`run`] does on the device's thread.
fn on_device<R>(
    server: &mut CudaServer,
    bindings: Vec<BufferBinding>,
    work: impl FnOnce(&mut Session<'_>, &[u64]) -> Result<R, String>,
) -> Result<R, String> {
    let resource = |binding: BufferBinding| {
        let stream = binding.stream;
        server.get_resource(binding, stream).map_err(text)
    };
    // Held until the work is queued.
    let resources = bindings.into_iter().map(resource).collect::<Result<Vec<_>, _>>()?;
    let pointers: Vec<u64> = resources.iter().map(|resource| resource.resource().ptr).collect();
    STATES.with_borrow_mut(|states| {
        let context = driver::ctx::get_current().map_err(text)?.ok_or("no CUDA context")?;
        let state = match states.entry(context as usize) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(State::new(context)?),
        };
        state.enter()?;
        let result = work(&mut Session { state }, &pointers);
        state.leave()?;
        result
    })
}

pub(super) fn text(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

impl State {
    fn new(context: sys::CUcontext) -> Result<Self, String> {
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
            capability,
            has_context_events: version >= CONTEXT_EVENTS,
            lanes,
            blas: Blas::new(LANES)?,
            host: HostSlots::default(),
            functions: HashMap::new(),
            modules: HashMap::new(),
            peers: HashSet::new(),
        })
    }

    /// Makes the first lane wait for all that the context was given.
    fn enter(&self) -> Result<(), String> {
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
    fn leave(&self) -> Result<(), String> {
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

    fn function(&mut self, kernel: Kernel) -> Result<sys::CUfunction, String> {
        if let Some(&function) = self.functions.get(&kernel) {
            return Ok(function);
        }
        let key = (kernel.source, kernel.bf16, kernel.head_dim);
        let module = match self.modules.get(&key) {
            Some(&module) => module,
            None => {
                let module = self.compile(kernel)?;
                self.modules.insert(key, module);
                module
            }
        };
        let name = CString::new(kernel.name).map_err(text)?;
        // SAFETY: the module was loaded and is never unloaded.
        let function = unsafe { driver::module::get_function(module, name) }
            .map_err(|error| format!("kernel {}: {error:?}", kernel.name))?;
        self.functions.insert(kernel, function);
        Ok(function)
    }

    fn compile(
        &self,
        Kernel { source, bf16, head_dim, .. }: Kernel,
    ) -> Result<sys::CUmodule, String> {
        let code = format!("{}\n{}", include_str!("kernels/common.cuh"), source.text());
        // Hopper's own instructions are in a variant of its architecture.
        let variant = if source == Source::Flash { "a" } else { "" };
        let mut options = vec![format!("--gpu-architecture=compute_{}{variant}", self.capability)];
        options.extend(bf16.then(|| "-DBF16".into()));
        options.extend((head_dim > 0).then(|| format!("-DHEAD_DIM={head_dim}")));
        let options = CompileOptions { options, ..CompileOptions::default() };
        let ptx = compile_ptx_with_opts(code, options)
            .map_err(|error| format!("{source:?}: {error:?}"))?;
        let image = CString::new(ptx.to_src()).map_err(text)?;
        // SAFETY: the image is PTX that ends with a zero.
        unsafe { driver::module::load_data(image.as_ptr().cast()) }.map_err(text)
    }
}

/// Whether this machine has NVRTC and cuBLASLt; without them every operation takes its portable
/// form.
pub(super) fn libraries_are_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    // SAFETY: the calls try to load libraries of NVIDIA's, as their first use would.
    *THERE.get_or_init(|| unsafe {
        cudarc::nvrtc::sys::is_culib_present() && cudarc::cublaslt::sys::is_culib_present()
    })
}

/// Compute capability of a tensor's device, `90` for Hopper.
pub(super) fn capability(tensor: &CubeTensor) -> i32 {
    static KNOWN: Mutex<Option<HashMap<CubeDevice, i32>>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let known = known.get_or_insert_default();
    if let Some(&capability) = known.get(&tensor.device) {
        return capability;
    }
    let capability = run_now(tensor, |session, _| Ok(session.state.capability));
    known.insert(tensor.device.clone(), capability);
    capability
}

impl Session<'_> {
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
        let function = self.state.function(kernel)?;
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
        batch: Option<Batch>,
    ) -> Result<(), String> {
        let stream = self.state.lanes[lane].stream;
        self.state.blas.product((lane, stream), parts, alpha, beta, batch)
    }

    /// Sends `count` integers at `pointer` to the host, where [`received`] waits for them.
    pub fn send(&mut self, pointer: u64, count: usize) -> Result<(), String> {
        let host = &mut self.state.host;
        let slot = match host.waiting.remove(&pointer).or_else(|| host.free.pop()) {
            Some(slot) => slot,
            None => Slot {
                // SAFETY: the memory is never freed, only used again.
                memory: unsafe { driver::malloc_host(SLOT, 0) }.map_err(text)?,
                event: driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(text)?,
                count: 0,
            },
        };
        let stream = self.state.lanes[0].stream;
        // SAFETY: the slot holds as many integers, and the caller's tensor too.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(slot.memory, pointer, 4 * count, stream)
                .result()
                .map_err(text)?;
            driver::event::record(slot.event, stream).map_err(text)?;
        }
        self.state.host.waiting.insert(pointer, Slot { count, ..slot });
        Ok(())
    }
}

/// An event of the first lane, which another device waits for once.
#[derive(Debug)]
pub(super) struct Mark(usize);

impl Session<'_> {
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

/// The most integers that [`Session::send`] takes.
pub(super) const MOST_SENT: usize = SLOT / 4;

/// What a tensor's numbers were when they were [sent](Session::send), if they were; they are to be
/// asked for once.
///
/// # Panics
///
/// If the device fails.
pub(super) fn received(tensor: &CubeTensor) -> Option<Vec<i32>> {
    run_now(tensor, |session, pointer| {
        let host = &mut session.state.host;
        let Some(slot) = host.waiting.remove(&pointer) else { return Ok(None) };
        // SAFETY: the event is alive; after it the copy is done, and nobody else uses the slot.
        let numbers = unsafe {
            driver::event::synchronize(slot.event).map_err(text)?;
            std::slice::from_raw_parts(slot.memory.cast::<i32>(), slot.count).to_vec()
        };
        host.free.push(slot);
        Ok(Some(numbers))
    })
}
