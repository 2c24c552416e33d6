//! What a new run is made from: settings, a model or another one's weights, and data.

use std::path::{Path, PathBuf};

#[cfg(feature = "images")]
mod pages;

use tokenizers::Tokenizer;
use yuan_data::{
    DataError, Dataset, Document, NoProgress, PrepareOptions, Progress, Split, prepare,
    prepare_documents, tokenizer, tokenizer::END_OF_DOCUMENT,
};
use yuan_model::YuanConfig;

use crate::{
    ModelDirectory, TrainConfig, TrainError,
    data::{DataSet, DataSets, WeightedPath},
    names::{CHAT_TEMPLATE, OPTIONS, TOKENIZER},
};

/// What a new run is made from.
pub struct NewRun<'a> {
    pub(super) config: TrainConfig,
    pub(super) start: Start,
    pub(super) data: RunData,
    /// Name and text.
    pub(super) files: Vec<(&'static str, String)>,
    pub(super) isolate_documents: bool,
    progress: &'a dyn Progress,
}

/// What a run learns.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RunData {
    /// Texts in memory; about a twentieth of them validates.
    Documents(Vec<Document>),
    /// Files and directories of text, which become tokens in the run.
    Text(Vec<PathBuf>),
    /// Data sets that were prepared before ([`yuan_data::prepare`]), mixed by weight; they stay
    /// where they are.
    Prepared(Vec<WeightedPath>),
    /// Prompts that the model is to answer itself, as files which the run keeps by their names:
    /// [`Run::trainer_with`](crate::Run::trainer_with) is given what makes rows of them.
    Prompts(Vec<(String, Vec<u8>)>),
    /// Conversations, of which the answers are learnt.
    #[cfg(feature = "chat")]
    Conversations(crate::data::ChatFiles),
    /// Questions about images, of which the answers are learnt.
    #[cfg(feature = "images")]
    Pages(crate::data::PageFiles),
}

#[cfg(feature = "images")]
impl From<crate::data::PageFiles> for RunData {
    fn from(files: crate::data::PageFiles) -> Self {
        Self::Pages(files)
    }
}

#[cfg(feature = "chat")]
impl From<crate::data::ChatFiles> for RunData {
    fn from(files: crate::data::ChatFiles) -> Self {
        Self::Conversations(files)
    }
}

impl From<Vec<Document>> for RunData {
    fn from(documents: Vec<Document>) -> Self {
        Self::Documents(documents)
    }
}

/// What the model starts as.
#[derive(Debug)]
pub(super) enum Start {
    /// Fresh weights, and the tokenizer of the data or one that is trained on it; its vocabulary
    /// and its end-of-document token go into the configuration.
    Fresh(Box<YuanConfig>),
    /// Weights and tokenizer of another model.
    From(ModelDirectory),
}

/// Share of the documents that validates.
const VALIDATION: f64 = 0.05;

impl<'a> NewRun<'a> {
    /// A model with fresh weights. Of texts, a tokenizer of up to `model.vocab_size` entries is
    /// trained; prepared data sets bring theirs.
    pub fn new(config: TrainConfig, model: YuanConfig, data: impl Into<RunData>) -> Self {
        Self::with_start(config, Start::Fresh(Box::new(model)), data.into())
    }

    /// Weights and tokenizer of another model: a run, one of its checkpoints, or published weights.
    pub fn from_model(
        config: TrainConfig,
        model: ModelDirectory,
        data: impl Into<RunData>,
    ) -> Self {
        Self::with_start(config, Start::From(model), data.into())
    }

    fn with_start(config: TrainConfig, start: Start, data: RunData) -> Self {
        Self {
            config,
            start,
            data,
            files: Vec::new(),
            isolate_documents: false,
            progress: &NoProgress,
        }
    }

    /// Keeps the options that a program was started with as `options.toml` in the run.
    #[must_use]
    pub fn with_options_file(self, text: String) -> Self {
        self.with_file(OPTIONS, text)
    }

    /// Keeps a file in the run, such as a chat template.
    pub(crate) fn with_file(mut self, name: &'static str, text: String) -> Self {
        self.files.push((name, text));
        self
    }

    /// The model talks by this template, in place of its own if it has one.
    #[must_use]
    pub fn with_chat_template(self, template: String) -> Self {
        self.with_file(CHAT_TEMPLATE, template)
    }

    /// Keeps attention inside a document or conversation, whatever the model did before.
    #[must_use]
    pub fn with_isolated_documents(self) -> Self {
        Self { isolate_documents: true, ..self }
    }

