//! A run that cannot hang: it ends when a rank is lost or nothing moves any more.
//!
//! A dead process is seen by its connection at once; one that is stopped, or a link that swallows
//! everything, by a time without an event. The run itself may then be stuck in a device for ever,
//! so it has a thread of its own that is left behind.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use yuan_model::ranks::Communicator;

use crate::{Callback, Event, TrainError};

/// What a run is watched for.
#[derive(Debug, Clone)]
pub struct Watch {
    /// The ranks that train together with this one, if there are any.
    pub ranks: Option<Communicator>,
    /// Longest time without any event of the run; the first step compiles, and a validation is one
    /// event.
    pub patience: Duration,
}

/// Counts the events of a run, so that its watch sees it move.
#[derive(Debug, Clone, Default)]
pub struct Pulse(Arc<AtomicU64>);

impl<M> Callback<M> for Pulse {
    fn name(&self) -> &'static str {
        "pulse"
    }

    fn on_event(&mut self, _event: &Event) -> Result<(), TrainError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// How often the ranks are looked at.
const INTERVAL: Duration = Duration::from_millis(500);
/// What a run gets to end with an error of its own once a rank is gone.
const GRACE: Duration = Duration::from_secs(5);

impl Watch {
    /// Runs `run` and returns what it returns, or gives up on it; it adds the [`Pulse`] to its
    /// callbacks.
    ///
    /// # Errors
    ///
    /// Those of `run`; [`TrainError::Lost`] if a rank is gone, if there was no event for too
    /// long, or if the run panicked, which devices make it do when they fail in the middle of an
    /// operation.
    pub fn supervise<T, E>(
        &self,
        run: impl FnOnce(Pulse) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<TrainError> + Send + 'static,
    {
        let (pulse, (done, wait)) = (Pulse::default(), channel());
        let seen = pulse.clone();
        thread::spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| run(pulse)));
            // Nobody listens any more if the watch has given up.
            drop(done.send(
                result.unwrap_or_else(|panic| Err(TrainError::Lost(message(&*panic)).into())),
            ));
        });
        let (mut count, mut since) = (0, Instant::now());
        loop {
            match wait.recv_timeout(INTERVAL) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(TrainError::Lost("the run ended without a result".into()).into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let events = seen.0.load(Ordering::Relaxed);
            if events != count {
                (count, since) = (events, Instant::now());
            }
            if let Some(gone) = self.gone() {
                return match wait.recv_timeout(GRACE) {
                    Ok(result) => result,
                    _ => Err(TrainError::Lost(gone).into()),
                };
            }
            if since.elapsed() > self.patience {
                let seconds = self.patience.as_secs();
                let reason = format!("nothing happened for {seconds} s: a device hangs");
                return Err(TrainError::Lost(reason).into());
            }
        }
    }

    fn gone(&self) -> Option<String> {
        Some(self.ranks.as_ref().and_then(Communicator::lost)?.to_string())
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("the run panicked").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENT: Duration = Duration::from_secs(600);

    fn lost<T: std::fmt::Debug>(result: Result<T, TrainError>) -> String {
        match result.unwrap_err() {
            TrainError::Lost(reason) => reason,
            error => panic!("{error}"),
        }
    }

    #[test]
    fn what_a_run_returns_is_returned() {
        let watch = Watch { ranks: None, patience: PATIENT };
        assert_eq!(watch.supervise(|_| Ok::<_, TrainError>(7)).unwrap(), 7);
        let error = watch
            .supervise::<(), TrainError>(|_| Err(TrainError::Device("no".into())))
            .unwrap_err();
        assert_eq!(error.to_string(), "the device failed: no");
        assert_eq!(lost(watch.supervise::<(), TrainError>(|_| panic!("device 3"))), "device 3");
    }

    #[test]
    fn a_run_that_is_stuck_is_left_behind() {
        let watch = Watch { ranks: None, patience: Duration::from_millis(1) };
        let (_keep, forever) = channel::<()>();
        let reason = lost(
            watch.supervise::<(), TrainError>(move |_| forever.recv().map_err(|_| unreachable!())),
        );
        assert_eq!(reason, "nothing happened for 0 s: a device hangs");
    }
}
