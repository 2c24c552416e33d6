//! Runs of reinforcement learning on disk.

use std::{path::Path, sync::Arc};

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use yuan_data::DataError;
use yuan_model::{YuanConfig, YuanModel, ranks::Ranks, text::Tokenizer};
use yuan_train::{
    Claim, ModelDirectory, NewRun, Run, RunData, TrainConfig, TrainError, Trainer, data::RunRows,
};

use crate::{
    Arithmetic, HeldOut, PromptTokenizer, Questions, RewardRule, RlConfig, Rollouts, Task,
    answers::Request,
};

/// What a run of reinforcement learning learns, and how; the file `rl.json` among its data.
///
/// The program `yuan rl` makes such runs. One whose task is a program's own has no such file: the
/// program gives [`Run::trainer_with`] its [`Rollouts`].
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
    /// Name of the file among the data of a run.
    pub const FILE: &'static str = "rl.json";

    /// Makes a run that starts with the weights of a model. `questions` is the text of the file for
    /// [`TaskKind::Questions`].
    ///
    /// # Errors
    ///
    /// If a setting is out of range or does not fit the training's, the questions cannot be
    /// understood, or the run cannot be written.
    pub fn create(
        &self,
        claim: Claim,
        model: ModelDirectory,
        training: TrainConfig,
        questions: Option<&str>,
    ) -> Result<Run, TrainError> {
        self.rollouts.validate(&training)?;
        let tokenizer = self.tokenizer(&model.tokenizer_directory(), model.config())?;
        if let TaskKind::Questions = self.task {
            let questions =
                Questions::from_lines(questions.unwrap_or_default(), self.reward, training.seed)
                    .map_err(|reason| DataError::Setting(format!("the questions: {reason}")))?;
            // One that is too long would end the run in the middle.
            let request = Request::of(&self.rollouts, &tokenizer, training.seq_len, 0);
            questions.all().try_for_each(|question| request.prompt(question).map(drop))?;
        }
        let mut files = vec![(Self::FILE.to_owned(), self.to_json().into_bytes())];
        if let (TaskKind::Questions, Some(text)) = (self.task, questions) {
            files.push((QUESTIONS.to_owned(), text.as_bytes().to_vec()));
        }
        Run::create_in(claim, NewRun::from_model(training, model, RunData::Prompts(files)))
    }

    fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("settings are plain data")
    }

    /// The settings of a run.
    ///
    /// # Errors
    ///
    /// If it has none, or they are not what was written.
    pub fn of(run: &Run) -> Result<Self, TrainError> {
        let (path, bytes) = file(run, Self::FILE)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| TrainError::Damaged { path, reason: error.to_string() })
    }

    fn task(&self, questions: &str, seed: u64) -> Result<Arc<dyn Task>, String> {
        Ok(match self.task {
            TaskKind::Arithmetic => Arc::new(Arithmetic { rule: self.reward, seed }),
            TaskKind::Questions => Arc::new(Questions::from_lines(questions, self.reward, seed)?),
        })
    }

    fn tokenizer(
        &self,
        directory: &Path,
        model: &YuanConfig,
    ) -> Result<PromptTokenizer, TrainError> {
        let tokenizer = Tokenizer::load(directory)?;
        let stop_tokens = tokenizer.stop_tokens(model);
        PromptTokenizer::new(tokenizer, stop_tokens, self.rollouts.chat)
    }

    /// What makes the rows of a run's steps, and what measures it.
    fn open(&self, run: &Run) -> Result<(Rollouts, HeldOut), TrainError> {
        let (path, questions) = match self.task {
            TaskKind::Arithmetic => (run.directory().to_path_buf(), Vec::new()),
            TaskKind::Questions => file(run, QUESTIONS)?,
        };
        let task = self.task(&String::from_utf8_lossy(&questions), run.config().seed);
        let task = task.map_err(|reason| TrainError::Damaged { path, reason })?;
        let tokenizer = self.tokenizer(run.directory(), run.model())?;
        let rollouts = Rollouts::new(task.clone(), tokenizer.clone(), self.rollouts.clone());
        Ok((rollouts, HeldOut::new(task, tokenizer, self.rollouts.clone())))
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

/// The trainer of a run of reinforcement learning on one device: at its latest checkpoint, or at
/// the start.
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
