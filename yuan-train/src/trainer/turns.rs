//! The loop of a run: steps, the callbacks around them, validations, checkpoints and ways back.

use std::{collections::BTreeMap, thread};

use super::{NotFinite, StepOutcome, Trainer, Validated};
use crate::{
    AdamW, Callback, Checkpoint, CheckpointState, Context, Event, LanguageModel, TrainError,
    callback::context::Requests, checkpoint::join, run::lock::RunLock, session::Session,
};

impl<M: LanguageModel> Trainer<M> {
    /// Trains to the end: steps, callbacks after each, and a last validation and checkpoint.
    ///
    /// # Errors
    ///
    /// The first error of a step, a callback, a validation or a checkpoint ends the run.
    pub fn run(&mut self) -> Result<(), TrainError> {
        // Whatever cannot be written where nothing is any more says less than that.
        let ended = self.run_on();
        let is_of_all = |error: &TrainError| {
            matches!(
                error,
                TrainError::NotFinite { .. }
                    | TrainError::NeverFinite { .. }
                    | TrainError::RewardedAlike { .. }
            )
        };
        if let Err(error) = &ended
            && (self.ranks().is_none() || is_of_all(error))
        {
            // What ended the run did not end the writing of a step before it.
            drop(self.finish_checkpoint());
        }
        let ends: Vec<Result<(), TrainError>> =
            self.callbacks.iter_mut().map(|callback| callback.on_end()).collect();
        let finished = ends.into_iter().collect::<Result<(), TrainError>>();
        ended.map_err(|error| self.check_lock().err().unwrap_or(error)).and(finished)
    }

    fn check_lock(&self) -> Result<(), TrainError> {
        self.lock.as_ref().map_or(Ok(()), RunLock::check)
    }

    fn run_on(&mut self) -> Result<(), TrainError> {
        let mut requests = Requests::default();
        self.call(&mut requests, |callback, context| callback.on_start(context))?;
        if requests.discard_snapshot {
            self.discard_snapshot()?;
        }
        let summary = self.session.model().summary();
        self.tell(&Event::Start {
            step: self.step,
            steps: self.config.steps,
            parameters: summary.parameters,
            experts_per_layer: summary.experts_per_layer,
        })?;
        for change in std::mem::take(&mut self.changes) {
            self.tell(&change)?;
        }
        if self.config.async_checkpoint {
            Checkpoint::prepare(self.session.model(), self.session.optimizer())?;
        }
        while self.step < self.config.steps && self.turn()? {}
        self.finish_checkpoint()?;
        match self.ranks() {
            // Nobody leaves while the first rank writes.
            Some(ranks) => Ok(ranks.world().barrier()?),
            None => Ok(()),
        }
    }

