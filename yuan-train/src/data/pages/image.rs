//! Where an image is.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use yuan_model::vision::{Picture, PictureError};

/// An image in a file or in an archive, and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    /// The file, or the archive.
    pub path: PathBuf,
    /// First byte and number of bytes in an archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<[u64; 2]>,
    /// Width and height.
    pub size: [usize; 2],
}

impl ImageSource {
    /// The image of a file, whose header is read; its path becomes an absolute one.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn of_file(path: PathBuf) -> Result<Self, String> {
        let size = Picture::size_of(&path).map_err(|error| error.to_string())?;
        Ok(Self { path: absolute(&path)?, within: None, size })
    }

    /// The image at a place of an archive, whose bytes are given.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn in_archive(path: &Path, start: u64, bytes: &[u8]) -> Result<Self, String> {
        let size = Picture::size_in(bytes).map_err(|error| error.to_string())?;
        Ok(Self { path: absolute(path)?, within: Some([start, bytes.len() as u64]), size })
    }

    /// Reads the picture.
    ///
    /// # Errors
    ///
    /// If it is damaged, or has another size than it had.
    pub fn read(&self) -> Result<Picture, PictureError> {
        let with_remedy = |error: PictureError| PictureError {
            reason: format!("{}; mend or restore the file, and resume the run", error.reason),
            ..error
        };
        self.picture().map_err(with_remedy)
    }

    fn picture(&self) -> Result<Picture, PictureError> {
        let bytes = self.bytes()?;
        let named = |error: PictureError| PictureError {
            path: Some(self.path.clone()),
            reason: match self.within {
                None => error.reason,
                Some([start, _]) => format!("the image at byte {start}: {}", error.reason),
            },
        };
        self.check(Picture::size_in(&bytes).map_err(named)?)?;
        Picture::decode(&bytes).map_err(named)
    }

    fn bytes(&self) -> Result<Vec<u8>, PictureError> {
        let Some([start, count]) = self.within else { return Picture::read_file(&self.path) };
        let mut bytes = Vec::new();
        let mut read = || {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(start))?;
            file.take(count).read_to_end(&mut bytes)
        };
        match read() {
            Ok(_) => Ok(bytes),
            Err(error) => {
                let reason = format!("cannot read it: {error}");
                Err(PictureError { path: Some(self.path.clone()), reason })
            }
        }
    }

    /// Another image, which may be of any size, is not decoded.
    fn check(&self, found: [usize; 2]) -> Result<(), PictureError> {
        let ([width, height], [was_wide, was_high]) = (found, self.size);
        if found == self.size {
            return Ok(());
        }
        let reason = format!(
            "it has {width} x {height} pixels, but had {was_wide} x {was_high} when the run was made"
        );
        Err(PictureError { path: Some(self.path.clone()), reason })
    }
}

/// A path that is the same wherever a run is gone on with, as text.
fn absolute(path: &Path) -> Result<PathBuf, String> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err(format!("{}: its path is no text in UTF-8: rename it", path.display())),
    }
}
