//! Where an image is, and what it was when it was found.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Condvar, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use yuan_files::Checksum;
use yuan_model::vision::{Picture, PictureError};

/// A file, or a part of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImagePlace {
    /// The file, or the archive.
    pub path: PathBuf,
    /// Of an archive, the member's name, its first byte and its number of bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<(String, u64, u64)>,
}

impl ImagePlace {
    pub(super) fn of_file(path: PathBuf) -> Self {
        Self { path, member: None }
    }

    fn refuse(&self, reason: &str) -> PictureError {
        let reason = match &self.member {
            None => reason.to_owned(),
            Some((name, ..)) => format!("{name}: {reason}"),
        };
        PictureError { path: Some(self.path.clone()), reason }
    }

    fn bytes(&self) -> Result<Vec<u8>, PictureError> {
        let Some((_, start, count)) = self.member else { return Picture::read_file(&self.path) };
        let read = || {
            // A pipe would be waited for.
            if !self.path.metadata()?.is_file() {
                return Err(io::Error::other("it is no file"));
            }
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.take(count).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|error| self.refuse(&format!("cannot read it: {error}")))
    }

    /// Decodes the image and does something with it, where there is memory for both.
    fn decoded<T>(
        &self,
        bytes: &[u8],
        what: impl FnOnce(&Picture) -> T,
    ) -> Result<T, PictureError> {
        let named = |error: PictureError| self.refuse(&error.reason);
        let [width, height] = Picture::size_in(bytes).map_err(named)?;
        let _room = Room::take((width * height * BYTES_PER_PIXEL) as u64);
        Picture::decode(bytes).map(|picture| what(&picture)).map_err(named)
    }

    /// Which image it is, whatever it is called.
    pub(super) fn checksum(&self) -> Result<Checksum, PictureError> {
        self.bytes().map(|bytes| Checksum::of(&bytes))
    }

    /// Reads the whole image; its path becomes an absolute one.
    pub(super) fn look(&self) -> Result<ImageSource, PictureError> {
        let bytes = self.bytes()?;
        let size = self.decoded(&bytes, |picture| [picture.width(), picture.height()])?;
        let path = absolute(&self.path).map_err(|reason| self.refuse(&reason))?;
        let place = Self { path, member: self.member.clone() };
        Ok(ImageSource { place, size, checksum: Checksum::of(&bytes) })
    }
}

/// An image in a file or in an archive, and what it was when a run was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    /// Where it is.
    #[serde(flatten)]
    pub place: ImagePlace,
    /// Width and height.
    pub size: [usize; 2],
    /// Of its bytes.
    pub checksum: Checksum,
}

impl ImageSource {
    /// Reads the picture and does something with it. Of large pictures only as many are in memory at a
    /// time, in all threads, as fit into a gigabyte or so.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is not the image that it was.
    pub fn read<T>(&self, what: impl FnOnce(&Picture) -> T) -> Result<T, PictureError> {
        let with_remedy = |error: PictureError| PictureError {
            reason: format!("{}; restore the file, and resume the run", error.reason),
            ..error
        };
        self.picture(what).map_err(with_remedy)
    }

    fn picture<T>(&self, what: impl FnOnce(&Picture) -> T) -> Result<T, PictureError> {
        let bytes = self.place.bytes()?;
        if Checksum::of(&bytes) != self.checksum {
            return Err(self.place.refuse("it is not the image that it was when the run was made"));
        }
        let done = self.place.decoded(&bytes, |picture| {
            ([picture.width(), picture.height()] == self.size).then(|| what(picture))
        })?;
        done.ok_or_else(|| self.place.refuse("it has not the size that the run expects"))
    }
}

/// What a pixel takes while it is decoded and made to three values, of 16 bits and with transparency.
const BYTES_PER_PIXEL: usize = 17;
/// Memory for pictures that are decoded at the same time, in all threads.
const ROOM: u64 = 1 << 30;

/// A share of the memory for pictures, given back when it is dropped.
struct Room(u64);

static TAKEN: Mutex<u64> = Mutex::new(0);
static GIVEN_BACK: Condvar = Condvar::new();

impl Room {
    /// Waits until there is room; a picture that is larger than all of it goes alone.
    fn take(bytes: u64) -> Self {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken > 0 && *taken + bytes > ROOM {
            taken = GIVEN_BACK.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken += bytes;
        Self(bytes)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) -= self.0;
        GIVEN_BACK.notify_all();
    }
}

/// A path that is the same wherever a run is gone on with, as text.
fn absolute(path: &Path) -> Result<PathBuf, String> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err("its path is no text in UTF-8: rename it".into()),
    }
}
