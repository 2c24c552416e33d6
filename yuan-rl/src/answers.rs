//! Prompts to answers, over ranks as on one device.

use std::{ops::ControlFlow, time::Instant};

use serde::{Deserialize, Serialize};
use yuan_laep::LayerLoad;
use yuan_model::{GenerationOptions, YuanModel, generate::FinishReason, ranks::Ranks};
use yuan_train::TrainError;

use crate::{
    PromptTokenizer, Question, RepetitionLimits, Response, Reward, RlConfig, Task, TaskError,
    repeats,
};

/// An answer to a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub tokens: Vec<u32>,
    /// Whether the model ended it itself.
    pub is_complete: bool,
}

/// The answers to one prompt, and what they are worth.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Group {
    pub prompt: Vec<u32>,
    pub answers: Vec<Answer>,
    pub rewards: Vec<Reward>,
}

/// The answers to a batch of prompts.
#[derive(Debug)]
pub(crate) struct Answered {
    pub groups: Vec<Group>,
    /// Per layer, of all ranks.
    pub layers: Vec<LayerLoad>,
    pub seconds: f64,
}

/// How a batch of prompts is answered.
pub(crate) struct Request<'a> {
    pub tokenizer: &'a PromptTokenizer,
    pub answers: usize,
    pub options: GenerationOptions,
    pub repetition: Option<RepetitionLimits>,
    /// Answers at the same time.
    pub at_once: usize,
    /// Tokens that a prompt and its answer may have.
    pub row_len: usize,
}

impl<'a> Request<'a> {
    /// As the settings of a run say, with a seed for this batch.
    pub fn of(
        config: &RlConfig,
        tokenizer: &'a PromptTokenizer,
        row_len: usize,
        seed: u64,
    ) -> Self {
        Self {
            tokenizer,
            answers: config.answers,
            options: config.generation(tokenizer.stop_tokens().to_vec(), seed),
            repetition: config.repetition,
            at_once: config.at_once,
            row_len,
        }
    }

    /// Answers all questions and rewards the answers. Over ranks, all of them call this together:
    /// each answers its part of the prompts and rewards its answers, and all get all of them.
    pub fn answer(
        &self,
        model: &YuanModel,
        task: &dyn Task,
        questions: &[Question],
    ) -> Result<Answered, TrainError> {
        let started = Instant::now();
        let world = model.ranks().map(Ranks::world);
        let (size, rank) = world.map_or((1, 0), |world| (world.size(), world.rank()));
        // As many for every rank, which take all steps together: some may be answered twice.
        let of_rank = questions.len().div_ceil(size);
        let first = of_rank * rank;
        let own: Vec<&Question> =
            (first..first + of_rank).map(|at| &questions[at.min(questions.len() - 1)]).collect();
        let (own, loads) = self.own_groups(model, task, &own, first)?;
        let (mut groups, mut layers) = (Vec::with_capacity(questions.len()), Vec::new());
        match world {
            None => {
                groups = own;
                layers = loads.into_iter().map(LayerLoad::new).collect();
            }
            Some(world) => {
                let own = serde_json::to_vec(&own).expect("tokens and numbers are plain data");
                for bytes in world.gather(&own)? {
                    let of_rank: Vec<Group> = serde_json::from_slice(&bytes).map_err(|error| {
                        TrainError::Device(format!("answers of a rank: {error}"))
                    })?;
                    groups.extend(of_rank);
                }
                groups.truncate(questions.len());
                for load in loads {
                    layers.push(LayerLoad::new(world.sum_counts(&load)?));
                }
            }
        }
        Ok(Answered { groups, layers, seconds: started.elapsed().as_secs_f64() })
    }

