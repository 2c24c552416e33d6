//! How a model does on prompts that it does not learn from.

use std::sync::Arc;

use yuan_model::YuanModel;
use yuan_train::{Callback, Context, Event, StepMetrics, TrainError};

use crate::{
    PromptTokenizer, Question, RlConfig, Task,
    answers::{Answered, Request},
    rollouts::metrics_of,
};

/// Measures a model on the [held-out prompts](Task::held_out) of a task before the first step, every so
/// many steps and after the last one, with one answer to each ([`Event::Rollout`]).
pub struct HeldOut {
    task: Arc<dyn Task>,
    questions: Vec<Question>,
    tokenizer: PromptTokenizer,
    config: RlConfig,
}

impl HeldOut {
    /// Of a task with held-out prompts.
    pub fn new(task: Arc<dyn Task>, tokenizer: PromptTokenizer, config: RlConfig) -> Self {
        Self { questions: task.held_out(), task, tokenizer, config }
    }

    fn measure(&mut self, context: &mut Context<'_, YuanModel>) -> Result<(), TrainError> {
        if self.questions.is_empty() {
            return Ok(());
        }
        let (seed, row_len) = (context.config().seed, context.config().seq_len);
        // The same draws every time, so that what changes is the model.
        let request =
            Request { answers: 1, ..Request::of(&self.config, &self.tokenizer, row_len, seed) };
        let answered: Answered = request.answer(context.model(), &*self.task, &self.questions)?;
        context.emit(Event::Rollout(metrics_of(&answered, context.step(), 0, true)));
        Ok(())
    }
}

impl Callback<YuanModel> for HeldOut {
    fn name(&self) -> &'static str {
        "held_out"
    }

    fn on_start(&mut self, context: &mut Context<'_, YuanModel>) -> Result<(), TrainError> {
        match context.step() {
            0 => self.measure(context),
            _ => Ok(()),
        }
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, YuanModel>,
        _: &StepMetrics,
    ) -> Result<(), TrainError> {
        let is_due =
            self.config.measure_every.is_some_and(|every| context.step().is_multiple_of(every));
        let is_last = context.step() == context.config().steps;
        if is_due || is_last { self.measure(context) } else { Ok(()) }
    }
}
