//! Ctrl-C, the warning of a cluster's scheduler, a terminal that is closed: the run ends after its
//! step, and can be resumed.

use std::sync::{
    Arc,
    atomic::{AtomicI32, Ordering},
};

use yuan::prelude::*;

/// The first signal that came, once [`listen`](Self::listen) was called.
#[derive(Clone)]
pub struct Signals(Arc<AtomicI32>);

impl Signals {
    /// From here on the first signal is noted, and the next one ends the process as it would have
    /// without this.
    pub fn listen() -> std::io::Result<Self> {
        Self::listen_to(
            "the run ends after this step, or in reinforcement learning after this round of answers",
        )
    }

    /// The same, and the first signal is answered with what happens now.
    pub fn listen_to(answer: &'static str) -> std::io::Result<Self> {
        Self::listen_and_say(Some(answer))
    }

    /// The same without an answer, for one of several processes that get a signal together. They end
    /// after the same step.
    pub fn listen_quietly() -> std::io::Result<Self> {
        Self::listen_and_say(None)
    }

    #[cfg(unix)]
    fn listen_and_say(answer: Option<&'static str>) -> std::io::Result<Self> {
        use std::io::Write as _;

        use signal_hook::{
            consts::{SIGHUP, SIGINT, SIGTERM},
            iterator,
            low_level::{emulate_default_handler, signal_name},
        };

        let received = Arc::new(AtomicI32::new(0));
        // What is ignored stays so: `nohup` is meant to survive the terminal.
        let heard = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&signal| !is_ignored(signal));
        let mut signals = iterator::Signals::new(heard)?;
        let first = received.clone();
        std::thread::spawn(move || {
            for signal in &mut signals {
                if first.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                    drop(emulate_default_handler(signal));
                }
                let Some(answer) = answer else { continue };
                let name = signal_name(signal).unwrap_or("a signal");
                // Nobody may be there to read it.
                drop(writeln!(
                    std::io::stderr(),
                    "{name}: {answer}; a second signal ends it at once"
                ));
            }
        });
        Ok(Self(received))
    }

    /// Elsewhere the system ends the process.
    #[cfg(not(unix))]
    fn listen_and_say(_: Option<&'static str>) -> std::io::Result<Self> {
        Ok(Self(Arc::new(AtomicI32::new(0))))
    }

    /// The number of the signal.
    pub fn received(&self) -> Option<i32> {
        Some(self.0.load(Ordering::SeqCst)).filter(|&signal| signal != 0)
    }
}

/// Whether whoever started the process wanted it to ignore a signal, where the system tells.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

impl<M> Callback<M> for Signals {
    fn name(&self) -> &'static str {
        "signals"
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        _metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        if self.received().is_some() {
            context.request_pause();
        }
        Ok(())
    }
}
