//! Ranks as threads of one process: for a CPU, and for tests.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::Duration,
};

use super::{Communicator, Engine, RankError};

/// What a rank that others wait for may take; a thread that panics is noticed at once.
const PATIENCE: Duration = Duration::from_secs(600);

/// The channels of one rank.
struct Threads {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {} threads", self.rank, self.to.len())
    }
}

impl Engine for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn exchange(&self, members: &[usize], parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, RankError> {
        for (&rank, part) in members.iter().zip(parts) {
            self.to[rank].send(part).map_err(|_| RankError::Gone { rank })?;
        }
        let receive = |&rank: &usize| {
            let from = self.from[rank].lock().unwrap_or_else(PoisonError::into_inner);
            from.recv_timeout(PATIENCE).map_err(|error| match error {
                RecvTimeoutError::Disconnected => RankError::Gone { rank },
                RecvTimeoutError::Timeout => {
                    RankError::Silent { rank, seconds: PATIENCE.as_secs() }
                }
            })
        };
        members.iter().map(receive).collect()
    }
}

/// Runs `run` on so many threads, each of which is a rank of one group, and returns what they
/// return, in the order of the ranks.
///
/// # Panics
///
/// If one of them does. The others then find that it is gone.
pub fn on_threads<T: Send>(ranks: usize, run: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..ranks {
        let (to, from): (Vec<_>, Vec<_>) = (0..ranks).map(|_| channel()).unzip();
        senders.push(to);
        receivers.push(from.into_iter().map(|from| Some(Mutex::new(from))).collect::<Vec<_>>());
    }
    let engines: Vec<Arc<Threads>> = senders
        .into_iter()
        .enumerate()
        .map(|(rank, to)| {
            let from = receivers.iter_mut().filter_map(|receivers| receivers[rank].take());
            Arc::new(Threads { rank, to, from: from.collect() })
        })
        .collect();
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = engines
            .into_iter()
            .map(|engine| scope.spawn(move || run(Communicator::new(engine))))
            .collect();
        let ended: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        // The first panic is the cause: others only found that a rank was gone.
        let is_cause = |panic: &Box<dyn std::any::Any + Send>| {
            !panic.downcast_ref::<String>().is_some_and(|text| text.contains("is gone"))
        };
        let panics = ended.iter().filter_map(|ended| ended.as_ref().err());
        let cause = panics.clone().position(is_cause).unwrap_or(0);
        let (mut values, mut seen) = (Vec::with_capacity(ended.len()), 0);
        for ended in ended {
            match ended {
                Ok(value) => values.push(value),
                Err(panic) if seen == cause => std::panic::resume_unwind(panic),
                Err(_) => seen += 1,
            }
        }
        values
    })
}
