//! What a run wrote for its data, so that it can tell when that is damaged or exchanged.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use yuan_files::{Checksum, FileError};

/// Files of a directory by their names, as they were written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WrittenFiles(BTreeMap<String, Checksum>);

impl WrittenFiles {
    pub(crate) fn add(&mut self, name: &str, checksum: Checksum) {
        self.0.insert(name.to_owned(), checksum);
    }
}

#[cfg(any(feature = "chat", feature = "images"))]
impl WrittenFiles {
    /// The two files of a file of tokens.
    pub(crate) fn add_tokens(&mut self, name: &str, [tokens, index]: [Checksum; 2]) {
        self.add(&format!("{name}.bin"), tokens);
        self.add(&format!("{name}.idx"), index);
    }

    /// That of a file which was added.
    pub(crate) fn of(&self, name: &str) -> Checksum {
        self.0[name]
    }
}

impl WrittenFiles {
    /// Whether there are none, as in runs of text, whose data sets know their files themselves.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Files that are not what was written, and why: by their sizes, and by their contents if all is
    /// to be read or they hold no tokens, which are short.
    pub fn problems(&self, directory: &Path, read_all: bool) -> Vec<(PathBuf, String)> {
        let problem = |(name, written): (&String, &Checksum)| {
            let path = directory.join(name);
            let reads = read_all || !name.ends_with(".bin");
            let found = match fs::metadata(&path) {
                Ok(found) if found.is_file() && found.len() == written.bytes && reads => {
                    Checksum::of_file(&path).map(|found| found == *written)
                }
                Ok(found) => Ok(found.is_file() && found.len() == written.bytes),
                Err(error) => Err(FileError::of("read", &path)(error)),
            };
            let reason = match found {
                Ok(true) => return None,
                Ok(false) => "it is not what was written when the run was made".to_owned(),
                Err(error) => error.cause.to_string(),
            };
            Some((path, reason))
        };
        self.0.iter().filter_map(problem).collect()
    }
}