    /// One step with everything around it; whether the run goes on.
    fn turn(&mut self) -> Result<bool, TrainError> {
        // Hours of training that nobody could find again would be lost.
        self.check_lock()?;
        let taken = self.train_step();
        for event in self.train.take_events() {
            self.tell(&event)?;
        }
        if let Err(TrainError::RewardedAlike { .. }) = taken {
            // What was learnt is kept, and the next prompts are others.
            self.save_checkpoint(true)?;
        }
        let metrics = match taken? {
            StepOutcome::Taken(metrics) => metrics,
            StepOutcome::NotFinite(found) => {
                self.skip(found)?;
                return Ok(true);
            }
        };
        self.skipped_in_a_row = 0;
        let is_writing = self.writing.as_ref().is_some_and(|writing| !writing.is_done());
        let mut requests = Requests { is_writing, ..Requests::default() };
        self.tell(&Event::Step(metrics.clone()))?;
        self.call(&mut requests, |callback, context| callback.on_step(context, &metrics))?;
        if self.writing.is_some() && !requests.is_writing {
            self.finish_checkpoint()?;
        }
        let is_last = self.step == self.config.steps;
        if (requests.validate || requests.stop || is_last) && !self.validation.is_empty() {
            let Validated { loss, sets } = self.validate_sets()?;
            if !loss.is_finite() {
                let (step, what) = (self.step, "validation loss");
                return match self.go_back()? {
                    true => Ok(true),
                    false => Err(TrainError::NotFinite { step, what, value: loss }),
                };
            }
            self.tell(&Event::Validation { step: self.step, loss, sets })?;
        }
        if requests.snapshot {
            self.finish_removing()?;
            let (model, optimizer) = (self.session.model(), self.session.optimizer());
            Checkpoint::save_snapshot(&self.run_dir, model, optimizer, &self.state())?;
            self.has_snapshot = true;
        }
        self.call(&mut requests, |callback, context| callback.on_step_end(context))?;
        if requests.roll_back {
            self.roll_back()?;
            return Ok(true);
        }
        let last = is_last || requests.stop;
        if last && requests.cut && !self.validation.is_empty() {
            // The model that is delivered is not the one that was validated.
            let Validated { loss, sets } = self.validate_sets()?;
            if !loss.is_finite() {
                let (step, what) = (self.step, "validation loss after the prune");
                return Err(TrainError::NotFinite { step, what, value: loss });
            }
            self.tell(&Event::Validation { step: self.step, loss, sets })?;
        }
        let earlier = std::mem::take(&mut self.put_off);
        requests.checkpoint |= earlier.checkpoint;
        requests.pause |= earlier.pause;
        requests.discard_snapshot |= earlier.discard_snapshot;
        if !last && !self.train.is_resumable() {
            self.put_off = requests;
            return Ok(true);
        }
        let last = last || requests.pause;
        if requests.checkpoint || last {
            // The way back must not go before what takes its place is there.
            self.save_checkpoint(last || requests.discard_snapshot)?;
        }
        if requests.discard_snapshot {
            self.discard_snapshot()?;
        }
        Ok(!last)
    }

    /// Leaves a batch out whose loss or gradient is no number: the step is taken with the next one.
    fn skip(&mut self, found: NotFinite) -> Result<(), TrainError> {
        if self.go_back()? {
            self.skipped_in_a_row = 0;
            return Ok(());
        }
        self.skipped_in_a_row += 1;
        if self.skipped_in_a_row > self.config.max_skipped {
            let (step, in_a_row) = (self.step + 1, self.skipped_in_a_row);
            let NotFinite { what, value } = found;
            return Err(TrainError::NeverFinite { step, what, value, in_a_row });
        }
        let (what, value) = (found.what.into(), found.value.to_string());
        self.tell(&Event::Skip { step: self.step, what, value })
    }

    /// Goes back to the snapshot if a callback wants to after a number that is not finite; whether
    /// it did.
    fn go_back(&mut self) -> Result<bool, TrainError> {
        let mut requests = Requests::default();
        self.call(&mut requests, |callback, context| {
            callback.on_not_finite(context);
            Ok(())
        })?;
        if requests.roll_back {
            self.roll_back()?;
        }
        Ok(requests.roll_back)
    }

    fn state(&self) -> CheckpointState {
        let mut callbacks = BTreeMap::new();
        for callback in &self.callbacks {
            if let Some(state) = callback.state() {
                callbacks.insert(callback.name().to_owned(), state);
            }
        }
        CheckpointState {
            step: self.step,
            consumed_rows: self.train.position(),
            optimizer_updates: self.session.optimizer().updates(),
            callbacks,
            settings: self.changeable_settings(),
            ..CheckpointState::default()
        }
    }

    fn discard_snapshot(&mut self) -> Result<(), TrainError> {
        self.has_snapshot = false;
        if self.is_first_rank() {
            Checkpoint::discard_snapshot(&self.run_dir)?;
        }
        Ok(())
    }

    /// Begins to write a checkpoint; if it is to be `complete`, or nothing is written beside the
    /// training, it is when this returns.
    fn save_checkpoint(&mut self, complete: bool) -> Result<(), TrainError> {
        // One at a time: what is not written yet takes memory.
        self.finish_checkpoint()?;
        let (model, optimizer, state) =
            (self.session.model(), self.session.optimizer(), self.state());
        if self.config.async_checkpoint && !complete {
            self.writing = Some(Checkpoint::begin(&self.run_dir, model, optimizer, &state)?);
            return Ok(());
        }
        Checkpoint::save(&self.run_dir, model, optimizer, &state)?;
        self.tell_of_checkpoint(self.step)
    }

