//! What a new run is made from: settings, a model or another one's weights, and documents.

use yuan_model::{DeviceMesh, YuanConfig};

use crate::{
    ModelDirectory, TrainConfig, TrainError,
    data::{self, Document, Tokenizer},
    names::{OPTIONS, TOKENIZER},
};

/// What a new run is made from.
#[derive(Debug)]
pub struct NewRun {
    pub(super) config: TrainConfig,
    pub(super) start: Start,
    pub(super) documents: Vec<Document>,
    pub(super) speed_on: Option<DeviceMesh>,
    /// Name and text.
    pub(super) files: Vec<(&'static str, String)>,
    show_progress: bool,
}

/// What the model starts as.
#[derive(Debug)]
pub(super) enum Start {
    /// Fresh weights, and a tokenizer that is trained on the documents; its vocabulary and its
    /// end-of-document token go into the configuration.
    Fresh(Box<YuanConfig>),
    /// Weights and tokenizer of another model.
    From(ModelDirectory),
}

impl NewRun {
    /// A model with fresh weights and a tokenizer of up to `model.vocab_size` entries, trained on
    /// the documents.
    pub fn new(config: TrainConfig, model: YuanConfig, documents: Vec<Document>) -> Self {
        Self::with_start(config, Start::Fresh(Box::new(model)), documents)
    }

    /// Weights and tokenizer of another model: a run, one of its checkpoints, or published weights.
    pub fn from_model(
        config: TrainConfig,
        model: ModelDirectory,
        documents: Vec<Document>,
    ) -> Self {
        Self::with_start(config, Start::From(model), documents)
    }

    fn with_start(config: TrainConfig, start: Start, documents: Vec<Document>) -> Self {
        Self { config, start, documents, speed_on: None, files: Vec::new(), show_progress: false }
    }

    /// Measures these devices, so that every prune comes with a prediction of the speed after it.
    #[must_use]
    pub fn with_speed_prediction(self, mesh: DeviceMesh) -> Self {
        Self { speed_on: Some(mesh), ..self }
    }

    /// Keeps the options that a program was started with as `options.toml` in the run.
    #[must_use]
    pub fn with_options_file(mut self, text: String) -> Self {
        self.files.push((OPTIONS, text));
        self
    }

    /// Shows a progress bar while the tokenizer is trained.
    #[must_use]
    pub fn with_progress(self, show: bool) -> Self {
        Self { show_progress: show, ..self }
    }

    pub(super) fn model(&self) -> &YuanConfig {
        match &self.start {
            Start::Fresh(model) => model,
            Start::From(directory) => directory.config(),
        }
    }

    /// The model with what the tokenizer says of it.
    pub(super) fn model_with(
        &self,
        tokenizer: &Tokenizer,
        eod: u32,
    ) -> Result<YuanConfig, TrainError> {
        let (mut model, entries) = (self.model().clone(), tokenizer.get_vocab_size(true));
        match &self.start {
            Start::Fresh(_) => model.vocab_size = entries,
            Start::From(_) if model.vocab_size < entries => {
                return Err(TrainError::Vocabulary { entries, rows: model.vocab_size });
            }
            Start::From(_) => {
                if let Some(other) = model.tokens.eod.filter(|&other| other != eod) {
                    return Err(TrainError::EndOfDocument { model: other, tokenizer: eod });
                }
            }
        }
        model.tokens.eod = Some(eod);
        model.validate()?;
        Ok(model)
    }

    pub(super) fn tokenizer(&self) -> Result<Tokenizer, TrainError> {
        match &self.start {
            Start::Fresh(model) => {
                data::train_tokenizer(&self.documents, model.vocab_size, self.show_progress)
            }
            Start::From(directory) => {
                data::read_tokenizer(&directory.tokenizer_directory().join(TOKENIZER))
            }
        }
    }
}
