//! What a run remembers of its data: where it is, and in which shares it is mixed.

use std::{
    fs,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use yuan_data::{DataError, Dataset, Mixture, TokenFile};
use yuan_files::{Checksum, write_whole};

use super::{PackedRows, RowSource, RowStream, TokenRows, WrittenFiles};
use crate::{TrainConfig, TrainError};

/// The data sets of a run: the file `data.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataSets {
    /// At least one, in the order in which they were given.
    pub sets: Vec<DataSet>,
}

/// One data set of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataSet {
    /// Its name, which decides the order of its rows together with the run's seed.
    pub name: String,
    /// Its share of the rows, in proportion to the other sets'; 0: it is only measured on.
    pub weight: f64,
    /// Where it is; a relative path begins in the run.
    pub path: PathBuf,
    /// What it holds.
    pub kind: DataKind,
    /// Tokens to train on, and to validate with.
    pub tokens: [u64; 2],
    /// Size and CRC-32 of the tokens to train on.
    pub checksum: Checksum,
    /// What the run wrote for it, if the set is the run's own.
    #[serde(default, skip_serializing_if = "WrittenFiles::is_empty")]
    pub files: WrittenFiles,
}

/// What a data set holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataKind {
    /// Documents in a row, every token of which is learnt.
    Text,
    /// Conversations, of which the answers are learnt.
    Conversations,
    /// Questions about images, of which the answers are learnt.
    Pages,
    /// Prompts that the model answers itself, and learns from what its answers are rewarded with.
    Prompts,
}

/// A prepared data set as a user names it: `DIR`, or `NAME=WEIGHT:DIR`.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedPath {
    /// A name; that of the directory, if none was given.
    pub name: String,
    /// Its share, in proportion to the others'; 0: it is only measured on.
    pub weight: f64,
    /// The directory.
    pub path: PathBuf,
}

impl FromStr for WeightedPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let of_path = |path: &str| {
            let path = PathBuf::from(path);
            let name = path.canonicalize().unwrap_or_else(|_| path.clone());
            let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, path)
        };
        // A directory may have such a name itself.
        let parts =
            text.split_once('=').and_then(|(name, rest)| Some((name, rest.split_once(':')?)));
        let Some((name, (weight, path))) = parts.filter(|_| !Path::new(text).exists()) else {
            let (name, path) = of_path(text);
            return Ok(Self { name, weight: 1.0, path });
        };
        let weight: f64 = weight.parse().map_err(|_| {
            format!("`{weight}` is no weight: write NAME=WEIGHT:DIR, as web=0.7:DIR")
        })?;
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(format!("the weight {weight} of a data set must not be negative"));
        }
        let name = if name.is_empty() { of_path(path).0 } else { name.to_owned() };
        Ok(Self { name, weight, path: path.into() })
    }
}

/// The rows of a run.
#[derive(Debug)]
pub struct Streams {
    /// Rows to train on.
    pub train: RowStream,
    /// Rows that are only measured on, by the name of their set, with its share.
    pub validation: Vec<(String, f64, RowStream)>,
}

impl From<[RowStream; 2]> for Streams {
    /// One set, to train on and to validate with.
    fn from([train, validation]: [RowStream; 2]) -> Self {
        Self { train, validation: vec![("validation".into(), 1.0, validation)] }
    }
}

impl DataSets {
    /// Name of the file in a run.
    pub const FILE: &'static str = "data.json";
    /// Name of the directory in a run that holds the tokens of text of its own.
    pub const DIRECTORY: &'static str = "data";

    /// Reads the file of a run.
    ///
    /// # Errors
    ///
    /// If it is missing or damaged.
    pub fn load(run_dir: &Path) -> Result<Self, TrainError> {
        let path = run_dir.join(Self::FILE);
        let text = fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let damaged = |reason: String| TrainError::Damaged { path: path.clone(), reason };
        let sets: Self = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        match sets.sets.is_empty() {
            true => Err(damaged("it names no data set".into())),
            false => Ok(sets),
        }
    }

