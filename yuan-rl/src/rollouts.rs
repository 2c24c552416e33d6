//! The loop: prompts to answers, answers to rewards, rewards to rows of an update.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use burn::module::Module;
use yuan_model::{GenerateError, Objective, YuanModel};
use yuan_train::{
    Event, RolloutMetrics, TrainConfig, TrainError,
    data::{Row, StepData, batch_of},
};

use crate::{
    PromptRewards, PromptTokenizer, Question, RlConfig, Task, adaptive_sampling,
    answers::{Answer, Answered, Group, Request},
    group_advantages,
    seeds::mixed,
};

/// Makes the rows of every step with the model that learns from them.
///
/// When the rows of the last rollouts are used up, the model answers the next
/// [`prompts`](RlConfig::prompts). Prompts whose answers are rewarded alike are left out and the others
/// put in order ([`adaptive_sampling`]); the answers to those of an update are its rows, which carry
/// advantages ([`group_advantages`]) and the log-probabilities of their tokens under the model as it is
/// before the updates.
///
/// The same seed gives the same run, bit for bit on the CPU: rollouts are drawn from the run's seed and
/// their number alone. A checkpoint is put off until all rows of the rollouts are learnt.
pub struct Rollouts {
    task: Arc<dyn Task>,
    tokenizer: PromptTokenizer,
    config: RlConfig,
    /// Batches of prompts that were answered.
    round: u64,
    pending: VecDeque<Row>,
    events: Vec<Event>,
}

/// Keeps the seeds of rollouts apart from those of steps.
const ROLLOUTS: u64 = 0x0110_0075_0000_0000;

impl Rollouts {
    /// Of a task, whose prompts a tokenizer writes.
    pub fn new(task: Arc<dyn Task>, tokenizer: PromptTokenizer, config: RlConfig) -> Self {
        let (pending, events) = (VecDeque::new(), Vec::new());
        Self { task, tokenizer, config, round: 0, pending, events }
    }

    /// Answers batches of prompts until there is something to learn from.
    fn roll_out(
        &mut self,
        model: &YuanModel,
        training: &TrainConfig,
        step: u64,
    ) -> Result<(), TrainError> {
        for _ in 0..self.config.attempts {
            let (round, prompts) = (self.round, self.config.prompts as u64);
            let numbers = round * prompts..(round + 1) * prompts;
            let questions: Vec<Question> =
                numbers.map(|number| self.task.question(number)).collect();
            let seed = mixed(training.seed ^ ROLLOUTS, round);
            let request = Request::of(&self.config, &self.tokenizer, training.seq_len, seed);
            let answered = request.answer(model, &*self.task, &questions);
            let answered = answered.map_err(|error| diverged(error, step))?;
            self.round += 1;
            let chosen = self.chosen(&answered.groups);
            let learnt = chosen.iter().collect::<BTreeSet<_>>().len();
            let metrics = metrics_of(&answered, step, learnt, false);
            self.events.push(Event::Rollout(metrics));
            if !chosen.is_empty() {
                self.pending = self.rows(model, training, &answered.groups, &chosen)?.into();
                return Ok(());
            }
        }
        Err(TrainError::RewardedAlike { step: step + 1, batches: self.config.attempts })
    }

    /// The prompts to learn from, in order.
    fn chosen(&self, groups: &[Group]) -> Vec<usize> {
        let rewards = |group: &Group| {
            let right = group.rewards.iter().filter(|reward| reward.is_right).count();
            PromptRewards {
                // Where nothing is learnt, since what differs was cut off, they count as alike.
                rewards: match self.advantages(group).iter().any(|advantage| *advantage != 0.0) {
                    true => group.rewards.iter().map(|reward| reward.value).collect(),
                    false => Vec::new(),
                },
                pass_rate: right as f64 / group.rewards.len() as f64,
            }
        };
        let rewards: Vec<PromptRewards> = groups.iter().map(rewards).collect();
        adaptive_sampling(&rewards, self.config.mini_batch, self.config.order)
    }

    /// The answers to the chosen prompts as rows, update by update.
    fn rows(
        &self,
        model: &YuanModel,
        training: &TrainConfig,
        groups: &[Group],
        chosen: &[usize],
    ) -> Result<Vec<Row>, TrainError> {
        let mut all = Vec::with_capacity(chosen.len() * self.config.answers);
        for prompts in chosen.chunks(self.config.mini_batch) {
            let mut rows: Vec<Row> =
                prompts.iter().flat_map(|&prompt| self.rows_of(&groups[prompt])).collect();
            // Rows of one length side by side, so that little is filled up. The order of equals is that
            // of the answers.
            rows.sort_by_key(|row| row.padding_from);
            for rows in rows.chunks_mut(training.batch_size) {
                fill_up(rows, training.seq_len);
                with_log_probs(model, training, rows)?;
            }
            all.extend(rows);
        }
        Ok(all)
    }

    fn rows_of(&self, group: &Group) -> Vec<Row> {
        let answers = group.answers.iter().zip(self.advantages(group));
        answers.map(|(answer, advantage)| row_of(&group.prompt, answer, advantage)).collect()
    }

    /// The advantages of the answers to a prompt; 0 of those that were cut off, if they are filtered.
    fn advantages(&self, group: &Group) -> Vec<f32> {
        let rewards: Vec<f32> = group.rewards.iter().map(|reward| reward.value).collect();
        let mut advantages = group_advantages(&rewards, rewards.len());
        for (advantage, answer) in advantages.iter_mut().zip(&group.answers) {
            if self.config.filter_cut_off && !answer.is_complete {
                *advantage = 0.0;
            }
        }
        advantages
    }
}

