//! Copies between devices, all of an exchange beside each other.
//!
//! Memory that a copy writes may have been another tensor's, whose last reader has to be done; what a copy reads must not be
//! written before it is done. So every device that receives says when it is ready, every device that sends waits for those it
//! sends to and says when it has, and then the receivers wait: whatever a device computes next comes after all of its copies,
//! and no copy comes after another.
//!
//! The devices' threads wait for each other's marks, each for one that was queued before its own wait, and a queue that another
//! device waits for is started at once: no two can wait in a circle.

use std::{
    collections::BTreeMap,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use burn_cubecl::tensor::CubeTensor;

use super::{
    device::{LANES, Mark, run_all, start},
    tensors::{contiguous, dims, empty},
};
use crate::ops::Target;

/// See [`ops::exchange`](crate::ops::exchange); all sources are on CUDA.
pub(super) fn exchange(sources: Vec<CubeTensor>, targets: &[Target]) -> Vec<CubeTensor> {
    let sources: Vec<CubeTensor> = sources.into_iter().map(contiguous).collect();
    let result = |target: &Target| {
        let like = &sources[target.at];
        let [_, width] = dims(like);
        empty(like, [target.rows().max(1), width], like.dtype)
    };
    let results: Vec<CubeTensor> = targets.iter().map(result).collect();
    let mut copies = Vec::new();
    for (to, target) in targets.iter().enumerate() {
        let [_, width] = dims(&results[to]);
        let row = width * results[to].dtype.size();
        let mut start = 0;
        for (from, rows) in target.merged() {
            let bytes = rows.len() * row;
            copies.push(Copy { from, to, at: [rows.start * row, start], bytes });
            start += bytes;
        }
    }
    copy(&sources, &results, copies);
    results
}

/// A copy of a tensor on another CUDA device.
pub(super) fn transfer(x: CubeTensor, to: &CubeTensor) -> CubeTensor {
    let x = contiguous(x);
    let there = empty(to, x.meta.shape().clone(), x.dtype);
    let bytes = x.meta.shape().num_elements() * x.dtype.size();
    if bytes > 0 {
        copy(
            std::slice::from_ref(&x),
            std::slice::from_ref(&there),
            vec![Copy { from: 0, to: 0, at: [0; 2], bytes }],
        );
    }
    there
}

/// Bytes of a source, to bytes of a result.
#[derive(Debug, Clone, Copy)]
struct Copy {
    from: usize,
    to: usize,
    /// Where they start in either.
    at: [usize; 2],
    bytes: usize,
}

/// What a receiving device tells a sending one: its results' addresses, its context, and when it is ready.
type Ready = (Vec<u64>, usize, Mark);

/// What one device does for the others.
#[derive(Default)]
struct Part {
    sources: Vec<usize>,
    results: Vec<usize>,
    /// Devices that it receives from.
    say_ready: Vec<SyncSender<Ready>>,
    copied: Vec<Receiver<Mark>>,
    /// Devices that it sends to, and the copies.
    outgoing: Vec<Link>,
    /// Copies that stay.
    own: Vec<Copy>,
}

struct Link {
    ready: Receiver<Ready>,
    say_copied: SyncSender<Mark>,
    copies: Vec<Copy>,
}

fn copy(sources: &[CubeTensor], results: &[CubeTensor], copies: Vec<Copy>) {
    let mut devices = Vec::new();
    for tensor in sources.iter().chain(results) {
        if !devices.contains(&&tensor.device) {
            devices.push(&tensor.device);
        }
    }
    let device_of =
        |tensor: &CubeTensor| devices.iter().position(|device| **device == tensor.device).unwrap_or(0);
    let (homes, goals): (Vec<_>, Vec<_>) =
        (sources.iter().map(device_of).collect(), results.iter().map(device_of).collect());
    let mut parts: Vec<Part> = devices.iter().map(|_| Part::default()).collect();
    homes.iter().enumerate().for_each(|(index, &device)| parts[device].sources.push(index));
    goals.iter().enumerate().for_each(|(index, &device)| parts[device].results.push(index));
    // Indices within what the devices hold.
    let within = |of: &[usize], index: usize| (0..index).filter(|&before| of[before] == of[index]).count();
    // A device sends to the ones behind it first, so that not all send to the same one.
    let distance = |from: usize, to: usize| (to + devices.len() - from) % devices.len();
    let mut links: BTreeMap<(usize, usize), (usize, Vec<Copy>)> = BTreeMap::new();
    for copy in copies {
        let (from, to) = (homes[copy.from], goals[copy.to]);
        let copy = Copy { from: within(&homes, copy.from), to: within(&goals, copy.to), ..copy };
        links.entry((from, distance(from, to))).or_insert_with(|| (to, Vec::new())).1.push(copy);
    }
    for ((from, _), (to, copies)) in links {
        if from == to {
            parts[from].own = copies;
            continue;
        }
        let ((say_ready, ready), (say_copied, copied)) = (sync_channel(1), sync_channel(1));
        parts[to].say_ready.push(say_ready);
        parts[to].copied.push(copied);
        parts[from].outgoing.push(Link { ready, say_copied, copies });
    }

    let tensors = |part: &Part| -> (Vec<&CubeTensor>, Vec<&CubeTensor>) {
        let sources = part.sources.iter().map(|&index| &sources[index]).collect();
        (sources, part.results.iter().map(|&index| &results[index]).collect())
    };
    for part in &mut parts {
        let (_, results) = tensors(part);
        let receivers = std::mem::take(&mut part.say_ready);
        if receivers.is_empty() {
            continue;
        }
        run_all(&results, move |session, pointers| {
            for receiver in receivers {
                tell(receiver, (pointers.to_vec(), session.context(), session.mark()?));
            }
            Ok(())
        });
        start(results[0]);
    }
    for part in &mut parts {
        let (sources, results) = tensors(part);
        let (outgoing, own) = (std::mem::take(&mut part.outgoing), std::mem::take(&mut part.own));
        if outgoing.is_empty() && own.is_empty() {
            continue;
        }
        let num_sources = sources.len();
        run_all(&[sources, results].concat(), move |session, pointers| {
            let (sources, results) = pointers.split_at(num_sources);
            // Every link's copies, with the addresses and the context of where they go.
            let mut queues = vec![(own, results.to_vec(), session.context())];
            let mut senders = Vec::with_capacity(outgoing.len());
            for Link { ready, say_copied, copies } in outgoing {
                let (results, context, mark) = told(ready)?;
                session.wait(mark)?;
                queues.push((copies, results, context));
                senders.push(say_copied);
            }
            session.fork()?;
            // One of each link in turn, on one lane after the other.
            let longest = queues.iter().map(|(copies, ..)| copies.len()).max().unwrap_or(0);
            let in_turn = (0..longest).flat_map(|index| {
                queues.iter().filter_map(move |(copies, results, context)| {
                    copies.get(index).map(|copy| (*copy, results[copy.to], *context))
                })
            });
            for (lane, (copy, to, context)) in (0..LANES).cycle().zip(in_turn) {
                let [from, to] = [sources[copy.from] + copy.at[0] as u64, to + copy.at[1] as u64];
                session.copy(lane, from, to, context, copy.bytes)?;
            }
            session.join()?;
            for sender in senders {
                tell(sender, session.mark()?);
            }
            Ok(())
        });
        start(tensors(part).0[0]);
    }
    for part in &mut parts {
        let (_, results) = tensors(part);
        let copied = std::mem::take(&mut part.copied);
        if copied.is_empty() {
            continue;
        }
        run_all(&results, move |session, _| {
            copied.into_iter().try_for_each(|copied| session.wait(told(copied)?))
        });
        start(results[0]);
    }
}

/// To the one thread that asks; it may have failed and not ask.
fn tell<T>(sender: SyncSender<T>, value: T) {
    drop(sender.send(value));
}

fn told<T>(receiver: Receiver<T>) -> Result<T, String> {
    receiver.recv().map_err(|_| "the device at the other end of a copy failed".into())
}
