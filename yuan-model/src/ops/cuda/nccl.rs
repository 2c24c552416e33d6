//! Collectives between ranks that each drive a GPU, by NCCL.
//!
//! NCCL's work goes to the first lane, or beside it where nobody waits for the result yet. All ranks
//! call their collectives in the same order, and NCCL gets them in that order.
//!
//! A communicator of NCCL is made when a group of ranks meets for the first time: the group's first
//! rank draws its identifier and hands it to the others. Where NCCL is missing, or two ranks share a
//! GPU, collectives go by way of the host. Communicators are known by the members of their group, so
//! one process can use them for one run at a time.

#![expect(unsafe_code, reason = "NCCL is C: pointers and handles have no safe form")]

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::DType;
use burn_cubecl::{CubeDevice, tensor::CubeTensor};
use cudarc::{driver::sys::CUstream, nccl::sys};

use super::{
    context::Lanes,
    queue::{binding, run, run_all, run_now, start},
    readback::MOST_SENT,
    tensors::{contiguous, dims, empty},
};
use crate::{ops::RowsToRanks, ranks::Communicator};

/// A communicator of NCCL, which lives as long as the process.
#[derive(Debug)]
pub(super) struct Nccl(sys::ncclComm_t);

// SAFETY: NCCL's calls on one communicator are made by one thread, CubeCL's for the device.
unsafe impl Send for Nccl {}
// SAFETY: as above; others only hold it.
unsafe impl Sync for Nccl {}

/// Which stream a communicator's work goes to: NCCL carries one communicator's work out one after the
/// other, whatever streams it is given to, so there is one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Way {
    /// In order with all that the device computes.
    Main,
    /// While it computes something else.
    Beside,
}

/// By device, members and stream; none where they have to go by way of the host.
type Known = HashMap<(CubeDevice, Vec<usize>, Way), Option<Arc<Nccl>>>;

static KNOWN: Mutex<Option<Known>> = Mutex::new(None);

/// NCCL's communicator of a group of ranks, of which this is one with the device of `tensor`; none
/// where NCCL cannot be used, which is the same on all ranks.
///
/// # Panics
///
/// If a rank is gone.
pub(super) fn of_group(group: &Communicator, tensor: &CubeTensor, way: Way) -> Option<Arc<Nccl>> {
    let key = (tensor.device.clone(), group.members().to_vec(), way);
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = known().get_or_insert_default().get(&key) {
        return found.clone();
    }
    let made = make(group, tensor);
    known().get_or_insert_default().insert(key, made.clone());
    made
}

fn make(group: &Communicator, tensor: &CubeTensor) -> Option<Arc<Nccl>> {
    // SAFETY: tries to load the library, as its first use would.
    let is_there = unsafe { sys::is_culib_present() };
    let all = |own: bool| {
        let counts = group.sum_counts(&[u64::from(own)]).unwrap_or_else(|error| panic!("{error}"));
        counts[0] == group.size() as u64
    };
    if !all(is_there) {
        return None;
    }
    if !all(owns(&tensor.device, group.members()[group.rank()])) {
        return None;
    }
    // NCCL refuses two ranks on one GPU.
    let gpu = run_now(tensor, |lanes, _| lanes.gpu());
    let mut gpus = group.gather(&gpu).unwrap_or_else(|error| panic!("{error}"));
    gpus.sort_unstable();
    if gpus.windows(2).any(|pair| pair[0] == pair[1]) {
        return None;
    }
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    if group.is_first() {
        // SAFETY: writes to a local that outlives the call.
        let drawn = unsafe { sys::ncclGetUniqueId(&raw mut id) };
        checked(drawn, "draw an identifier").unwrap_or_else(|error| panic!("{error}"));
    }
    let bytes: Vec<u8> = id.internal.iter().map(|&byte| byte as u8).collect();
    let bytes = group.broadcast(bytes).unwrap_or_else(|error| panic!("{error}"));
    for (to, from) in id.internal.iter_mut().zip(bytes) {
        *to = from as std::ffi::c_char;
    }
    let (ranks, rank) = (group.size() as i32, group.rank() as i32);
    let made = run_now(tensor, move |_, _| {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes to a local that outlives the call; the device's context is current.
        let made = unsafe { sys::ncclCommInitRank(&raw mut handle, ranks, id, rank) };
        Ok(checked(made, "connect the ranks").map(|()| Nccl(handle)))
    });
    if let Err(error) = &made {
        log_once(error);
    }
    match all(made.is_ok()) {
        true => made.ok().map(Arc::new),
        false => None,
    }
}

