//! Reading, making tokens and writing, at the same time.

use std::{
    collections::HashSet,
    fs::{File, OpenOptions},
    io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant},
};

use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use xxhash_rust::xxh3::xxh3_64;

use super::{PrepareOptions, Progress, Stage, state::State, state::Workplace};
use crate::{
    DataError, Dataset, Document, Item, Part, Place, Skipped, Sources, Split, TokenType,
    TokenWriter, source::Reading, tokenizer::Encoder,
};

/// Longest time whose work a killed process loses.
const BETWEEN_NOTES: Duration = Duration::from_secs(5);

/// Turns documents into the tokens of both splits.
pub(super) struct Pipeline<'a> {
    pub workplace: &'a Workplace,
    pub encoder: &'a Encoder,
    pub options: &'a PrepareOptions,
    pub state: State,
    pub writers: [TokenWriter; 2],
    pub hashes: Hashes,
    pool: ThreadPool,
}

/// What is read at once.
struct Batch {
    parts: Vec<Part>,
    /// Where to go on behind it, unless a line or row was cut there.
    place: Option<Place>,
    hashes: Vec<u64>,
    duplicates: u64,
    skipped: Vec<(Skipped, u64)>,
    bytes_read: u64,
    is_last: bool,
}

impl<'a> Pipeline<'a> {
    pub fn open(
        workplace: &'a Workplace,
        encoder: &'a Encoder,
        state: State,
        options: &'a PrepareOptions,
    ) -> Result<Self, DataError> {
        let kind = TokenType::for_vocabulary(encoder.vocab_size());
        let directory = workplace.directory();
        let [train, validation] = state.written;
        let pool = ThreadPoolBuilder::new().num_threads(options.threads).build();
        let pool = pool.map_err(|error| DataError::Setting(error.to_string()))?;
        Ok(Self {
            writers: [
                TokenWriter::resume(&directory.join("train"), kind, train)?,
                TokenWriter::resume(&directory.join("validation"), kind, validation)?,
            ],
            hashes: Hashes::open(workplace, state.hashes)?,
            workplace,
            encoder,
            options,
            state,
            pool,
        })
    }

    /// Reads the sources from where the state says, to the end.
    pub fn run(&mut self, sources: &Sources, progress: &dyn Progress) -> Result<(), DataError> {
        let total = sources.bytes();
        let size = Part::LONGEST * 4 * self.pool.current_num_threads();
        let (drop_duplicates, place) = (self.options.drop_duplicates, self.state.place);
        let seen = std::mem::take(&mut self.hashes.seen);
        let is_open = self.state.open.is_some();
        thread::scope(|scope| {
            let (send, receive) = sync_channel(1);
            scope.spawn(move || {
                let reading = sources.read_from(place);
                let reader = Reader { reading, seen, drop_duplicates, is_open };
                reader.read(size, &send);
            });
            self.take(&receive, total, progress)
        })
    }

    fn take(
        &mut self,
        batches: &Receiver<Batch>,
        total: u64,
        progress: &dyn Progress,
    ) -> Result<(), DataError> {
        let mut noted = Instant::now();
        while let Ok(batch) = batches.recv() {
            let Batch { parts, place, hashes, duplicates, skipped, bytes_read, is_last } = batch;
            self.hashes.add(&hashes)?;
            self.state.duplicates += duplicates;
            skipped.into_iter().for_each(|(file, records)| self.state.skipped.add(file, records));
            self.add(&parts)?;
            // What is left at the end takes no time.
            let goes_on = progress.goes_on(Stage::Tokens, bytes_read, total) || is_last;
            if let Some(place) = place {
                self.state.place = place;
                if !goes_on || noted.elapsed() > BETWEEN_NOTES {
                    self.note()?;
                    noted = Instant::now();
                }
            }
            if !goes_on {
                return Err(DataError::Stopped);
            }
        }
        self.note()
    }

    /// Documents that are in memory.
    pub fn add_documents(&mut self, documents: Vec<Document>) -> Result<(), DataError> {
        let whole = |Document { name, text }| Part { name, text, is_first: true, is_last: true };
        let parts: Vec<Part> = documents.into_iter().map(whole).collect();
        self.add(&parts)
    }

    fn add(&mut self, parts: &[Part]) -> Result<(), DataError> {
        let encoder = self.encoder;
        let encoded: Vec<Result<Vec<u32>, DataError>> =
            self.pool.install(|| parts.par_iter().map(|part| encoder.encode(&part.text)).collect());
        for (part, tokens) in parts.iter().zip(encoded) {
            let split = match (self.state.open, Split::of(&part.name, self.options.validation)) {
                (Some(split), _) => split,
                (None, Split::Train) => 0,
                (None, Split::Validation) => 1,
            };
            let writer = &mut self.writers[split];
            writer.push(&tokens?)?;
            self.state.open = Some(split);
            if part.is_last {
                writer.push(&[self.encoder.eod()])?;
                writer.end_document()?;
                self.state.open = None;
            }
        }
        Ok(())
    }

