//! Copies between devices, all of an exchange beside each other.
//!
//! Memory that a copy writes may have been another tensor's, whose last reader has to be done; what
//! a copy reads must not be written before it is done. So every device that receives says when it
//! is ready, every device that sends waits for those it sends to and says when it has, and then the
//! receivers wait: whatever a device computes next comes after all of its copies, and no copy comes
//! after another.
//!
//! The devices' threads wait for each other's marks, each for one that was queued before its own
//! wait, and a queue that another device waits for is started at once: no two can wait in a circle.

use std::{
    collections::BTreeMap,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use burn_cubecl::{CubeDevice, tensor::CubeTensor};

use super::{
    context::{LANES, Mark},
    queue::{run_all, start},
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

/// What a receiving device tells a sending one: its results' addresses, its context, and when it is
/// ready.
type Ready = (Vec<u64>, usize, Mark);

/// What one device does for the others.
#[derive(Default)]
struct CopyPart<'a> {
    sources: Vec<&'a CubeTensor>,
    results: Vec<&'a CubeTensor>,
    /// Devices that it receives from.
    say_ready: Vec<SyncSender<Ready>>,
    copied: Vec<Receiver<Mark>>,
    /// Devices that it sends to.
    outgoing: Vec<Link>,
    /// Copies that stay.
    own: Vec<Copy>,
}

/// Copies from one device to another; indices are within what the devices hold.
struct Link {
    ready: Receiver<Ready>,
    say_copied: SyncSender<Mark>,
    copies: Vec<Copy>,
}

fn copy(sources: &[CubeTensor], results: &[CubeTensor], copies: Vec<Copy>) {
    let mut parts = shared_out(sources, results, copies);
    parts.iter_mut().for_each(CopyPart::say_ready);
    parts.iter_mut().for_each(CopyPart::send);
    parts.iter_mut().for_each(CopyPart::wait);
}

/// What there is to do, device by device.
fn shared_out<'a>(
    sources: &'a [CubeTensor],
    results: &'a [CubeTensor],
    copies: Vec<Copy>,
) -> Vec<CopyPart<'a>> {
    let mut devices: Vec<&CubeDevice> = Vec::new();
    let mut parts: Vec<CopyPart<'a>> = Vec::new();
    let mut place =
        |tensor: &'a CubeTensor,
         list: for<'b> fn(&'b mut CopyPart<'a>) -> &'b mut Vec<&'a CubeTensor>| {
            let device =
                devices.iter().position(|device| **device == tensor.device).unwrap_or_else(|| {
                    devices.push(&tensor.device);
                    parts.push(CopyPart::default());
                    devices.len() - 1
                });
            let held = list(&mut parts[device]);
            held.push(tensor);
            (device, held.len() - 1)
        };
    let homes: Vec<_> =
        sources.iter().map(|tensor| place(tensor, |part| &mut part.sources)).collect();
    let goals: Vec<_> =
        results.iter().map(|tensor| place(tensor, |part| &mut part.results)).collect();
    // A device sends to the ones behind it first, so that not all send to the same one.
    let distance = |from: usize, to: usize| (to + parts.len() - from) % parts.len();
    let mut links: BTreeMap<(usize, usize), (usize, Vec<Copy>)> = BTreeMap::new();
    for copy in copies {
        let ((home, from), (goal, to)) = (homes[copy.from], goals[copy.to]);
        let (_, link) =
            links.entry((home, distance(home, goal))).or_insert_with(|| (goal, Vec::new()));
        link.push(Copy { from, to, ..copy });
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
    parts
}

impl CopyPart<'_> {
    fn say_ready(&mut self) {
        let receivers = std::mem::take(&mut self.say_ready);
        if receivers.is_empty() {
            return;
        }
        run_all(&self.results, move |lanes, pointers| {
            for receiver in receivers {
                tell(receiver, (pointers.to_vec(), lanes.context(), lanes.mark()?));
            }
            Ok(())
        });
        start(self.results[0]);
    }

    fn send(&mut self) {
        let (outgoing, own) = (std::mem::take(&mut self.outgoing), std::mem::take(&mut self.own));
        if outgoing.is_empty() && own.is_empty() {
            return;
        }
        let num_sources = self.sources.len();
        let tensors = [&self.sources[..], &self.results[..]].concat();
        run_all(&tensors, move |lanes, pointers| {
            let (sources, results) = pointers.split_at(num_sources);
            // Every link's copies, with the addresses and the context of where they go.
            let mut queues = vec![(own, results.to_vec(), lanes.context())];
            let mut senders = Vec::with_capacity(outgoing.len());
            for Link { ready, say_copied, copies } in outgoing {
                let (results, context, mark) = told(ready)?;
                lanes.wait(mark)?;
                queues.push((copies, results, context));
                senders.push(say_copied);
            }
            lanes.fork()?;
            // One of each link in turn, on one lane after the other.
            let longest = queues.iter().map(|(copies, ..)| copies.len()).max().unwrap_or(0);
            let in_turn = (0..longest).flat_map(|index| {
                queues.iter().filter_map(move |(copies, results, context)| {
                    copies.get(index).map(|copy| (*copy, results[copy.to], *context))
                })
            });
            for (lane, (copy, to, context)) in (0..LANES).cycle().zip(in_turn) {
                let [from, to] = [sources[copy.from] + copy.at[0] as u64, to + copy.at[1] as u64];
                lanes.copy(lane, from, to, context, copy.bytes)?;
            }
            lanes.join()?;
            for sender in senders {
                tell(sender, lanes.mark()?);
            }
            Ok(())
        });
        start(self.sources[0]);
    }

    fn wait(&mut self) {
        let copied = std::mem::take(&mut self.copied);
        if copied.is_empty() {
            return;
        }
        run_all(&self.results, move |lanes, _| {
            copied.into_iter().try_for_each(|copied| lanes.wait(told(copied)?))
        });
        start(self.results[0]);
    }
}

/// Looks at a channel before a thread sleeps, some 0.1 ms.
const SPINS: usize = 1 << 12;

/// To the one thread that asks; it may have failed and not ask.
fn tell<T>(sender: SyncSender<T>, value: T) {
    drop(sender.send(value));
}

fn told<T>(receiver: Receiver<T>) -> Result<T, String> {
    // The other thread is a moment behind as a rule, and being woken takes longer.
    for _ in 0..SPINS {
        if let Ok(value) = receiver.try_recv() {
            return Ok(value);
        }
        std::hint::spin_loop();
    }
    receiver.recv().map_err(|_| "the device at the other end of a copy failed".into())
}
