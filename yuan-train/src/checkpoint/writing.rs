//! A checkpoint on its way to the disk, written by a thread while training goes on.
//!
//! Every process writes its own files. Of several ranks the first one makes the directory, under a
//! name that says that it is unfinished; when all have written and synced theirs, it adds the index,
//! the state and the checksums, and gives the directory its name. A checkpoint is complete or not
//! there.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use yuan_files::{Checksum, write_directory};
use yuan_model::{
    named::StoredParameter,
    ranks::Communicator,
    storage::{OutgoingTensor, TensorBytes, write_tensors},
};

use super::{
    index::{Index, Piece},
    share::Share,
    state::{CheckpointState, LAYOUT, STATE, STEP, damaged},
};
use crate::{AdamW, LanguageModel, TrainError, checksums::Checksums, names::MODEL as MODEL_CONFIG};

/// A checkpoint that is being written.
#[derive(Debug)]
pub(crate) struct Writing {
    path: PathBuf,
    step: u64,
    /// All ranks, if there are several.
    world: Option<Communicator>,
    thread: JoinHandle<Result<(), TrainError>>,
    /// This process has written its files.
    is_written: Arc<AtomicBool>,
    /// What it wrote.
    written: Receiver<Written>,
    pieces: Vec<(usize, Piece)>,
    /// To the thread of the first rank: what all ranks wrote.
    reports: Option<Sender<Vec<Report>>>,
}

/// Files with their checksums.
type Written = Vec<(String, Checksum)>;

/// What a rank tells the first one.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    files: Written,
    pieces: Vec<(usize, Piece)>,
    error: Option<String>,
}

/// What the first rank writes beside tensors.
struct Rest {
    config: String,
    state: String,
    stored: Vec<StoredParameter>,
    moments: Vec<bool>,
    /// Of several ranks.
    reports: Option<Receiver<Vec<Report>>>,
}

/// Where a thread gets its tensors from.
enum Feed {
    /// One after the other, as they are read from the device.
    Bounded(mpsc::SyncSender<TensorBytes>),
    /// All at once, from a copy on the host.
    Copy(Sender<TensorBytes>),
}

impl Feed {
    fn give(&self, bytes: TensorBytes) -> bool {
        match self {
            Self::Bounded(sender) => sender.send(bytes).is_ok(),
            Self::Copy(sender) => sender.send(bytes).is_ok(),
        }
    }
}

impl Writing {
    /// Makes ready what [`begin`](Self::begin) copies to in the background.
    ///
    /// # Errors
    ///
    /// If a parameter is not there.
    pub fn prepare<M: LanguageModel>(model: &M, optimizer: &AdamW) -> Result<(), TrainError> {
        Share::of(model, optimizer).reserve()
    }

    /// Begins to write a checkpoint. With `in_background`, and over ranks, of which none must wait for
    /// another one's disk here, it returns when this process's share is copied to the host; otherwise
    /// when it is handed on to be written. All ranks call it together.
    ///
    /// # Errors
    ///
    /// If the device fails, the directory cannot be made, or a rank is gone.
    pub fn begin<M: LanguageModel>(
        path: PathBuf,
        model: &M,
        optimizer: &AdamW,
        state: &CheckpointState,
        in_background: bool,
    ) -> Result<Self, TrainError> {
        let share = Share::of(model, optimizer);
        let world = model.ranks().map(|ranks| ranks.world().clone());
        let world = world.filter(|world| world.size() > 1);
        let (feed, tensors): (Feed, Box<dyn Iterator<Item = TensorBytes> + Send>) =
            match in_background || world.is_some() {
                true => {
                    let (sender, receiver) = mpsc::channel();
                    (Feed::Copy(sender), Box::new(receiver.into_iter()))
                }
                false => {
                    let (sender, receiver) = mpsc::sync_channel(0);
                    (Feed::Bounded(sender), Box::new(receiver.into_iter()))
                }
            };
        let files = share.files();
        let ((tell, written), is_written) = (mpsc::channel(), Arc::new(AtomicBool::new(false)));
        let (place, step) = (path.clone(), state.step);
        let mut job = Job {
            step: state.step,
            files: files.iter().map(|file| (file.name.clone(), file.tensors.clone())).collect(),
            tensors,
            tell,
            is_written: is_written.clone(),
        };
        let (thread, reports) = if world.as_ref().is_none_or(Communicator::is_first) {
            let state = CheckpointState { layout: LAYOUT, ..state.clone() };
            let state = serde_json::to_string_pretty(&state);
            let state = state.map_err(|error| damaged(&path, error.to_string()))?;
            let (reports, receive) = mpsc::channel();
            let rest = Rest {
                config: model.config_json(),
                state,
                stored: share.stored.clone(),
                moments: share.moments(),
                reports: world.is_some().then_some(receive),
            };
            let (tell_name, name) = mpsc::channel();
            let thread = thread::spawn(move || {
                write_directory(&path, |directory| {
                    // Nobody listens where there is one process.
                    drop(tell_name.send(directory.to_path_buf()));
                    let own = job.write(directory)?;
                    complete(directory, own, rest)
                })
            });
            if let Some(world) = &world {
                let name = name.recv().unwrap_or_default();
                let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
                world.broadcast(name.into_bytes())?;
            }
            (thread, Some(reports))
        } else {
            let name = world.as_ref().map(|world| world.broadcast(Vec::new())).transpose()?;
            let name = String::from_utf8(name.unwrap_or_default()).unwrap_or_default();
            let thread = thread::spawn(move || match name.as_str() {
                "" => Err(damaged(&path, "the first rank could not make its directory")),
                name => job.write(&path.with_file_name(name)).map(drop),
            });
            (thread, None)
        };
        let pieces = share.pieces();
        let writing =
            Self { path: place, step, world, thread, is_written, written, pieces, reports };
        match in_background.then(|| share.copies(&files)).transpose()?.flatten() {
            Some(copies) => drop(copies.into_iter().all(|bytes| feed.give(bytes))),
            None => {
                for file in &files {
                    share.read(file, |bytes| feed.give(bytes))?;
                }
            }
        }
        Ok(writing)
    }

