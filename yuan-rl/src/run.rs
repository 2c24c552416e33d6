//! Runs of reinforcement learning on disk.

use std::{path::Path, sync::Arc};

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use yuan_model::{YuanModel, ranks::Ranks, text::Tokenizer};
use yuan_train::{
    Claim, ModelDirectory, NewRun, Run, RunData, TrainConfig, TrainError, Trainer, data::RunRows,
};

use crate::{Arithmetic, HeldOut, Questions, RewardRule, RlConfig, Rollouts, Task, Words};

/// What a run of reinforcement learning learns, and how; the file `rl.json` among its data.
///
/// The program `yuan rl` makes such runs. One whose task is a program's own has no such file: the program
/// gives [`Run::trainer_with`] its [`Rollouts`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RlSettings {
    /// Which prompts there are.
    pub task: TaskKind,
    /// What their answers are rewarded for.
    pub reward: RewardRule,
    /// How they are answered and learnt from.
    pub rollouts: RlConfig,
}

/// Tasks that a run can be made of without a program of one's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskKind {
    /// [`Arithmetic`].
    Arithmetic,
    /// [`Questions`] from a file, of which the run keeps a copy.
    Questions,
}

/// Name of the copy of the questions.
const QUESTIONS: &str = "questions.jsonl";

impl RlSettings {
    /// Makes a run that starts with the weights of a model. `questions` is the text of the file for
    /// [`TaskKind::Questions`].
    ///
    /// # Errors
    ///
    /// If a setting is out of range or does not fit the training's, the questions cannot be understood, or
    /// the run cannot be written.
    pub fn create(
        &self,
        claim: Claim,
        model: ModelDirectory,
        training: TrainConfig,
        questions: Option<&str>,
    ) -> Result<Run, TrainError> {
        self.rollouts.validate(&training)?;
        let checked = self.check_questions(questions.unwrap_or_default());
        checked.map_err(|reason| TrainError::Damaged { path: QUESTIONS.into(), reason })?;
        let text = serde_json::to_string_pretty(self).expect("settings are plain data");
        let mut files = vec![(RlConfig::FILE.to_owned(), text.into_bytes())];
        if let (TaskKind::Questions, Some(text)) = (self.task, questions) {
            files.push((QUESTIONS.to_owned(), text.as_bytes().to_vec()));
        }
        Run::create_in(claim, NewRun::from_model(training, model, RunData::Prompts(files)))
    }

    /// Checks the text of a file of questions.
    ///
    /// # Errors
    ///
    /// As [`Questions::from_lines`].
    pub fn check_questions(&self, text: &str) -> Result<(), String> {
        self.task(text).map(drop)
    }

    /// The settings of a run.
    ///
    /// # Errors
    ///
    /// If it has none, or they are not what was written.
    pub fn of(run: &Run) -> Result<Self, TrainError> {
        let (path, bytes) = file(run, RlConfig::FILE)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| TrainError::Damaged { path, reason: error.to_string() })
    }

    fn task(&self, questions: &str) -> Result<Arc<dyn Task>, String> {
        Ok(match self.task {
            TaskKind::Arithmetic => Arc::new(Arithmetic { rule: self.reward }),
            TaskKind::Questions => Arc::new(Questions::from_lines(questions, self.reward)?),
        })
    }

    /// What makes the rows of a run's steps, and what measures it.
    fn open(&self, run: &Run) -> Result<(Rollouts, HeldOut), TrainError> {
        let (path, questions) = match self.task {
            TaskKind::Arithmetic => (run.directory().to_path_buf(), Vec::new()),
            TaskKind::Questions => file(run, QUESTIONS)?,
        };
        let task = self.task(&String::from_utf8_lossy(&questions));
        let task = task.map_err(|reason| TrainError::Damaged { path, reason })?;
        let tokenizer = Tokenizer::load(run.directory())?;
        let stop_tokens = tokenizer.stop_tokens(run.model());
        let words = Words::new(tokenizer, stop_tokens, self.rollouts.chat)?;
        let rollouts = Rollouts::new(task.clone(), words.clone(), self.rollouts.clone());
        Ok((rollouts, HeldOut::new(task, words, self.rollouts.clone())))
    }
}

/// A file of a run's data, and where it is.
fn file(run: &Run, name: &str) -> Result<(std::path::PathBuf, Vec<u8>), TrainError> {
    let set = run.data().sets.first().filter(|_| run.data().learns_from_rewards());
    let Some(set) = set else {
        let (path, reason) =
            (run.directory().to_path_buf(), "it does not learn from rewards".into());
        return Err(TrainError::Damaged { path, reason });
    };
    let path = set.directory(run.directory()).join(Path::new(name));
    Ok((path, set.read_file(run.directory(), name)?))
}

/// The trainer of a run of reinforcement learning on one device: at its latest checkpoint, or at the
/// start.
///
/// # Errors
///
/// As [`Run::trainer`].
pub fn trainer(run: &Run, device: &Device) -> Result<Trainer<YuanModel>, TrainError> {
    let (rollouts, held_out) = RlSettings::of(run)?.open(run)?;
    run.trainer_with(device, |_| Ok(RunRows::of(rollouts)))?.with_callback(held_out)
}

/// The same on one of several ranks, which all call it.
///
/// # Errors
///
/// As [`Run::trainer_on_rank`].
pub fn trainer_on_rank(
    run: &Run,
    device: &Device,
    ranks: &Ranks,
) -> Result<Trainer<YuanModel>, TrainError> {
    let (rollouts, held_out) = RlSettings::of(run)?.open(run)?;
    run.trainer_on_rank_with(device, ranks, |_| Ok(RunRows::of(rollouts)))?.with_callback(held_out)
}
