//! Work on a CUDA device, in order with CubeCL's.
//!
//! What is launched here runs on CubeCL's own stream for the thread that asks, so that it comes after
//! all that CubeCL was given before and before all that follows (`context.rs`).
//!
//! All of it happens on CubeCL's own thread for the device, in the order of CubeCL's queue, and
//! nobody waits for that thread but who asks for a number.

#![expect(unsafe_code, reason = "CUDA's libraries are C: pointers and handles have no safe form")]

use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    sync::{Mutex, OnceLock, PoisonError},
};

use burn_cubecl::{CubeDevice, tensor::CubeTensor};
use cubecl_common::device_handle::DeviceHandle;
use cubecl_cuda::CudaRuntime;
use cubecl_environment::stream::StreamId;
use cubecl_runtime::{
    runtime::Runtime,
    server::{BufferBinding, ServerStorage},
};
use cubecl_server::stream::WriteScoped;
use cudarc::driver::result as driver;

use super::{
    context::{Lanes, State},
    failure::{raise, remember, text},
};

type CudaServer = <CudaRuntime as Runtime>::Server;

thread_local! {
    static STATES: RefCell<HashMap<usize, State>> = RefCell::new(HashMap::new());
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
    work: impl FnOnce(&mut Lanes<'_>, [u64; N]) -> Result<(), String> + Send + 'static,
) {
    run_all(&tensors, |lanes, pointers| {
        work(lanes, pointers.try_into().expect("as many addresses as tensors"))
    });
}

/// [`run`] with any number of tensors but none.
pub(super) fn run_all(
    tensors: &[&CubeTensor],
    work: impl FnOnce(&mut Lanes<'_>, &[u64]) -> Result<(), String> + Send + 'static,
) {
    raise();
    let (stream, bindings) =
        (StreamId::current(), tensors.iter().map(|tensor| binding(tensor)).collect());
    device(tensors[0]).submit(move |server| {
        if let Err(message) = on_device(server, stream, bindings, work) {
            remember(&message);
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
pub(super) fn run_now<R: Send>(
    tensor: &CubeTensor,
    work: impl FnOnce(&mut Lanes<'_>, u64) -> Result<R, String> + Send,
) -> R {
    raise();
    let (stream, bindings) = (StreamId::current(), vec![binding(tensor)]);
    let result = device(tensor).submit_blocking(|server| {
        on_device(server, stream, bindings, |lanes, pointers| work(lanes, pointers[0]))
    });
    raise();
    match result {
        Ok(Ok(result)) => result,
        Ok(Err(message)) => panic!("CUDA: {message}"),
        Err(error) => panic!("CUDA: {error:?}"),
    }
}

/// CubeCL's thread for a tensor's device.
fn device(tensor: &CubeTensor) -> DeviceHandle<CudaServer> {
    DeviceHandle::new(tensor.client.service_id().device)
}

/// What keeps a tensor's memory while it exists.
pub(super) fn binding(tensor: &CubeTensor) -> BufferBinding {
    tensor.handle.clone().binding()
}

/// What [`run`] does on the device's thread.
fn on_device<R>(
    server: &mut CudaServer,
    stream: StreamId,
    bindings: Vec<BufferBinding>,
    work: impl FnOnce(&mut Lanes<'_>, &[u64]) -> Result<R, String>,
) -> Result<R, String> {
    // What CubeCL made on another stream, for another thread, is there before this stream goes on;
    // asked for once more after the work, it is not used again before the work is done.
    let foreign: Vec<BufferBinding> =
        bindings.iter().filter(|binding| binding.stream != stream).cloned().collect();
    let mut resource = |binding: BufferBinding| server.get_resource(binding, stream).map_err(text);
    // Held until the work is queued.
    let resources = bindings.into_iter().map(&mut resource).collect::<Result<Vec<_>, _>>()?;
    let pointers: Vec<u64> = resources.iter().map(|resource| resource.resource().ptr).collect();
    let cube = server.write_streams().try_stream_mut(&stream).map(|stream| stream.sys);
    let cube = cube.ok_or("CubeCL has no stream for this thread")?;
    let result = STATES.with_borrow_mut(|states| {
        let context = driver::ctx::get_current().map_err(text)?.ok_or("no CUDA context")?;
        let state = match states.entry(context as usize) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(State::new()?),
        };
        state.enter(cube)?;
        work(&mut Lanes::new(state), &pointers)
    });
    for binding in foreign {
        server.get_resource(binding, stream).map_err(text)?;
    }
    result
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
    let capability = run_now(tensor, |lanes, _| Ok(lanes.capability()));
    known.insert(tensor.device.clone(), capability);
    capability
}

/// What a tensor's numbers were when they were [sent](Lanes::send), if they were; they are to be
/// asked for once.
///
/// # Panics
///
/// If the device fails.
pub(super) fn received(tensor: &CubeTensor) -> Option<Vec<i32>> {
    #[expect(
        clippy::redundant_closure_for_method_calls,
        reason = "the method is not general enough"
    )]
    run_now(tensor, |lanes, pointer| lanes.receive(pointer))
}