    /// Waits for the checkpoint that is being written, if one is, and for the removal of others.
    fn finish_checkpoint(&mut self) -> Result<(), TrainError> {
        self.finish_removing()?;
        let Some(writing) = self.writing.take() else { return Ok(()) };
        let step = writing.step();
        writing.finish()?;
        self.tell_of_checkpoint(step)
    }

    /// Waits for the removal of earlier checkpoints, which takes what is unfinished for left behind.
    fn finish_removing(&mut self) -> Result<(), TrainError> {
        self.removing.take().map_or(Ok(()), join)
    }

    fn tell_of_checkpoint(&mut self, step: u64) -> Result<(), TrainError> {
        self.tell(&Event::Checkpoint { step })?;
        if !self.is_first_rank() {
            return Ok(());
        }
        let (run_dir, keep) = (self.run_dir.clone(), self.config.keep_checkpoints);
        if self.config.async_checkpoint {
            // Gigabytes are not gone at once, and nobody waits for that.
            self.removing = Some(thread::spawn(move || Checkpoint::keep_latest(&run_dir, keep)));
            return Ok(());
        }
        Checkpoint::keep_latest(&run_dir, keep)
    }

    /// Goes back to the snapshot: model, optimizer, step (and with it the learning rate), data and
    /// callbacks.
    ///
    /// The checkpoints of the branch that is left go only when one of the branch that is taken is
    /// complete: killed before that, the run resumes on the old branch, takes the same steps and
    /// decides the same again.
    fn roll_back(&mut self) -> Result<(), TrainError> {
        self.finish_checkpoint()?;
        // Its moments need not be in memory beside those of the snapshot.
        self.session.set_optimizer(AdamW::new(&self.config.optimizer));
        let snapshot = Checkpoint::snapshot(&self.run_dir);
        let ranks = self.ranks().cloned();
        let (model, optimizer, state) =
            snapshot.load_at::<M>(&self.config.optimizer, &self.device, ranks.as_ref())?;
        let left = self.step;
        self.session = Session::new(model, optimizer);
        let mut states = self.take_up(state);
        self.learns = self.config.learns;
        for callback in &mut self.callbacks {
            callback.roll_back(states.remove(callback.name()))?;
        }
        let mut requests = Requests::default();
        self.call(&mut requests, |callback, context| callback.on_rolled_back(context))?;
        self.tell(&Event::RollBack { step: left, to_step: self.step })?;
        let (model, optimizer) = (self.session.model(), self.session.optimizer());
        Checkpoint::save(&self.run_dir, model, optimizer, &self.state())?;
        self.tell(&Event::Checkpoint { step: self.step })?;
        if self.is_first_rank() {
            Checkpoint::remove_after(&self.run_dir, self.step)?;
            Checkpoint::keep_latest(&self.run_dir, self.config.keep_checkpoints)?;
        }
        self.discard_snapshot()
    }

    /// Calls every callback, then tells all of them what any of them emitted.
    fn call(
        &mut self,
        requests: &mut Requests,
        mut hook: impl FnMut(&mut dyn Callback<M>, &mut Context<'_, M>) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let mut events = Vec::new();
        let ranks = self.ranks().cloned();
        for callback in &mut self.callbacks {
            let mut context = Context {
                step: self.step,
                config: &self.config,
                run_dir: &self.run_dir,
                session: &mut self.session,
                requests,
                events: &mut events,
                learns: &mut self.learns,
                has_snapshot: self.has_snapshot,
                ranks: ranks.as_ref(),
            };
            hook(callback.as_mut(), &mut context)?;
        }
        if let Some(ranks) = &ranks {
            *requests = requests.of_all(ranks)?;
        }
        events.iter().try_for_each(|event| self.tell(event))
    }

    fn tell(&mut self, event: &Event) -> Result<(), TrainError> {
        self.callbacks.iter_mut().try_for_each(|callback| callback.on_event(event))
    }
}
