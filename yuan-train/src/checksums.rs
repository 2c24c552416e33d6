//! Whether the files of a checkpoint or a run are those that were written.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};
use yuan_files::{Checksum, write_whole};

use crate::TrainError;

/// Size and checksum of every file of a checkpoint, or of the tokens of a run, in a file of their
/// own that is written after them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Checksums {
    files: BTreeMap<String, Checksum>,
}

impl Checksums {
    /// Name of the file.
    pub const FILE: &'static str = "checksums.json";

    /// Takes note of a file.
    pub fn add(&mut self, name: &str, checksum: Checksum) {
        self.files.insert(name.to_owned(), checksum);
    }

    /// Writes the file.
    pub fn save(&self, directory: &Path) -> Result<(), TrainError> {
        let path = directory.join(Self::FILE);
        let text = serde_json::to_string_pretty(self).expect("names and numbers are plain data");
        Ok(write_whole(&path, text.as_bytes())?)
    }

    /// Reads the file, which names files of its own directory alone.
    pub fn load(directory: &Path) -> Result<Self, TrainError> {
        let path = directory.join(Self::FILE);
        let text = fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let parsed = serde_json::from_str::<Self>(&text).map_err(|error| error.to_string());
        let checked = parsed.and_then(|checksums| {
            let elsewhere = |name: &&String| Path::new(name).file_name() != Some(name.as_ref());
            match checksums.files.keys().find(elsewhere) {
                Some(name) => Err(format!("`{name}` is not the name of a file of this directory")),
                None => Ok(checksums),
            }
        });
        checked.map_err(|reason| TrainError::Damaged { path, reason })
    }

    /// Reads of every `of` files one and says, one sentence each, which is not what was written.
    pub fn problems(&self, directory: &Path, (rank, of): (usize, usize)) -> Vec<String> {
        let problem = |name: &String| match Checksum::of_file(&directory.join(name)) {
            Ok(found) => self.problem(name, found),
            Err(error) => Some(error.to_string()),
        };
        self.files.keys().skip(rank).step_by(of).filter_map(problem).collect()
    }

    /// Says which of these files have no checksum, of the first of them.
    pub fn missing(&self, names: impl IntoIterator<Item = String>) -> Vec<String> {
        // A damaged number of ranks makes hundreds of thousands of names.
        const NAMED: usize = 8;
        let missing = names.into_iter().filter(|name| !self.files.contains_key(name)).take(NAMED);
        missing.map(|name| format!("{name} has no checksum in {}", Self::FILE)).collect()
    }

    /// The same from the sizes of the files alone.
    pub fn problems_of_sizes(&self, directory: &Path) -> Vec<String> {
        let problem = |(name, written): (&String, &Checksum)| {
            let path = directory.join(name);
            match fs::metadata(&path) {
                Ok(found) => self.problem(name, Checksum { bytes: found.len(), ..*written }),
                Err(error) => Some(TrainError::io("read", &path)(error).to_string()),
            }
        };
        self.files.iter().filter_map(problem).collect()
    }

    /// What is wrong with a file that has this checksum now; nothing is known of other files.
    pub fn problem(&self, name: &str, found: Checksum) -> Option<String> {
        let written = self.files.get(name).filter(|&&written| written != found)?;
        Some(match found.bytes == written.bytes {
            true => format!("{name} is damaged: its checksum is not the one it had"),
            false => {
                format!("{name} has {} bytes, but {} were written", found.bytes, written.bytes)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_outside_the_directory_are_not_read() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["/dev/zero", "../other", "sub/file", "", "..", "."] {
            let mut checksums = Checksums::default();
            checksums.add(name, Checksum { bytes: 1, crc32: 0 });
            checksums.save(temp.path()).unwrap();
            let refused = Checksums::load(temp.path()).unwrap_err().to_string();
            assert!(refused.contains(Checksums::FILE), "{refused}");
            assert!(refused.contains(&format!("`{name}` is not the name of a file")), "{refused}");
        }
    }
}