    /// Is told how far texts are on their way to tokens.
    #[must_use]
    pub fn with_progress(self, progress: &'a dyn Progress) -> Self {
        Self { progress, ..self }
    }

    pub(super) fn model(&self) -> &YuanConfig {
        match &self.start {
            Start::Fresh(model) => model,
            Start::From(directory) => directory.config(),
        }
    }

    /// Whether its data are questions about images.
    pub(super) fn has_images(&self) -> bool {
        #[cfg(feature = "images")]
        let has_images = matches!(self.data, RunData::Pages(_));
        #[cfg(not(feature = "images"))]
        let has_images = false;
        has_images
    }

    /// The model with what the tokenizer says of it.
    pub(super) fn model_with(
        &self,
        tokenizer: &Tokenizer,
        eod: u32,
    ) -> Result<YuanConfig, TrainError> {
        let (mut model, entries) = (self.model().clone(), tokenizer.get_vocab_size(true));
        match &self.start {
            Start::Fresh(_) => {
                model.vocab_size = entries;
                #[cfg(feature = "images")]
                if matches!(self.data, RunData::Pages(_)) {
                    pages::set_tokens(&mut model, tokenizer);
                }
            }
            Start::From(_) if model.vocab_size < entries => {
                return Err(TrainError::Vocabulary { entries, rows: model.vocab_size });
            }
            Start::From(_) => {
                if let Some(other) = model.tokens.eod.filter(|&other| other != eod) {
                    return Err(TrainError::EndOfDocument { model: other, tokenizer: eod });
                }
            }
        }
        #[cfg(feature = "images")]
        if let (RunData::Pages(files), Some(images)) = (&self.data, &mut model.images) {
            images.positions = Some(files.positions);
        }
        model.tokens.eod = Some(eod);
        model.isolate_documents |= self.isolate_documents;
        model.validate()?;
        Ok(model)
    }

    /// Makes tokens of the data where they are not made yet, below `run_dir`.
    pub(super) fn prepare(&mut self, run_dir: &Path) -> Result<PreparedData, TrainError> {
        let own = run_dir.join(DataSets::DIRECTORY);
        let of_model = match &self.start {
            Start::Fresh(_) => None,
            Start::From(model) => {
                let path = model.tokenizer_directory().join(TOKENIZER);
                let tokenizer = tokenizer::read(&path)?;
                let eod = model.config().tokens.eod.and_then(|eod| tokenizer.id_to_token(eod));
                let eod = eod.unwrap_or_else(|| END_OF_DOCUMENT.to_owned());
                Some(OfModel { path, tokenizer, eod })
            }
        };
        let vocab_size = self.model().vocab_size;
        match &mut self.data {
            RunData::Documents(documents) => {
                let documents = std::mem::take(documents);
                let (tokenizer, eod) = match of_model {
                    Some(OfModel { tokenizer, eod, .. }) => (tokenizer, eod),
                    None => (train_on(&documents, vocab_size)?, END_OF_DOCUMENT.to_owned()),
                };
                let dataset = prepare_documents(&own, documents, &tokenizer, &eod, VALIDATION)?;
                PreparedData::in_run(&dataset)
            }
            RunData::Text(paths) => {
                let paths = paths.clone();
                let options = match of_model {
                    Some(OfModel { path, eod, .. }) => PrepareOptions {
                        end_of_document: eod,
                        ..PrepareOptions::with_tokenizer(paths, path)
                    },
                    None => PrepareOptions::train_tokenizer(paths, vocab_size),
                };
                PreparedData::in_run(&prepare(&own, &options, self.progress)?)
            }
            RunData::Prepared(paths) => mixed(paths, of_model.as_ref()),
            RunData::Prompts(files) => {
                let Some(OfModel { path, tokenizer, eod }) = of_model else {
                    let reason = "learning from rewards needs a model that was trained before";
                    return Err(DataError::Setting(reason.into()).into());
                };
                let eod = tokenizer::Encoder::new(&tokenizer, &eod)?.eod();
                let sets = DataSets { sets: vec![DataSet::prompts(run_dir, files)?] };
                Ok(PreparedData { sets, tokenizer, tokenizer_file: path, eod })
            }
            #[cfg(feature = "chat")]
            RunData::Conversations(files) => {
                conversations(run_dir, files, of_model, self.config.seq_len)
            }
            #[cfg(feature = "images")]
            RunData::Pages(files) => {
                let model = match &self.start {
                    Start::Fresh(model) => model,
                    Start::From(directory) => directory.config(),
                };
                let isolates = self.isolate_documents || model.isolate_documents;
                pages::prepare(run_dir, files, model, isolates, of_model, self.config.seq_len)
            }
        }
    }
}