    /// Writes down how far it is.
    pub fn note(&mut self) -> Result<(), DataError> {
        for (writer, written) in self.writers.iter_mut().zip(&mut self.state.written) {
            *written = writer.flush()?;
        }
        self.state.hashes = self.hashes.flush()?;
        self.workplace.save(&self.state)
    }
}

/// Reads batches ahead of those that make tokens of them.
struct Reader<'a> {
    reading: Reading<'a>,
    seen: HashSet<u64>,
    drop_duplicates: bool,
    /// Whether the last part does not end its document.
    is_open: bool,
}

impl Reader<'_> {
    fn read(mut self, size: usize, send: &SyncSender<Batch>) {
        loop {
            let batch = self.batch(size);
            let is_last = batch.is_last;
            // The other side is gone when it failed or was stopped.
            if send.send(batch).is_err() || is_last {
                return;
            }
        }
    }

    fn batch(&mut self, size: usize) -> Batch {
        let mut batch = Batch {
            parts: Vec::new(),
            place: Some(self.reading.place()),
            hashes: Vec::new(),
            duplicates: 0,
            skipped: Vec::new(),
            bytes_read: 0,
            is_last: true,
        };
        let mut bytes = 0;
        while let Some(item) = self.reading.next() {
            let (place, mut is_cut) = (self.reading.place(), false);
            match item {
                Item::Skipped { file, records } => {
                    // A file that broke off in a document, which ends where it did.
                    if records == 0 && std::mem::take(&mut self.is_open) {
                        let (name, text) = (file.name.clone(), String::new());
                        batch.parts.push(Part { name, text, is_first: false, is_last: true });
                    }
                    batch.skipped.push((file, records));
                }
                Item::Part(part) => {
                    // A text of its own can be taken up anywhere, a line or row only behind it.
                    is_cut = !part.is_last && !self.reading.is_whole_file();
                    self.is_open = !part.is_last;
                    bytes += part.text.len();
                    if self.is_duplicate(&part, &mut batch.hashes) {
                        batch.duplicates += 1;
                    } else {
                        batch.parts.push(part);
                    }
                }
            }
            batch.place = (!is_cut).then_some(place);
            if (bytes >= size || batch.skipped.len() > 10_000) && !is_cut {
                batch.is_last = false;
                break;
            }
        }
        batch.bytes_read = self.reading.bytes_read();
        batch
    }

    fn is_duplicate(&mut self, part: &Part, hashes: &mut Vec<u64>) -> bool {
        if !self.drop_duplicates || !part.is_first || !part.is_last {
            return false;
        }
        let hash = xxh3_64(part.text.as_bytes());
        let is_new = self.seen.insert(hash);
        if is_new {
            hashes.push(hash);
        }
        !is_new
    }
}

/// The hashes of all documents, on the disk for a process that goes on.
pub(super) struct Hashes {
    file: BufWriter<File>,
    count: u64,
    seen: HashSet<u64>,
}

impl Hashes {
    const FILE: &str = "hashes";

    fn open(workplace: &Workplace, count: u64) -> Result<Self, DataError> {
        let path = workplace.directory().join(Self::FILE);
        let open = || {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            let mut seen = HashSet::with_capacity(count as usize);
            let mut reader = BufReader::new((&mut file).take(count * 8));
            let mut hash = [0; 8];
            for _ in 0..count {
                reader.read_exact(&mut hash)?;
                seen.insert(u64::from_le_bytes(hash));
            }
            file.set_len(count * 8)?;
            file.seek(SeekFrom::End(0))?;
            Ok(Self { file: BufWriter::new(file), count, seen })
        };
        open().map_err(DataError::io("use", &path))
    }

    /// Remembers a hash; whether it was not there before.
    pub fn is_new(&mut self, hash: u64) -> Result<bool, DataError> {
        let is_new = self.seen.insert(hash);
        if is_new {
            self.add(&[hash])?;
        }
        Ok(is_new)
    }

    fn add(&mut self, hashes: &[u64]) -> Result<(), DataError> {
        self.count += hashes.len() as u64;
        let write = hashes.iter().try_for_each(|hash| self.file.write_all(&hash.to_le_bytes()));
        write.map_err(|error| DataError::io("write", Self::FILE.as_ref())(error))
    }

    fn flush(&mut self) -> Result<u64, DataError> {
        let flushed = self.file.flush().and_then(|()| self.file.get_ref().sync_data());
        flushed.map_err(|error| DataError::io("write", Self::FILE.as_ref())(error))?;
        Ok(self.count)
    }
}

impl Pipeline<'_> {
    /// The tokenizer's digest.
    pub fn tokenizer_digest(&self) -> Result<String, DataError> {
        let path = self.workplace.directory().join(Dataset::TOKENIZER);
        let bytes = std::fs::read(&path).map_err(DataError::io("read", &path))?;
        Ok(crate::dataset::digest(&bytes))
    }
}