    /// Writes the file of a run.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(crate) fn save(&self, run_dir: &Path) -> Result<(), TrainError> {
        let text = serde_json::to_string_pretty(self).expect("names and numbers are plain data");
        Ok(write_whole(&run_dir.join(Self::FILE), text.as_bytes())?)
    }

    /// Tokens to train on and to validate with, of all sets.
    pub fn tokens(&self) -> [u64; 2] {
        [0, 1].map(|split| self.sets.iter().map(|set| set.tokens[split]).sum())
    }

    /// Whether there is nothing to read rows from: the model answers prompts, and learns from what its
    /// answers are rewarded with.
    pub fn learns_from_rewards(&self) -> bool {
        self.sets.iter().any(|set| set.kind == DataKind::Prompts)
    }

    /// Rows of all sets, for a model of `vocab_size` tokens whose documents end with `eod`.
    ///
    /// # Errors
    ///
    /// If a data set is not where it was, is another one, is damaged, or is too small for a row.
    pub fn streams(
        &self,
        run_dir: &Path,
        config: &TrainConfig,
        eod: u32,
        vocab_size: usize,
    ) -> Result<Streams, TrainError> {
        match &self.sets[..] {
            [set] if set.kind == DataKind::Conversations => {
                set.conversations(run_dir, config, eod, vocab_size)
            }
            [set] if set.kind == DataKind::Pages => set.pages(run_dir, config, vocab_size),
            [set] if set.kind == DataKind::Prompts => {
                Err(TrainError::LearnsFromRewards(run_dir.to_path_buf()))
            }
            sets => {
                if let Some(set) = sets.iter().find(|set| set.kind != DataKind::Text) {
                    let name = &set.name;
                    let reason = format!("{name}: only sets of text can be mixed with other data");
                    return Err(DataError::Setting(reason).into());
                }
                self.text(run_dir, config, eod, vocab_size)
            }
        }
    }

    fn text(
        &self,
        run_dir: &Path,
        config: &TrainConfig,
        eod: u32,
        vocab_size: usize,
    ) -> Result<Streams, TrainError> {
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        let mixed = |seed, files: Vec<(&str, f64, TokenFile)>| {
            let mixture = Mixture::new(config.seq_len, seed, files)?;
            let source: Arc<dyn RowSource> = Arc::new(TokenRows::new(mixture, eod));
            Ok::<_, TrainError>(RowStream::of(source))
        };
        for set in &self.sets {
            let dataset = set.open(run_dir)?;
            let with = |file: TokenFile| file.with_vocabulary(vocab_size);
            let name = set.name.as_str();
            let file = match set.weight {
                // All of it is only measured on.
                0.0 => with(dataset.train()?),
                weight => {
                    train.push((name, weight, with(dataset.train()?)));
                    with(dataset.validation()?)
                }
            };
            // A set that is too small to validate with is still trained on.
            if set.weight == 0.0 || file.num_tokens() > config.seq_len as u64 {
                let stream = mixed(None, vec![(name, 1.0, file)])
                    .map_err(|error| with_words("too little text to validate on: ", error))?;
                validation.push((set.name.clone(), set.weight, stream));
            }
        }
        if validation.is_empty() {
            let reason = "too little text to validate on: about a twentieth of the text is kept for \
                          it unless --validation says otherwise, so bring more, or name a data set \
                          that is only measured on (--data NAME=0:DIR)";
            return Err(DataError::NoText(reason.into()).into());
        }
        if train.is_empty() {
            let reason = "no data set is trained on: one needs a weight above 0";
            return Err(DataError::Setting(reason.into()).into());
        }
        // Sets that are only measured on count where no other one validates.
        if validation.iter().all(|(_, share, _)| *share == 0.0) {
            validation.iter_mut().for_each(|(_, share, _)| *share = 1.0);
        }
        let train = mixed(Some(config.seed), train)
            .map_err(|error| with_words("too little text to train on: ", error))?;
        Ok(Streams { train, validation })
    }
}

/// Says what too little text is too little for.
fn with_words(words: &str, error: TrainError) -> TrainError {
    match error {
        TrainError::Data(DataError::NoText(reason)) => {
            DataError::NoText(format!("{words}{reason}")).into()
        }
        error => error,
    }
}

impl DataSet {
    /// What a run remembers of a prepared data set.
    pub fn of_dataset(name: String, weight: f64, path: PathBuf, dataset: &Dataset) -> Self {
        let info = dataset.info();
        Self {
            name,
            weight,
            path,
            kind: DataKind::Text,
            tokens: [info.train.tokens, info.validation.tokens],
            checksum: info.train.bin,
            files: WrittenFiles::default(),
        }
    }

    /// Where it is.
    pub fn directory(&self, run_dir: &Path) -> PathBuf {
        run_dir.join(&self.path)
    }

