//! Prompts to answers, over ranks as on one device.

use std::{ops::ControlFlow, time::Instant};

use serde::{Deserialize, Serialize};
use yuan_laep::LayerLoad;
use yuan_model::{
    GenerationOptions, YuanModel,
    generate::{FinishReason, Rollout},
    text::Tokenizer,
};
use yuan_train::TrainError;

use crate::{Question, RepetitionLimits, Response, Reward, RlConfig, Task, repeats};

/// How text becomes tokens of a prompt, and tokens of an answer text.
#[derive(Debug, Clone)]
pub struct Words {
    tokenizer: Tokenizer,
    stop_tokens: Vec<u32>,
    is_chat: bool,
}

impl Words {
    /// By the tokenizer of a model, whose answers end with any of `stop_tokens`.
    ///
    /// # Errors
    ///
    /// If prompts are turns of a conversation, and the model has no chat template or this build knows
    /// none.
    pub fn new(
        tokenizer: Tokenizer,
        stop_tokens: Vec<u32>,
        is_chat: bool,
    ) -> Result<Self, TrainError> {
        let words = Self { tokenizer, stop_tokens, is_chat };
        if is_chat {
            words.prompt("")?;
        }
        Ok(words)
    }

    /// Tokens that end an answer.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    fn prompt(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        if !self.is_chat {
            return Ok(self.tokenizer.encode(text, false)?);
        }
        #[cfg(feature = "chat")]
        return Ok(self.tokenizer.encode_chat(&[yuan_model::text::Message::new("user", text)])?);
        #[cfg(not(feature = "chat"))]
        Err(yuan_data::DataError::Setting(
            "prompts as turns of a conversation need the feature `chat`".into(),
        )
        .into())
    }

    fn answer(&self, prompt: &[u32], tokens: &[u32]) -> Result<String, TrainError> {
        Ok(self.tokenizer.decode_after(prompt, tokens)?)
    }
}

/// An answer to a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub tokens: Vec<u32>,
    /// Whether the model ended it itself.
    pub is_complete: bool,
}

/// The answers to one prompt, and what they are worth.
#[derive(Debug, Clone)]
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
pub(crate) struct Ask<'a> {
    pub words: &'a Words,
    pub answers: usize,
    pub options: GenerationOptions,
    pub repetition: Option<RepetitionLimits>,
    /// Answers at the same time.
    pub at_once: usize,
    /// Tokens that a prompt and its answer may have.
    pub row_len: usize,
}

impl<'a> Ask<'a> {
    /// As the settings of a run say, with a seed for this batch.
    pub fn of(config: &RlConfig, words: &'a Words, row_len: usize, seed: u64) -> Self {
        Self {
            words,
            answers: config.answers,
            options: config.generation(words.stop_tokens().to_vec(), seed),
            repetition: config.repetition,
            at_once: config.at_once,
            row_len,
        }
    }

    /// Answers all questions and rewards the answers. Over ranks, all of them call this together: each
    /// answers its part of the prompts, and all get all answers.
    pub fn answer(
        &self,
        model: &YuanModel,
        task: &dyn Task,
        questions: &[Question],
    ) -> Result<Answered, TrainError> {
        let started = Instant::now();
        let prompts = questions
            .iter()
            .map(|question| self.prompt(question))
            .collect::<Result<Vec<_>, TrainError>>()?;
        let (answers, layers) = self.answers(model, &prompts)?;
        let seconds = started.elapsed().as_secs_f64();
        let groups = questions.iter().zip(prompts).zip(answers.chunks(self.answers));
        let groups = groups.map(|((question, prompt), answers)| {
            let texts = answers
                .iter()
                .map(|answer| self.words.answer(&prompt, &answer.tokens))
                .collect::<Result<Vec<_>, TrainError>>()?;
            let responses: Vec<Response<'_>> = texts
                .iter()
                .zip(answers)
                .map(|(text, Answer { tokens, is_complete })| Response {
                    text,
                    tokens,
                    is_complete: *is_complete,
                })
                .collect();
            let rewards = task.rewards(question, &responses);
            if rewards.len() != responses.len() {
                let (found, expected) = (rewards.len(), responses.len());
                let cause = format!("the task gave {found} rewards for {expected} answers");
                return Err(TrainError::Callback { name: "rollouts", cause: cause.into() });
            }
            if let Some(bad) = rewards.iter().find(|reward| !reward.value.is_finite()) {
                let cause = format!("the task rewarded an answer with {}", bad.value);
                return Err(TrainError::Callback { name: "rollouts", cause: cause.into() });
            }
            Ok(Group { prompt, answers: answers.to_vec(), rewards })
        });
        Ok(Answered { groups: groups.collect::<Result<_, TrainError>>()?, layers, seconds })
    }

