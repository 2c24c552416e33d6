//! LAEP in a running job: watch the loads, decide once, cut model and optimizer.

use burn::module::Module;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_laep::{LoadTracker, LoadWindow, PruneLimits, PrunePlan, StabilityTest};

use crate::{
    PrunableExperts, TrainError,
    callback::{Callback, Context, Event, StepMetrics},
    files::write_whole,
};

/// When to prune.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// When the loads of every layer are stable.
    Stable,
    /// After this step, stable or not.
    Step(u64),
    /// Never: the loads are only recorded.
    Never,
}

/// Settings of layer-adaptive expert pruning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LaepConfig {
    /// W: optimizer steps whose loads make a window.
    pub window_steps: u64,
    /// When to prune.
    pub trigger: Trigger,
    /// What counts as stable; the plan rests on as many windows.
    pub stability: StabilityTest,
    /// How much may go.
    pub limits: PruneLimits,
    /// Device groups that the kept experts are spread over.
    pub groups: usize,
}

impl Default for LaepConfig {
    fn default() -> Self {
        Self {
            window_steps: 20,
            trigger: Trigger::Stable,
            stability: StabilityTest::default(),
            limits: PruneLimits::default(),
            groups: 1,
        }
    }
}

impl LaepConfig {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// Names the setting that is out of range.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.stability.validate()?;
        self.limits.validate(self.groups)?;
        self.tracker()?;
        Ok(())
    }

    fn tracker(&self) -> Result<LoadTracker, TrainError> {
        Ok(LoadTracker::new(self.window_steps, self.stability.windows + 1)?)
    }
}

/// The callback: Algorithm 1 and 2 of the paper, once, in the middle of pre-training.
#[derive(Debug)]
pub struct PruneExperts {
    config: LaepConfig,
    state: State,
    /// Decided in this step, to be done at its end; never true when a checkpoint is written.
    due: bool,
}

/// What a checkpoint carries.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    tracker: LoadTracker,
    stable: Option<bool>,
    pruned_at: Option<u64>,
}

impl PruneExperts {
    /// Name of the plan in the run directory.
    pub const PLAN: &'static str = "plan.json";
    /// Name of the loads that the plan rests on, as the example `plan` reads them.
    pub const LOADS: &'static str = "loads.json";

    /// Prunes as `config` says.
    ///
    /// # Errors
    ///
    /// If a setting is out of range.
    pub fn new(config: LaepConfig) -> Result<Self, TrainError> {
        config.validate()?;
        let state = State { tracker: config.tracker()?, stable: None, pruned_at: None };
        Ok(Self { config, state, due: false })
    }

    /// Judges the windows, tells what changed, and says whether all layers are stable.
    fn judge<M>(&mut self, context: &mut Context<'_, M>) -> bool {
        let windows = self.state.tracker.completed();
        let stability = self.config.stability.judge(windows);
        if let Some(LoadWindow { steps, layers }) = windows.last().cloned() {
            let (step, stability) = (context.step(), stability.clone());
            context.emit(Event::Load { step, window_steps: steps, layers, stability });
        }
        let Some(stability) = stability else { return false };
        let stable_layers = stability.iter().filter(|layer| layer.stable).count();
        let stable = stable_layers == stability.len();
        if self.state.stable != Some(stable) {
            self.state.stable = Some(stable);
            let (step, layers) = (context.step(), stability.len());
            context.emit(Event::Phase { step, stable, stable_layers, layers });
        }
        stable
    }

    /// Plans on the loads of the latest windows and applies the plan.
    fn prune<M: PrunableExperts + Module>(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        let mut window = self.state.tracker.last(self.config.stability.windows);
        if window.layers.is_empty() {
            // A fixed step may come before the first window is full.
            window = self.state.tracker.current().clone();
        }
        let experts_before = context.model().experts_per_layer();
        let limits = PruneLimits { top_k: context.model().top_k(), ..self.config.limits.clone() };
        let plan = PrunePlan::new(&window.layers, &limits, self.config.groups)?;
        plan.check_against(&experts_before, limits.top_k)?;

        let loads = serde_json::to_string(&window).unwrap_or_default();
        write_whole(&context.run_dir().join(Self::LOADS), loads.as_bytes())?;
        write_whole(&context.run_dir().join(Self::PLAN), plan.to_json().as_bytes())?;
        let parameters_before = context.model().num_params() as u64;
        let kept: Vec<Vec<usize>> = plan.layers.iter().map(|layer| layer.kept.clone()).collect();
        context.cut(|model| model.keep_experts(&kept))?;

        self.state.tracker.reset();
        self.state.pruned_at = Some(context.step());
        let total: f64 = plan.layers.iter().map(|layer| layer.load.total() as f64).sum();
        let pruned = plan.layers.iter().map(|layer| layer.pruned_load_fraction() * layer.load.total() as f64);
        context.emit(Event::Prune {
            step: context.step(),
            experts_before,
            experts_after: context.model().experts_per_layer(),
            parameters_before,
            parameters_after: context.model().num_params() as u64,
            pruned_load: pruned.sum::<f64>() / total,
        });
        Ok(())
    }
}

impl<M: PrunableExperts + Module> Callback<M> for PruneExperts {
    fn name(&self) -> &'static str {
        "prune_experts"
    }

    fn on_step(&mut self, context: &mut Context<'_, M>, metrics: &StepMetrics) -> Result<(), TrainError> {
        let complete = self.state.tracker.record(metrics.loads.clone())?;
        let stable = complete && self.judge(context);
        let due = match self.config.trigger {
            Trigger::Stable => stable,
            Trigger::Step(step) => metrics.step == step,
            Trigger::Never => false,
        };
        self.due = due && self.state.pruned_at.is_none();
        if self.due {
            // What the model is worth before the cut, for the report.
            context.request_validation();
        }
        Ok(())
    }

    fn on_step_end(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        if std::mem::take(&mut self.due) { self.prune(context) } else { Ok(()) }
    }

    fn state(&self) -> Option<Value> {
        serde_json::to_value(&self.state).ok()
    }

    fn restore(&mut self, state: Value) -> Result<(), TrainError> {
        self.state = serde_json::from_value(state)
            .map_err(|error| TrainError::Callback { name: "prune_experts", source: error.into() })?;
        Ok(())
    }
}