    /// Opens a set of text.
    ///
    /// # Errors
    ///
    /// If it is not where it was, or another one is there.
    pub fn open(&self, run_dir: &Path) -> Result<Dataset, TrainError> {
        let directory = self.directory(run_dir);
        let dataset = Dataset::open(&directory)?;
        if dataset.info().train.bin != self.checksum {
            let (path, name) = (directory, &self.name);
            let reason = format!("it is not the data set `{name}` that the run was made with");
            return Err(TrainError::Damaged { path, reason });
        }
        Ok(dataset)
    }

    /// Refuses to read files of the run that are not what it wrote.
    fn check_files(&self, directory: &Path) -> Result<(), TrainError> {
        match self.files.problems(directory, false).into_iter().next() {
            Some((path, reason)) => {
                let remedy = match self.kind {
                    DataKind::Prompts => "bring it back, or begin another run from this one",
                    _ => "make the run again from its data",
                };
                let reason = format!("{reason}: {remedy}");
                Err(TrainError::Damaged { path, reason })
            }
            None => Ok(()),
        }
    }

    /// What a run of rewards keeps of its prompts, and nothing to read tokens from.
    pub(crate) fn prompts(run_dir: &Path, files: &[(String, Vec<u8>)]) -> Result<Self, TrainError> {
        let directory = run_dir.join(DataSets::DIRECTORY);
        fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
        let mut written = WrittenFiles::default();
        for (name, bytes) in files {
            write_whole(&directory.join(name), bytes)?;
            written.add(name, Checksum::of(bytes));
        }
        Ok(Self {
            name: "prompts".into(),
            weight: 1.0,
            path: DataSets::DIRECTORY.into(),
            kind: DataKind::Prompts,
            tokens: [0, 0],
            checksum: Checksum::of(&[]),
            files: written,
        })
    }

    /// Reads a file that the run wrote for its data.
    ///
    /// # Errors
    ///
    /// If it is not there, or not what was written.
    pub fn read_file(&self, run_dir: &Path, name: &str) -> Result<Vec<u8>, TrainError> {
        let directory = self.directory(run_dir);
        self.check_files(&directory)?;
        let path = directory.join(name);
        fs::read(&path).map_err(TrainError::io("read", &path))
    }

    fn conversations(
        &self,
        run_dir: &Path,
        config: &TrainConfig,
        eod: u32,
        vocab_size: usize,
    ) -> Result<Streams, TrainError> {
        let directory = self.directory(run_dir);
        self.check_files(&directory)?;
        let rows = |split: &str, seed| {
            let [tokens, learnt] = PackedRows::names(&directory, split);
            let tokens = TokenFile::open(&tokens)?.with_vocabulary(vocab_size);
            let rows =
                PackedRows::new(tokens, TokenFile::open(&learnt)?, config.seq_len, seed, eod)?;
            Ok::<_, TrainError>(RowStream::of(Arc::new(rows)))
        };
        Ok(Streams {
            train: rows("train", Some(config.seed))?,
            validation: vec![(self.name.clone(), 1.0, rows("validation", None)?)],
        })
    }

    #[cfg(feature = "images")]
    fn pages(
        &self,
        run_dir: &Path,
        config: &TrainConfig,
        vocab_size: usize,
    ) -> Result<Streams, TrainError> {
        self.check_files(&self.directory(run_dir))?;
        let rows = |split: &str, seed| {
            let rows = super::PageRows::open(run_dir, split, vocab_size, config.seq_len, seed)?;
            Ok::<_, TrainError>(RowStream::of(Arc::new(rows)))
        };
        Ok(Streams {
            train: rows("train", Some(config.seed))?,
            validation: vec![(self.name.clone(), 1.0, rows("validation", None)?)],
        })
    }

    #[cfg(not(feature = "images"))]
    fn pages(&self, _: &Path, _: &TrainConfig, _: usize) -> Result<Streams, TrainError> {
        let reason = "this build reads no images: build it with the feature `images`";
        Err(DataError::Setting(reason.into()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_sets_are_named_with_a_weight_or_without() {
        let parsed = |text: &str| text.parse::<WeightedPath>().unwrap();
        let set = parsed("web=0.7:/data/web-2024");
        assert_eq!((set.name.as_str(), set.weight), ("web", 0.7));
        assert_eq!(set.path, Path::new("/data/web-2024"));
        let set = parsed("/data/web-2024");
        assert_eq!((set.name.as_str(), set.weight), ("web-2024", 1.0));
        assert_eq!(parsed("=2:/data/code").name, "code");
        assert_eq!(parsed("a=b").path, Path::new("a=b"));
        for (text, reason) in
            [("web=much:DIR", "`much` is no weight"), ("web=-1:DIR", "must not be negative")]
        {
            let error = text.parse::<WeightedPath>().unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
