//! What a callback sees of a run, and the narrow way to change it.

use std::path::Path;

use burn::module::Module;
use yuan_model::{
    RefusedCut, Selection,
    ranks::{RankError, Ranks},
};

use crate::{AdamW, Event, Learns, TrainConfig, TrainError, session::Session};

/// What a callback asks of the loop once all callbacks have seen the step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Requests {
    pub(crate) validate: bool,
    pub(crate) checkpoint: bool,
    pub(crate) stop: bool,
    pub(crate) pause: bool,
    /// The model was cut after the validation of the step.
    pub(crate) cut: bool,
    pub(crate) snapshot: bool,
    pub(crate) discard_snapshot: bool,
    pub(crate) roll_back: bool,
    /// A checkpoint is still being written.
    pub(crate) is_writing: bool,
}

/// What a callback sees of a run, and the narrow way to change it.
pub struct Context<'a, M> {
    pub(crate) step: u64,
    pub(crate) config: &'a TrainConfig,
    pub(crate) run_dir: &'a Path,
    pub(crate) session: &'a mut Session<M>,
    pub(crate) requests: &'a mut Requests,
    pub(crate) events: &'a mut Vec<Event>,
    pub(crate) learns: &'a mut Learns,
    pub(crate) has_snapshot: bool,
    pub(crate) ranks: Option<&'a Ranks>,
}

impl Requests {
    /// What any rank asks for, all do.
    pub(crate) fn of_all(self, ranks: &Ranks) -> Result<Self, RankError> {
        let Self { validate, checkpoint, stop, pause, cut, snapshot, .. } = self;
        let Self { discard_snapshot, roll_back, is_writing, .. } = self;
        let own = [
            validate,
            checkpoint,
            stop,
            pause,
            cut,
            snapshot,
            discard_snapshot,
            roll_back,
            is_writing,
        ];
        let counts = ranks.world().sum_counts(&own.map(u64::from))?;
        let any = |index: usize| counts[index] > 0;
        Ok(Self {
            validate: any(0),
            checkpoint: any(1),
            stop: any(2),
            pause: any(3),
            cut: any(4),
            snapshot: any(5),
            discard_snapshot: any(6),
            roll_back: any(7),
            is_writing: any(8),
        })
    }
}

impl<M> Context<'_, M> {
    /// Steps completed.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Settings of the run.
    pub fn config(&self) -> &TrainConfig {
        self.config
    }

    /// Directory of the run.
    pub fn run_dir(&self) -> &Path {
        self.run_dir
    }

    /// Whether this rank writes the files of the run; where a run is not spread over ranks, it does.
    pub fn is_first_rank(&self) -> bool {
        self.ranks.is_none_or(|ranks| ranks.world().is_first())
    }

    /// Ranks that share the experts of a layer.
    pub(crate) fn sharing(&self) -> usize {
        self.ranks.map_or(1, Ranks::expert)
    }

    /// Checks that all ranks have the same bytes, such as a decision that each of them made.
    ///
    /// # Errors
    ///
    /// Names a rank that has others.
    pub fn agree(&self, what: &'static str, own: &[u8]) -> Result<(), TrainError> {
        match self.ranks {
            Some(ranks) => Ok(ranks.world().agree(what, own)?),
            None => Ok(()),
        }
    }

    /// The model as it is now.
    pub fn model(&self) -> &M {
        self.session.model()
    }

    /// The optimizer as it is now.
    pub fn optimizer(&self) -> &AdamW {
        self.session.optimizer()
    }

    /// Cuts the model, and with it, by the selections that `cut` returns, the optimizer's moments;
    /// returns the bytes that went from one device to another.
    ///
    /// # Errors
    ///
    /// `cut` gives the model back unchanged when it refuses; the run is then as before.
    pub fn cut(
        &mut self,
        cut: impl FnOnce(M) -> Result<(M, Vec<Selection>), RefusedCut<M>>,
    ) -> Result<u64, TrainError>
    where
        M: Module,
    {
        self.requests.cut = true;
        self.session.cut(cut)
    }

    /// Replaces the model's values; its parameters must keep their ids and shapes.
    pub fn update(&mut self, update: impl FnOnce(M) -> M) {
        self.session.update(update);
    }

    /// Chooses what learns from the next step on. A run that is resumed starts with what its settings
    /// say, so a callback chooses again in [`on_start`](crate::Callback::on_start).
    pub fn learn(&mut self, learns: Learns) {
        *self.learns = learns;
    }

    /// Asks for the whole state of the run to be kept aside, before [`Callback::on_step_end`]
    /// changes it.
    pub(crate) fn request_snapshot(&mut self) {
        self.requests.snapshot = true;
    }

    /// Whether there is a state to go back to.
    pub(crate) fn has_snapshot(&self) -> bool {
        self.has_snapshot
    }

    /// Says that the run need not go back any more.
    pub(crate) fn discard_snapshot(&mut self) {
        self.requests.discard_snapshot = true;
    }

    /// Asks for the run to go back to its snapshot after this step.
    pub(crate) fn request_roll_back(&mut self) {
        self.requests.roll_back = true;
    }

    /// Asks for a validation after this step; heard in [`on_step`](crate::Callback::on_step) only.
    pub fn request_validation(&mut self) {
        self.requests.validate = true;
    }

    /// Asks for a checkpoint after this step; heard in `on_step` and `on_step_end`.
    pub fn request_checkpoint(&mut self) {
        self.requests.checkpoint = true;
    }

    /// Asks for the run to end after this step, with a last validation and checkpoint; heard in
    /// [`on_step`](crate::Callback::on_step) only, and not if the run goes back after this step.
    pub fn request_stop(&mut self) {
        self.requests.stop = true;
    }

    /// Asks for the run to be interrupted after this step, with a checkpoint to go on from and no
    /// validation; heard in `on_step` and `on_step_end`.
    pub fn request_pause(&mut self) {
        self.requests.pause = true;
    }

    /// Whether a callback asked for the run to end after this step.
    pub(crate) fn ends(&self) -> bool {
        self.requests.stop
    }

    /// Tells every callback what happened.
    pub fn emit(&mut self, event: Event) {
        self.events.push(event);
    }
}