/// Whether a rank of this process is the first one to use NCCL on a device: the work of two threads on
/// one GPU has one order, in which what waits for another GPU may stand before what that one waits
/// for.
fn owns(device: &CubeDevice, rank: usize) -> bool {
    static OWNERS: Mutex<Option<HashMap<CubeDevice, usize>>> = Mutex::new(None);
    let mut owners = OWNERS.lock().unwrap_or_else(PoisonError::into_inner);
    *owners.get_or_insert_default().entry(device.clone()).or_insert(rank) == rank
}

/// Says on standard error why collectives will be slow.
fn log_once(error: &str) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| eprintln!("NCCL cannot be used, ranks exchange by way of the host: {error}"));
}

fn checked(result: sys::ncclResult_t, what: &str) -> Result<(), String> {
    match result {
        sys::ncclResult_t::ncclSuccess => Ok(()),
        other => Err(format!("NCCL cannot {what}: {other:?}")),
    }
}

/// NCCL's name of a type, which it can add up.
pub(super) fn kind(dtype: DType) -> Option<sys::ncclDataType_t> {
    match dtype {
        DType::F32 => Some(sys::ncclDataType_t::ncclFloat32),
        DType::BF16 => Some(sys::ncclDataType_t::ncclBfloat16),
        DType::F16 => Some(sys::ncclDataType_t::ncclFloat16),
        DType::F64 => Some(sys::ncclDataType_t::ncclFloat64),
        _ => None,
    }
}

/// Runs calls that NCCL is to carry out together.
fn together(calls: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    // SAFETY: no arguments.
    checked(unsafe { sys::ncclGroupStart() }, "start")?;
    let called = calls();
    // SAFETY: as above. It is called whatever happened in between.
    let ended = checked(unsafe { sys::ncclGroupEnd() }, "exchange");
    called.and(ended)
}

/// See [`ops::all_to_all`](crate::ops::all_to_all).
pub(super) fn all_to_all(nccl: Arc<Nccl>, rows: CubeTensor, to: &RowsToRanks) -> CubeTensor {
    let rows = contiguous(rows);
    let [_, width] = dims(&rows);
    let (row, count) = (width * rows.dtype.size(), to.receive.iter().sum::<usize>());
    let arrived = empty(&rows, [count.max(1), width], rows.dtype);
    let (send, receive, me) = (to.send.clone(), to.receive.clone(), to.group.rank());
    run([&rows, &arrived], move |lanes, [from, into]| {
        if count == 0 {
            lanes.zero(into, row)?;
        }
        let starts = |counts: &[usize]| -> Vec<u64> {
            let start = counts.iter().scan(0, |start, &count| {
                *start += count;
                Some(((*start - count) * row) as u64)
            });
            start.collect()
        };
        let (sources, places) = (starts(&send), starts(&receive));
        if send[me] > 0 {
            lanes.copy(from + sources[me], into + places[me], send[me] * row)?;
        }
        let stream = lanes.stream();
        together(|| {
            for peer in (0..send.len()).filter(|&peer| peer != me) {
                let (handle, byte) = (nccl.0, sys::ncclDataType_t::ncclInt8);
                let (peer_number, stream) = (peer as i32, stream.cast());
                if send[peer] > 0 {
                    let at = (from + sources[peer]) as *const c_void;
                    let bytes = send[peer] * row;
                    // SAFETY: the tensor has so many bytes, and is alive until the work is queued.
                    let sent =
                        unsafe { sys::ncclSend(at, bytes, byte, peer_number, handle, stream) };
                    checked(sent, "send rows")?;
                }
                if receive[peer] > 0 {
                    let at = (into + places[peer]) as *mut c_void;
                    let bytes = receive[peer] * row;
                    // SAFETY: as above.
                    let received =
                        unsafe { sys::ncclRecv(at, bytes, byte, peer_number, handle, stream) };
                    checked(received, "receive rows")?;
                }
            }
            Ok(())
        })
    });
    start(&arrived);
    arrived
}

