//! Small files of a run, written by a thread.

use std::{
    fmt,
    sync::mpsc::{SyncSender, sync_channel},
    thread::{self, JoinHandle},
};

use crate::{TrainError, checkpoint::join};

/// Runs jobs in order on a thread while training goes on. While gigabytes of a checkpoint are written
/// to a disk, every other write or sync on that disk waits, and the step must not.
///
/// The first error ends it; the next call returns it.
#[derive(Default)]
pub(super) struct Background {
    running: Option<(SyncSender<Job>, JoinHandle<Result<(), TrainError>>)>,
}

type Job = Box<dyn FnOnce() -> Result<(), TrainError> + Send>;

/// Jobs that may wait; whoever brings more waits too, so that memory is bounded.
const MOST: usize = 256;

impl Background {
    /// Adds a job.
    ///
    /// # Errors
    ///
    /// That of an earlier job.
    pub fn start(
        &mut self,
        job: impl FnOnce() -> Result<(), TrainError> + Send + 'static,
    ) -> Result<(), TrainError> {
        let (jobs, _) = self.running.get_or_insert_with(|| {
            let (sender, jobs) = sync_channel::<Job>(MOST);
            (sender, thread::spawn(move || jobs.into_iter().try_for_each(|job| job())))
        });
        match jobs.send(Box::new(job)) {
            Ok(()) => Ok(()),
            Err(_) => self.finish(),
        }
    }

    /// Waits until what was added is done, or an earlier job has failed, of which the next call tells.
    pub fn wait(&self) {
        let Some((jobs, _)) = &self.running else { return };
        let (done, wait) = sync_channel(0);
        let told = move || {
            // Who waits is there until this is said.
            done.send(()).ok();
            Ok(())
        };
        if jobs.send(Box::new(told)).is_ok() {
            wait.recv().ok();
        }
    }

    /// Waits until all is done.
    ///
    /// # Errors
    ///
    /// The first of the jobs.
    pub fn finish(&mut self) -> Result<(), TrainError> {
        let Some((jobs, thread)) = self.running.take() else { return Ok(()) };
        drop(jobs);
        join(thread)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some((jobs, thread)) = self.running.take() {
            drop(jobs);
            drop(thread.join());
        }
    }
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn jobs_are_done_in_order_and_the_first_error_is_told() {
        let (done, mut background) = (Arc::new(Mutex::new(Vec::new())), Background::default());
        for number in 0..3 * MOST {
            let done = done.clone();
            let job = move || {
                done.lock().unwrap().push(number);
                Ok(())
            };
            background.start(job).unwrap();
        }
        background.wait();
        assert!(done.lock().unwrap().iter().copied().eq(0..3 * MOST));
        background.start(|| Err(TrainError::Device("the disk is full".into()))).unwrap();
        background.wait();
        let error = background.start(|| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "the device failed: the disk is full");
        // Told once, it goes on.
        background.start(|| Ok(())).unwrap();
        background.finish().unwrap();
    }
}