    /// Steps completed when it was begun.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Whether [`finish`](Self::finish) has nothing more to wait for: the checkpoint is complete, or over
    /// ranks this process has written its files; or that failed.
    pub fn is_done(&self) -> bool {
        let has_written = self.world.is_some() && self.is_written.load(Ordering::Acquire);
        has_written || self.thread.is_finished()
    }

    /// Waits until it is complete. All ranks call it together.
    ///
    /// # Errors
    ///
    /// If a file of any rank cannot be written, or a rank is gone; there is no checkpoint then.
    pub fn finish(self) -> Result<(), TrainError> {
        let Some(world) = self.world.clone() else {
            drop(self.reports);
            return join(self.thread);
        };
        // Ranks are not of one speed, and each may take longer than they wait for each other.
        while world.sum_counts(&[u64::from(!self.is_done())])?[0] > 0 {
            thread::sleep(Duration::from_millis(20));
        }
        let Self { path, thread, written, pieces, reports, .. } = self;
        let files = written.try_recv();
        let mut thread = Some(thread);
        let error = match &files {
            Ok(_) => None,
            Err(_) => thread.take().and_then(|thread| join(thread).err()),
        };
        let told = error.as_ref().map(ToString::to_string);
        let report = Report { files: files.unwrap_or_default(), pieces, error: told };
        let report = serde_json::to_vec(&report).expect("names and numbers are plain data");
        let reports_of_all = world.gather(&report)?;
        let mut outcome = error.map_or(Ok(()), Err);
        if let Some(reports) = reports {
            let parsed = reports_of_all.iter().map(|report| serde_json::from_slice(report));
            if let Ok(parsed) = parsed.collect::<Result<Vec<Report>, _>>() {
                // Where its thread has failed, it says so below.
                drop(reports.send(parsed));
            }
            drop(reports);
            if let Some(thread) = thread {
                outcome = join(thread);
            }
            let told = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
            world.broadcast(told.into_bytes())?;
        } else {
            let told = String::from_utf8_lossy(&world.broadcast(Vec::new())?).into_owned();
            if let (Ok(()), false) = (&outcome, told.is_empty()) {
                outcome = Err(damaged(&path, format!("it could not be written: {told}")));
            }
        }
        outcome
    }
}

/// Waits for a thread; what it panics with goes on here.
pub(crate) fn join(thread: JoinHandle<Result<(), TrainError>>) -> Result<(), TrainError> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What a thread writes of one process.
struct Job {
    step: u64,
    files: Vec<(String, Vec<OutgoingTensor>)>,
    tensors: Box<dyn Iterator<Item = TensorBytes> + Send>,
    tell: Sender<Written>,
    is_written: Arc<AtomicBool>,
}

impl Job {
    fn write(&mut self, directory: &Path) -> Result<Written, TrainError> {
        let step = [(STEP, self.step.to_string())];
        let mut written = Written::new();
        for (name, tensors) in &self.files {
            let path = directory.join(name);
            let sum = write_tensors(&path, tensors, &step, |_| {
                let gone = || damaged(&path, "its tensors could not be read from the device");
                self.tensors.next().ok_or_else(gone)
            })?;
            let sync = File::open(&path).and_then(|file| file.sync_all());
            sync.map_err(TrainError::io("write", &path))?;
            written.push((name.clone(), sum));
        }
        // Nobody listens where there is one process.
        drop(self.tell.send(written.clone()));
        self.is_written.store(true, Ordering::Release);
        Ok(written)
    }
}

/// Adds what belongs to a checkpoint beside tensors.
fn complete(directory: &Path, own: Written, rest: Rest) -> Result<(), TrainError> {
    let mut files = own;
    let mut texts = vec![(MODEL_CONFIG, rest.config), (STATE, rest.state)];
    if let Some(reports) = rest.reports {
        let ended = || damaged(directory, "the run ended before it was complete");
        let reports = reports.recv().map_err(|_| ended())?;
        if let Some((rank, error)) = reports
            .iter()
            .enumerate()
            .find_map(|(rank, report)| Some((rank, report.error.as_ref()?)))
        {
            return Err(damaged(
                directory,
                format!("rank {rank} could not write its part: {error}"),
            ));
        }
        let pieces: Vec<Vec<(usize, Piece)>> =
            reports.iter().map(|report| report.pieces.clone()).collect();
        let index = Index::new(&rest.stored, &rest.moments, &pieces);
        let index = index.map_err(|reason| damaged(directory, reason))?;
        let text = serde_json::to_string(&index).expect("names and numbers are plain data");
        texts.push((Index::FILE, text));
        files = reports.into_iter().flat_map(|report| report.files).collect();
        if let Some((name, _)) = files.iter().find(|(name, _)| !directory.join(name).exists()) {
            let reason =
                format!("{name} is not there: ranks need a directory that all of them see");
            return Err(damaged(directory, reason));
        }
    }
    let mut checksums = Checksums::default();
    for (name, text) in texts {
        let file = directory.join(name);
        fs::write(&file, &text).map_err(TrainError::io("write", &file))?;
        checksums.add(name, Checksum::of(text.as_bytes()));
    }
    for (name, sum) in files {
        checksums.add(&name, sum);
    }
    checksums.save(directory)
}