/// See [`ops::all_reduce`](crate::ops::all_reduce); in whatever order NCCL adds.
pub(super) fn all_reduce(nccl: Arc<Nccl>, x: CubeTensor) -> CubeTensor {
    let x = contiguous(x);
    let sum = empty(&x, x.meta.shape().clone(), x.dtype);
    let (count, dtype) = (x.meta.shape().num_elements(), x.dtype);
    run([&x, &sum], move |lanes, [from, into]| {
        let kind = kind(dtype).ok_or("NCCL does not add this type")?;
        let (stream, add) = (lanes.stream().cast(), sys::ncclRedOp_t::ncclSum);
        let (from, into) = (from as *const c_void, into as *mut c_void);
        // SAFETY: both tensors have so many elements, and are alive until the work is queued.
        let summed = unsafe { sys::ncclAllReduce(from, into, count, kind, add, nccl.0, stream) };
        checked(summed, "add up")
    });
    start(&sum);
    sum
}

/// See [`ops::gather_counts`](crate::ops::gather_counts); they are sent to the host if they fit.
pub(super) fn gather_counts(nccl: Arc<Nccl>, counts: CubeTensor, ranks: usize) -> CubeTensor {
    let counts = contiguous(counts);
    let [count] = dims(&counts);
    let all = empty(&counts, [count * ranks], counts.dtype);
    run([&counts, &all], move |lanes, [from, into]| {
        let (kind, stream) = (sys::ncclDataType_t::ncclInt32, lanes.stream().cast());
        let (from, at) = (from as *const c_void, into as *mut c_void);
        // SAFETY: the tensors have so many elements, and are alive until the work is queued.
        let gathered = unsafe { sys::ncclAllGather(from, at, count, kind, nccl.0, stream) };
        checked(gathered, "gather counts")?;
        // Those of this rank alone are on their way too, and nobody asks for them.
        lanes.forget(from as u64);
        match count * ranks <= MOST_SENT {
            true => lanes.send(into, count * ranks),
            false => Ok(()),
        }
    });
    // The host is about to wait for them.
    start(&all);
    all
}

/// Which of the two halves of an all-reduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    ReduceScatter,
    AllGather,
}

/// See [`ops::reduce_scatter`](crate::ops::reduce_scatter) and
/// [`ops::all_gather`](crate::ops::all_gather), of all tensors together.
pub(super) fn half(
    nccl: Arc<Nccl>,
    tensors: Vec<CubeTensor>,
    ranks: usize,
    half: Half,
) -> Vec<CubeTensor> {
    let tensors: Vec<CubeTensor> = tensors.into_iter().map(contiguous).collect();
    let length = |x: &CubeTensor| x.meta.shape().num_elements();
    // What one rank has of each.
    let parts: Vec<(usize, DType)> = tensors
        .iter()
        .map(|x| match half {
            Half::ReduceScatter => (length(x) / ranks, x.dtype),
            Half::AllGather => (length(x), x.dtype),
        })
        .collect();
    let result = |(x, &(part, dtype)): (&CubeTensor, &(usize, DType))| match half {
        Half::ReduceScatter => empty(x, [part], dtype),
        Half::AllGather => empty(x, [part * ranks], dtype),
    };
    let results: Vec<CubeTensor> = tensors.iter().zip(&parts).map(result).collect();
    let all: Vec<&CubeTensor> = tensors.iter().chain(&results).collect();
    let held = all.iter().map(|tensor| binding(tensor)).collect();
    run_all(&all, move |lanes: &mut Lanes<'_>, pointers| {
        let (sources, targets) = pointers.split_at(parts.len());
        let call = |stream: CUstream| {
            together(|| {
                for ((&from, &into), &(count, dtype)) in sources.iter().zip(targets).zip(&parts) {
                    let kind = kind(dtype).ok_or("NCCL does not add this type")?;
                    let (from, into) = (from as *const c_void, into as *mut c_void);
                    let (handle, stream) = (nccl.0, stream.cast());
                    // SAFETY: the tensors are as long as is said, and alive until the work is queued.
                    let done = unsafe {
                        match half {
                            Half::ReduceScatter => {
                                let add = sys::ncclRedOp_t::ncclSum;
                                sys::ncclReduceScatter(from, into, count, kind, add, handle, stream)
                            }
                            Half::AllGather => {
                                sys::ncclAllGather(from, into, count, kind, handle, stream)
                            }
                        }
                    };
                    checked(done, "add up gradients or gather parameters")?;
                }
                Ok(())
            })
        };
        lanes.beside(targets[0], held, call)
    });
    start(&results[0]);
    results
}

/// Waits, on the device, for one of the [halves](half) with this first result.
pub(super) fn arrived(first: &CubeTensor) {
    run([first], |lanes, [pointer]| lanes.arrived(pointer));
}
