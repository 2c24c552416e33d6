//! What a file is by its name, and its bytes decompressed.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text(Compression),
    Lines(Compression),
    Table,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstandard,
}

impl Kind {
    pub fn of(path: &Path) -> Result<Self, String> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let (name, compression) = match name.rsplit_once('.') {
            Some((name, "gz")) => (name, Compression::Gzip),
            Some((name, "zst")) => (name, Compression::Zstandard),
            _ => (name.as_str(), Compression::None),
        };
        match name.rsplit_once('.').map(|(_, ending)| ending) {
            Some("jsonl") => Ok(Self::Lines(compression)),
            Some("parquet") if compression == Compression::None => Ok(Self::Table),
            Some("parquet") => Err("a .parquet file is compressed within, not as a whole".into()),
            _ => Ok(Self::Text(compression)),
        }
    }
}

/// The bytes of a file, and how many of them were read on the disk.
pub(super) struct Bytes {
    reader: Box<dyn Read + Send>,
    read: Arc<AtomicU64>,
}

impl Bytes {
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

impl Read for Bytes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

pub(super) fn reader(path: &Path, compression: Compression) -> io::Result<Bytes> {
    let read = Arc::new(AtomicU64::new(0));
    let file = Counted { file: File::open(path)?, read: Arc::clone(&read) };
    let file = BufReader::with_capacity(1 << 18, file);
    let reader: Box<dyn Read + Send> = match compression {
        Compression::None => Box::new(file),
        // Of several members, one behind the other.
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Compression::Zstandard => {
            let mut decoder = zstd::Decoder::with_buffer(file)?;
            // Frames may ask for windows of any size: these are the largest that are written.
            decoder.window_log_max(27)?;
            Box::new(decoder)
        }
    };
    Ok(Bytes { reader, read })
}

struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.read.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// Drops so many bytes.
pub(super) fn skip(reader: &mut impl Read, bytes: u64) -> Result<(), String> {
    let skipped = io::copy(&mut reader.take(bytes), &mut io::sink());
    match skipped.map_err(|error| error.to_string())? == bytes {
        true => Ok(()),
        false => Err("it is shorter than it was".into()),
    }
}