    /// The tokens of a prompt.
    ///
    /// # Errors
    ///
    /// If it is too long for a row with an answer.
    pub fn prompt(&self, question: &Question) -> Result<Vec<u32>, TrainError> {
        let prompt = self.tokenizer.prompt(&question.prompt)?;
        let room = self.row_len.saturating_sub(self.options.max_new_tokens);
        if prompt.is_empty() || prompt.len() > room {
            return Err(TrainError::OutOfRange {
                name: "tokens of a prompt",
                value: prompt.len() as f64,
                expected: format!(
                    "must be from 1 to {room}, so that answers of {} tokens fit a row of {}: `{}`",
                    self.options.max_new_tokens,
                    self.row_len,
                    shortened(&question.prompt)
                ),
            });
        }
        Ok(prompt)
    }

    /// Answers to some questions, of which the first one is number `first` of all, and the tokens
    /// that each expert of each layer received.
    fn own_groups(
        &self,
        model: &YuanModel,
        task: &dyn Task,
        questions: &[&Question],
        first: usize,
    ) -> Result<(Vec<Group>, Vec<Vec<u64>>), TrainError> {
        let mut groups = Vec::with_capacity(questions.len());
        let mut loads: Vec<Vec<u64>> = Vec::new();
        let at_once = (self.at_once / self.answers.max(1)).max(1);
        for (part, questions) in questions.chunks(at_once).enumerate() {
            // An answer is drawn alike whatever else is drawn with it.
            let seed = self.options.seed_of((first + part * at_once) * self.answers);
            let options = GenerationOptions { seed, ..self.options.clone() };
            let prompts = questions
                .iter()
                .map(|question| self.prompt(question))
                .collect::<Result<Vec<_>, TrainError>>()?;
            let rollout = model
                .rollout(&prompts, self.answers, &options, |_, tokens| self.goes_on(tokens))?;
            match loads.is_empty() {
                true => loads = rollout.tokens_per_expert,
                false => {
                    let more = rollout.tokens_per_expert.iter().flatten();
                    loads.iter_mut().flatten().zip(more).for_each(|(sum, more)| *sum += more);
                }
            }
            let mut answers = rollout.answers.into_iter().map(|answer| Answer {
                is_complete: answer.finish == FinishReason::Stop,
                tokens: answer.tokens,
            });
            for (question, prompt) in questions.iter().zip(prompts) {
                let answers: Vec<Answer> = answers.by_ref().take(self.answers).collect();
                let rewards = self.rewards(task, question, &prompt, &answers)?;
                groups.push(Group { prompt, answers, rewards });
            }
        }
        Ok((groups, loads))
    }

    fn rewards(
        &self,
        task: &dyn Task,
        question: &Question,
        prompt: &[u32],
        answers: &[Answer],
    ) -> Result<Vec<Reward>, TrainError> {
        let failed = |cause: TaskError| TrainError::Callback { name: "rollouts", cause };
        let mut texts = Vec::with_capacity(answers.len());
        for answer in answers {
            texts.push(self.tokenizer.answer(prompt, &answer.tokens)?);
        }
        let responses: Vec<Response<'_>> = texts
            .iter()
            .zip(answers)
            .map(|(text, Answer { tokens, is_complete })| Response {
                text,
                tokens,
                is_complete: *is_complete,
            })
            .collect();
        let rewards = task.rewards(question, &responses).map_err(failed)?;
        let (found, expected) = (rewards.len(), responses.len());
        if found != expected {
            return Err(failed(
                format!("the task gave {found} rewards for {expected} answers").into(),
            ));
        }
        let is_number = |reward: &Reward| {
            reward.value.is_finite() && reward.parts.values().all(|part| part.is_finite())
        };
        match rewards.iter().find(|reward| !is_number(reward)) {
            Some(bad) => Err(failed(
                format!("the task rewarded an answer with {}, {:?}", bad.value, bad.parts).into(),
            )),
            None => Ok(rewards),
        }
    }

    /// Ends an answer that only repeats itself.
    fn goes_on(&self, tokens: &[u32]) -> ControlFlow<()> {
        match self.repetition {
            Some(limits)
                if tokens.len().is_multiple_of(limits.every) && repeats(tokens, limits) =>
            {
                ControlFlow::Break(())
            }
            _ => ControlFlow::Continue(()),
        }
    }
}

/// The beginning of a text, for a message.
fn shortened(text: &str) -> String {
    const MOST: usize = 60;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