impl StepData<YuanModel> for Rollouts {
    fn next_rows(
        &mut self,
        model: &YuanModel,
        training: &TrainConfig,
        step: u64,
    ) -> Result<Vec<Row>, TrainError> {
        // A run may be resumed with others than it began with.
        self.config.validate(training)?;
        let rows = training.batch_size * training.accumulation;
        if self.pending.len() < rows {
            self.roll_out(model, training, step)?;
        }
        Ok(self.pending.drain(..rows.min(self.pending.len())).collect())
    }

    fn objective(&self) -> Option<Arc<dyn Objective>> {
        Some(Arc::new(self.config.loss))
    }

    fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    fn is_resumable(&self) -> bool {
        self.pending.is_empty()
    }

    fn position(&self) -> u64 {
        self.round
    }

    fn seek(&mut self, position: u64) {
        self.round = position;
        self.pending.clear();
    }
}

/// Scores that are no numbers are the fault of the updates before.
fn diverged(error: TrainError, step: u64) -> TrainError {
    match error {
        TrainError::Generate(GenerateError::NotFinite { .. }) if step > 0 => {
            TrainError::NotFinite { step, what: "score of a token", value: f64::NAN }
        }
        other => other,
    }
}

/// A prompt and an answer as a row, of which the answer is learnt.
fn row_of(prompt: &[u32], answer: &Answer, advantage: f32) -> Row {
    let tokens = [prompt, &answer.tokens].concat();
    let labels = tokens[1..].to_vec();
    let learnt = (0..labels.len()).map(|at| at + 1 >= prompt.len()).collect();
    Row {
        input_ids: tokens[..tokens.len() - 1].to_vec(),
        position_ids: (0..labels.len() as u32).collect(),
        learnt: Some(learnt),
        padding_from: labels.len(),
        signals: vec![Vec::new(), vec![advantage; labels.len()]],
        labels,
        ..Row::default()
    }
}

/// Lengths come in multiples of this, so that devices see few of them.
const MULTIPLE: usize = 16;

/// Makes rows as long as the longest of them.
fn fill_up(rows: &mut [Row], most: usize) {
    let longest = rows.iter().map(|row| row.padding_from).max().unwrap_or(0);
    let length = longest.next_multiple_of(MULTIPLE).min(most.max(longest));
    for row in rows {
        row.input_ids.resize(length, 0);
        row.labels.resize(length, 0);
        row.position_ids.extend(row.position_ids.len() as u32..length as u32);
        row.learnt.iter_mut().for_each(|learnt| learnt.resize(length, false));
        row.signals.iter_mut().for_each(|signal| signal.resize(length, 0.0));
    }
}

/// Adds to the rows of a micro-batch the log-probabilities that the model gives their labels now.
fn with_log_probs(
    model: &YuanModel,
    training: &TrainConfig,
    rows: &mut [Row],
) -> Result<(), TrainError> {
    let model = model.valid();
    let device = model.embedding.weight.val().device();
    let own = match model.ranks() {
        Some(ranks) => ranks.share(rows.len())?,
        None => 0..rows.len(),
    };
    let batch = batch_of(&rows[own], &device);
    let log_probs = model.label_log_probs(batch, training.precision.dtype());
    let log_probs = log_probs
        .try_into_vec_as::<f32>()
        .map_err(|error| TrainError::Device(error.to_string()))?;
    let log_probs = match model.ranks() {
        Some(ranks) => {
            let bytes: Vec<u8> = log_probs.iter().flat_map(|value| value.to_le_bytes()).collect();
            let all = ranks.world().gather(&bytes)?.concat();
            all.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        }
        None => log_probs,
    };
    let length = rows.first().map_or(1, |row| row.labels.len().max(1));
    for (row, log_probs) in rows.iter_mut().zip(log_probs.chunks(length)) {
        row.signals[crate::objective::OLD_LOG_PROBS] = log_probs.to_vec();
    }
    Ok(())
}

/// What came of a batch of prompts, of which so many are learnt from.
pub(crate) fn metrics_of(
    answered: &Answered,
    step: u64,
    learnt: usize,
    held_out: bool,
) -> RolloutMetrics {
    let answers = || answered.groups.iter().flat_map(|group| &group.answers);
    let rewards = || answered.groups.iter().flat_map(|group| &group.rewards);
    let count = answers().count().max(1) as f64;
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for (name, &part) in rewards().flat_map(|reward| &reward.parts) {
        let (sum, answers) = sums.entry(name).or_default();
        (*sum, *answers) = (*sum + part, *answers + 1.0);
    }
    RolloutMetrics {
        step,
        held_out,
        prompts: answered.groups.len() as u64,
        answers: answers().count() as u64,
        learnt: learnt as u64,
        right: rewards().filter(|reward| reward.is_right).count() as f64 / count,
        reward: rewards().map(|reward| f64::from(reward.value)).sum::<f64>() / count,
        parts: sums.into_iter().map(|(name, (sum, of))| (name.to_owned(), sum / of)).collect(),
        tokens: answers().map(|answer| answer.tokens.len() as f64).sum::<f64>() / count,
        cut_off: answers().filter(|answer| !answer.is_complete).count() as f64 / count,
        seconds: answered.seconds,
        layers: answered.layers.clone(),
    }
}
