//! What a step learns: rows of data sets, or rows that are made with the model itself.

use std::sync::Arc;

use yuan_model::Objective;

use super::{Row, RowStream, Streams};
use crate::{Event, TrainConfig, TrainError};

/// Where the rows of every step come from.
///
/// [`RowStream`] hands out those of data sets. What makes its rows with the model, as reinforcement
/// learning does with the model's own answers, implements this.
pub trait StepData<M>: Send {
    /// The rows of the step after `step` completed ones: `config.batch_size * config.accumulation`
    /// of them, of which every micro-batch holds rows of one length. Over ranks, all of them make
    /// the same rows.
    ///
    /// # Errors
    ///
    /// An error ends the run.
    fn next_rows(
        &mut self,
        model: &M,
        config: &TrainConfig,
        step: u64,
    ) -> Result<Vec<Row>, TrainError>;

    /// Whether [`next_rows`](Self::next_rows) reads the model. Over ranks, values that others have
    /// updated must then be there before it is called, and otherwise only when they are used.
    fn reads_model(&self) -> bool {
        true
    }

    /// What is minimised; none: the mean cross-entropy.
    fn objective(&self) -> Option<Arc<dyn Objective>> {
        None
    }

    /// What there is to tell of the rows that were made since this was last called.
    fn take_events(&mut self) -> Vec<Event> {
        Vec::new()
    }

    /// Whether a run that is resumed at [`position`](Self::position) goes on as this one does.
    /// Where it does not, checkpoints and interruptions are put off; the end of a run is not, and
    /// what was not learnt by then never is.
    fn is_resumable(&self) -> bool {
        true
    }

    /// Where the data are; a checkpoint keeps it.
    fn position(&self) -> u64;

    /// Goes on from a position.
    fn seek(&mut self, position: u64);
}

impl<M> StepData<M> for RowStream {
    fn next_rows(&mut self, _: &M, config: &TrainConfig, _: u64) -> Result<Vec<Row>, TrainError> {
        self.next_rows(config.batch_size * config.accumulation)
    }

    fn reads_model(&self) -> bool {
        false
    }

    fn position(&self) -> u64 {
        self.consumed()
    }

    fn seek(&mut self, position: u64) {
        self.seek(position);
    }
}

/// What a run learns from, and what it is measured on.
pub struct RunRows<M> {
    /// What it learns.
    pub train: Box<dyn StepData<M>>,
    /// Rows that are only measured on, by the name of their set, with its share; none: the run has
    /// no validation loss.
    pub validation: Vec<(String, f64, RowStream)>,
}

impl<M> RunRows<M> {
    /// Steps that are made in some other way than from data sets, without a validation loss.
    pub fn of(train: impl StepData<M> + 'static) -> Self {
        Self { train: Box::new(train), validation: Vec::new() }
    }
}

impl<M, S: Into<Streams>> From<S> for RunRows<M> {
    fn from(streams: S) -> Self {
        let Streams { train, validation } = streams.into();
        Self { train: Box::new(train), validation }
    }
}