/// The tokenizer of a model that was trained before.
struct OfModel {
    path: PathBuf,
    tokenizer: Tokenizer,
    /// What ends its documents.
    eod: String,
}

/// What a run remembers of its data, and what its model must know of the tokens.
pub(super) struct PreparedData {
    pub sets: DataSets,
    pub tokenizer: Tokenizer,
    /// Its file, which a fresh model gets as it is.
    pub tokenizer_file: PathBuf,
    pub eod: u32,
}

impl PreparedData {
    /// A data set in the run itself.
    fn in_run(dataset: &Dataset) -> Result<Self, TrainError> {
        let path = DataSets::DIRECTORY.into();
        let set = DataSet::of_dataset("text".into(), 1.0, path, dataset);
        Self::of(DataSets { sets: vec![set] }, dataset)
    }

    /// Data sets that were prepared as one of them was.
    fn of(sets: DataSets, dataset: &Dataset) -> Result<Self, TrainError> {
        Ok(Self {
            sets,
            tokenizer: dataset.tokenizer()?,
            tokenizer_file: dataset.directory().join(Dataset::TOKENIZER),
            eod: dataset.info().eod,
        })
    }
}

/// A tokenizer of what is trained on.
fn train_on(documents: &[Document], vocab_size: usize) -> Result<Tokenizer, TrainError> {
    let trains = |document: &&Document| Split::of(&document.name, VALIDATION) == Split::Train;
    let text = |document: &Document| document.text.clone();
    let any = documents.iter().any(|document| trains(&document));
    let texts: Box<dyn Iterator<Item = String> + Send> = match any {
        true => Box::new(documents.iter().filter(trains).map(text)),
        false => Box::new(documents.iter().map(text)),
    };
    Ok(tokenizer::train(texts, vocab_size, false)?)
}

/// Prepared data sets, which must all have been made by one tokenizer: the model's, if it has one.
fn mixed(paths: &[WeightedPath], of_model: Option<&OfModel>) -> Result<PreparedData, TrainError> {
    let mut sets = Vec::with_capacity(paths.len());
    let mut first: Option<Dataset> = None;
    for WeightedPath { name, weight, path } in paths {
        let path = path.canonicalize().map_err(TrainError::io("read", path))?;
        let dataset = Dataset::open(&path)?;
        if let Some(other) = &first
            && (&other.info().tokenizer, other.info().eod)
                != (&dataset.info().tokenizer, dataset.info().eod)
        {
            let (one, other) = (other.directory().display(), path.display());
            let reason = format!(
                "{one} and {other} were prepared with different tokenizers, or other ends of \
                 documents"
            );
            return Err(DataError::Setting(reason).into());
        }
        sets.push(DataSet::of_dataset(name.clone(), *weight, path, &dataset));
        first.get_or_insert(dataset);
    }
    let Some(dataset) = first else {
        return Err(DataError::Setting("there is no data set to train on".into()).into());
    };
    if let Some(OfModel { path, .. }) = of_model {
        let read = |path: &Path| std::fs::read(path).map_err(TrainError::io("read", path));
        if read(path)? != read(&dataset.directory().join(Dataset::TOKENIZER))? {
            let reason = format!(
                "{} was not prepared with the model's tokenizer: prepare it with --tokenizer {}",
                dataset.directory().display(),
                path.display()
            );
            return Err(DataError::Setting(reason).into());
        }
    }
    PreparedData::of(DataSets { sets }, &dataset)
}

/// Conversations through the template of the run.
#[cfg(feature = "chat")]
fn conversations(
    run_dir: &Path,
    files: &crate::data::ChatFiles,
    of_model: Option<OfModel>,
    seq_len: usize,
) -> Result<PreparedData, TrainError> {
    let Some(OfModel { tokenizer, eod, .. }) = of_model else {
        let reason = "conversations need a model that was trained before, and its tokenizer";
        return Err(DataError::Setting(reason.into()).into());
    };
    let in_run = yuan_model::text::Tokenizer::load(run_dir)
        .map_err(|error| DataError::Tokenizer(error.to_string()))?;
    let eod = tokenizer::Encoder::new(&tokenizer, &eod)?.eod();
    let sets = crate::data::Conversations::write(run_dir, files, &in_run, eod, seq_len)?;
    Ok(PreparedData { sets, tokenizer, tokenizer_file: run_dir.join(TOKENIZER), eod })
}