    fn prompt(&self, question: &Question) -> Result<Vec<u32>, TrainError> {
        let prompt = self.words.prompt(&question.prompt)?;
        let room = self.row_len.saturating_sub(self.options.max_new_tokens);
        if prompt.len() > room {
            return Err(TrainError::OutOfRange {
                name: "tokens of a prompt",
                value: prompt.len() as f64,
                expected: format!(
                    "must be at most {room}, so that answers of {} tokens fit a row of {}: `{}`",
                    self.options.max_new_tokens,
                    self.row_len,
                    shortened(&question.prompt)
                ),
            });
        }
        Ok(prompt)
    }

    fn answers(
        &self,
        model: &YuanModel,
        prompts: &[Vec<u32>],
    ) -> Result<(Vec<Answer>, Vec<LayerLoad>), TrainError> {
        let Some(ranks) = model.ranks() else {
            let (answers, loads) = self.own_answers(model, prompts, 0)?;
            return Ok((answers, loads.into_iter().map(LayerLoad::new).collect()));
        };
        let world = ranks.world();
        // As many for every rank, which take all steps together: some are answered twice.
        let of_rank = prompts.len().div_ceil(world.size());
        let first = of_rank * world.rank();
        let own: Vec<Vec<u32>> =
            (first..first + of_rank).map(|at| prompts[at.min(prompts.len() - 1)].clone()).collect();
        let (answers, loads) = self.own_answers(model, &own, first)?;
        let bytes = serde_json::to_vec(&answers).expect("tokens are plain data");
        let mut all = Vec::with_capacity(prompts.len() * self.answers);
        for bytes in world.gather(&bytes)? {
            let answers: Vec<Answer> = serde_json::from_slice(&bytes)
                .map_err(|error| TrainError::Device(format!("answers of a rank: {error}")))?;
            all.extend(answers);
        }
        all.truncate(prompts.len() * self.answers);
        let mut layers = Vec::with_capacity(loads.len());
        for load in loads {
            layers.push(LayerLoad::new(world.sum_counts(&load)?));
        }
        Ok((all, layers))
    }

    /// Answers to some prompts, of which the first one is number `first` of all.
    fn own_answers(
        &self,
        model: &YuanModel,
        prompts: &[Vec<u32>],
        first: usize,
    ) -> Result<(Vec<Answer>, Vec<Vec<u64>>), TrainError> {
        let mut all = Vec::with_capacity(prompts.len() * self.answers);
        let mut loads: Vec<Vec<u64>> = Vec::new();
        let at_once = (self.at_once / self.answers).max(1);
        for (part, prompts) in prompts.chunks(at_once).enumerate() {
            // An answer is drawn alike whatever else is drawn with it.
            let seed = self.options.seed_of((first + part * at_once) * self.answers);
            let options = GenerationOptions { seed, ..self.options.clone() };
            let Rollout { answers, tokens_per_expert } =
                model.rollout(prompts, self.answers, &options, |_, tokens| self.goes_on(tokens))?;
            all.extend(answers.into_iter().map(|answer| Answer {
                is_complete: answer.finish == FinishReason::Stop,
                tokens: answer.tokens,
            }));
            match loads.is_empty() {
                true => loads = tokens_per_expert,
                false => {
                    let sums = loads.iter_mut().flatten();
                    sums.zip(tokens_per_expert.iter().flatten())
                        .for_each(|(sum, more)| *sum += more);
                }
            }
        }
        Ok((all, loads))
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
