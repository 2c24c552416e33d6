//! LAEP in a running job: watch the loads, decide, cut model and optimizer, and undo it if it
//! hurts.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_files::write_whole;
use yuan_laep::{
    ExpertLayout, LayerLoad, LayerPlan, LoadFile, LoadStatistics, LoadTracker, LoadWindow,
    ModelSize, PruneLimits, PrunePlan,
};
use yuan_model::PrunableExperts;

use super::background::Background;
use crate::{
    Callback, Context, Event, LaepConfig, StepMetrics, TrainConfig, TrainError, Trigger,
    run::check::check_groups,
};

/// The callback: Algorithms 1 and 2 of the paper in the middle of pre-training, once or in rounds.
#[derive(Debug)]
pub struct PruneExperts {
    config: LaepConfig,
    state: State,
    /// Decided in this step, to be done at its end; never true when a checkpoint is written.
    due: bool,
    /// The same for a rearrangement.
    rearrangement_due: bool,
    /// The latest validation, as step and loss.
    validation: Option<(u64, f64)>,
    writing: Background,
}

/// What a checkpoint carries.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    tracker: LoadTracker,
    /// Whether each layer is stable, once there were enough windows to tell.
    stable: Option<Vec<bool>>,
    /// Prunes so far.
    rounds: usize,
    /// A prune that the guard still watches.
    watched: Option<Watched>,
    /// A prune was undone: no more of them.
    given_up: bool,
    /// Windows since the experts were last spread over the groups.
    #[serde(default)]
    windows_in_place: u64,
    /// Step up to which only what recovers from a prune learns.
    #[serde(default)]
    recovers_until: Option<u64>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Watched {
    until: u64,
    allowed_loss: f64,
}

impl PruneExperts {
    /// Name of the first plan in the run directory.
    pub const PLAN: &'static str = "plan.json";
    /// Name of the loads that it rests on, as `yuan plan` reads them; until then, of the
    /// latest ones.
    pub const LOADS: &'static str = "loads.json";

    /// Prunes as `config` says.
    ///
    /// # Errors
    ///
    /// If a setting is out of range.
    pub fn new(config: LaepConfig) -> Result<Self, TrainError> {
        config.validate()?;
        let state = State {
            tracker: config.tracker()?,
            stable: None,
            rounds: 0,
            watched: None,
            given_up: false,
            windows_in_place: 0,
            recovers_until: None,
        };
        let writing = Background::default();
        Ok(Self { config, state, due: false, rearrangement_due: false, validation: None, writing })
    }

    /// The callback that the settings of a run ask for; for
    /// [`LanguageModel::callbacks`](crate::LanguageModel::callbacks).
    ///
    /// # Errors
    ///
    /// If a setting is out of range.
    pub fn boxed<M: PrunableExperts>(
        config: &TrainConfig,
    ) -> Result<Box<dyn Callback<M>>, TrainError> {
        Ok(Box::new(Self::new(config.laep.clone())?))
    }

    fn is_pending(&self) -> bool {
        self.state.rounds < self.config.rounds()
            && !self.state.given_up
            && self.state.watched.is_none()
    }

    /// Whether the run is long enough for the guard, if there is one, to judge a prune of now.
    fn can_be_judged<M>(&self, context: &Context<'_, M>) -> bool {
        let left = context.config().steps.saturating_sub(context.step());
        self.config.guard.is_none_or(|guard| guard.steps <= left)
    }

    /// The loads that a plan made now would rest on.
    fn loads(&self) -> LoadWindow {
        let window = self.state.tracker.last(self.config.stability.windows);
        // A fixed step may come before the first window is full.
        if window.layers.is_empty() { self.state.tracker.current().clone() } else { window }
    }

    /// Judges the windows, tells what changed, and says whether all layers are stable.
    fn judge<M>(&mut self, context: &mut Context<'_, M>) -> bool {
        let step = context.step();
        let windows = self.state.tracker.completed();
        let stability = self.config.stability.judge(windows);
        if let Some(LoadWindow { steps, layers }) = windows.last().cloned() {
            let statistics = layers.iter().map(LoadStatistics::of).collect();
            let stability = stability.clone();
            context.emit(Event::Load { step, window_steps: steps, layers, statistics, stability });
        }
        let Some(stability) = stability else { return false };
        let layers: Vec<bool> = stability.iter().map(|layer| layer.stable).collect();
        let stable = layers.iter().all(|&stable| stable);
        if self.state.stable.as_ref() != Some(&layers) {
            self.state.stable = Some(layers.clone());
            context.emit(Event::Phase { step, stable, layers });
        }
        stable
    }

    /// Files of the round that comes next: the first one's have plain names.
    fn file_name(&self, name: &str) -> String {
        match self.state.rounds {
            0 => name.to_owned(),
            round => name.replace(".json", &format!("-{}.json", round + 1)),
        }
    }

    fn write_loads<M: PrunableExperts>(
        &mut self,
        context: &Context<'_, M>,
    ) -> Result<(), TrainError> {
        if !context.is_first_rank() {
            return Ok(());
        }
        let file = LoadFile { window: self.loads(), model: model_size(context.model()) };
        let path = context.run_dir().join(self.file_name(Self::LOADS));
        self.writing.start(move || Ok(write_whole(&path, file.to_json().as_bytes())?))
    }

    fn plan<M: PrunableExperts>(&self, context: &Context<'_, M>) -> Result<PrunePlan, TrainError> {
        if let Some(plan) = &self.config.plan {
            return Ok(plan.clone());
        }
        // No rank is left without an expert, whatever the run was made for.
        let min_experts = self.config.limits.min_experts.max(context.sharing());
        let limits = PruneLimits { min_experts, ..self.config.limits.clone() };
        let layout = self.layout(context.model());
        Ok(PrunePlan::new(&self.loads().layers, &limits, layout)?)
    }

    fn layout<M: PrunableExperts>(&self, model: &M) -> ExpertLayout {
        ExpertLayout { top_k: model.top_k(), groups: self.config.groups }
    }

    /// Plans on the loads of the latest windows and applies the plan.
    fn prune<M: PrunableExperts>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<(), TrainError> {
        let (step, experts_before) = (context.step(), context.model().experts_per_layer());
        let plan = self.plan(context)?;
        plan.check_against(&experts_before, context.model().top_k())?;
        context.agree("plan", plan.to_json().as_bytes())?;
        if context.is_first_rank() {
            // The loads that it rests on are there before it.
            self.writing.wait();
            let path = context.run_dir().join(self.file_name(Self::PLAN));
            write_whole(&path, plan.to_json().as_bytes())?;
        }
        let parameters_before = context.model().num_parameters();
        let bytes_moved = context.cut(|model| model.keep_experts(&plan.kept()))?;

        self.state.tracker.reset();
        self.state.stable = None;
        self.state.rounds += 1;
        self.state.windows_in_place = 0;
        self.state.recovers_until =
            self.config.recovery.map(|recovery| step.saturating_add(recovery.steps));
        if let (Some(guard), Some((_, loss))) = (self.config.guard, self.validation) {
            self.state.watched = Some(Watched {
                until: step.saturating_add(guard.steps),
                allowed_loss: loss * (1.0 + guard.margin),
            });
        }
        context.emit(Event::Prune {
            step,
            round: self.state.rounds,
            experts_before,
            experts_after: context.model().experts_per_layer(),
            parameters_before,
            parameters_after: context.model().num_parameters(),
            pruned_load: plan.pruned_load_fraction(),
            bytes_moved,
            layers: plan.layers.iter().map(LayerPlan::summary).collect(),
            predicted_gain: self.config.speed.map(|speed| speed.gain(&plan)),
            plan,
        });
        Ok(())
    }

    /// Spreads all experts over the groups by the latest loads: Algorithm 2 alone.
    fn rearrange<M: PrunableExperts>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<(), TrainError> {
        // A plan from elsewhere may have left counts that are no multiple of the run's own limit.
        let nothing = PruneLimits {
            max_pruned_fraction: Some(0.0),
            multiple_of: self.config.groups,
            ..PruneLimits::default()
        };
        let layout = self.layout(context.model());
        let plan = PrunePlan::new(&self.loads().layers, &nothing, layout)?;
        let order = plan.kept();
        let bytes_moved = context.cut(|model| model.keep_experts(&order))?;
        self.state.tracker.reorder(&order);
        self.state.windows_in_place = 0;
        let summaries: Vec<_> = plan.layers.iter().map(LayerPlan::summary).collect();
        context.emit(Event::Rearrange {
            step: context.step(),
            groups_before: summaries.iter().map(|layer| layer.groups_before).collect(),
            groups_after: summaries.iter().map(|layer| layer.groups_after).collect(),
            order,
            bytes_moved,
        });
        Ok(())
    }

    /// What learns in the next step.
    fn choose_learning<M>(&mut self, context: &mut Context<'_, M>) {
        let step = context.step();
        let until = self.state.recovers_until.filter(|&until| step < until);
        self.state.recovers_until = until;
        let recovery = self.config.recovery.filter(|_| until.is_some());
        context.learn(recovery.map_or(context.config().learns, |recovery| recovery.learns));
    }

    /// Ends the watch over a prune when the loss came back, and asks to undo it when the time, or
    /// the last of the configured steps, is up.
    fn watch<M>(&mut self, context: &mut Context<'_, M>) {
        let (Some(Watched { until, allowed_loss }), Some((step, loss))) =
            (self.state.watched, self.validation)
        else {
            return;
        };
        if step != context.step() {
            return;
        }
        let satisfied = loss <= allowed_loss;
        if satisfied {
            self.state.watched = None;
            // From this checkpoint on the run knows, and needs no way back.
            context.request_checkpoint();
            context.discard_snapshot();
        } else if step >= until.min(context.config().steps) || context.ends() {
            context.request_roll_back();
        } else {
            return;
        }
        context.emit(Event::Guard { step, loss: Some(loss), allowed_loss, satisfied });
    }
}

/// Whether loads are those of so many experts; nothing may have been recorded yet.
fn is_of(window: &LoadWindow, experts_per_layer: &[usize]) -> bool {
    let counts = window.layers.iter().map(LayerLoad::num_experts);
    window.layers.is_empty() || counts.eq(experts_per_layer.iter().copied())
}

/// Size of a model whose layers have experts of one size; `None` if its first layer has none.
fn model_size<M: PrunableExperts>(model: &M) -> Option<ModelSize> {
    Some(ModelSize {
        parameters: model.num_parameters(),
        parameters_per_expert: model.parameters_per_expert()?,
        top_k: model.top_k(),
    })
}

impl<M: PrunableExperts> Callback<M> for PruneExperts {
    fn name(&self) -> &'static str {
        "prune_experts"
    }

    fn on_start(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        if self.is_pending() {
            // Found out now rather than in the middle of the run.
            let (experts, top_k) = (context.model().experts_per_layer(), context.model().top_k());
            match &self.config.plan {
                Some(plan) => plan.check_against(&experts, top_k)?,
                None => self.config.limits.check_model(&experts, top_k)?,
            }
        }
        let experts = context.model().experts_per_layer();
        if self.config.rearrange_every.is_some() {
            check_groups(&experts, self.config.groups)?;
        }
        let current = self.state.tracker.current();
        let mut windows = self.state.tracker.completed().iter().chain([current]);
        let is_damaged = windows.any(|window| !is_of(window, &experts));
        drop(windows);
        if is_damaged {
            let path = context.run_dir().to_path_buf();
            let reason = "the loads in its latest checkpoint are those of other experts";
            return Err(TrainError::Damaged { path, reason: reason.into() });
        }
        match self.state.watched {
            None => context.discard_snapshot(),
            Some(_) if !context.has_snapshot() => {
                let path = context.run_dir().to_path_buf();
                let reason =
                    "the guard watches a prune, but before-prune, the state to go back to, is gone";
                return Err(TrainError::Damaged { path, reason: reason.into() });
            }
            Some(_) => {}
        }
        self.choose_learning(context);
        Ok(())
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        let complete = self.state.tracker.record(metrics.loads.clone())?;
        let stable = complete && self.judge(context);
        let pending = self.is_pending();
        self.due = pending
            && match &self.config.trigger {
                // One that the guard could not judge any more is not begun.
                Trigger::Stable { .. } => stable && self.can_be_judged(context),
                // One that the guard held up comes late.
                Trigger::Steps(steps) => metrics.step >= steps[self.state.rounds],
                Trigger::Never => false,
            };
        if self.due || (complete && (pending || self.config.trigger == Trigger::Never)) {
            self.write_loads(context)?;
        }
        if self.due && self.config.guard.is_some() {
            context.request_snapshot();
        }
        self.state.windows_in_place += u64::from(complete);
        let every = self.config.rearrange_every;
        let due = every.is_some_and(|every| self.state.windows_in_place >= every);
        self.rearrangement_due = complete && due;
        let deadline = self.state.watched.is_some_and(|watched| metrics.step == watched.until);
        if self.due || deadline {
            // What the model is worth before the cut, and whether it recovered from it.
            context.request_validation();
        }
        Ok(())
    }

    fn on_step_end(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        self.watch(context);
        let rearrange = std::mem::take(&mut self.rearrangement_due);
        match std::mem::take(&mut self.due) {
            true => self.prune(context)?,
            false if rearrange => self.rearrange(context)?,
            false => {}
        }
        self.choose_learning(context);
        Ok(())
    }

    fn on_not_finite(&mut self, context: &mut Context<'_, M>) {
        if let Some(Watched { allowed_loss, .. }) = self.state.watched {
            let step = context.step();
            context.emit(Event::Guard { step, loss: None, allowed_loss, satisfied: false });
            context.request_roll_back();
        }
    }

    fn on_event(&mut self, event: &Event) -> Result<(), TrainError> {
        if let Event::Validation { step, loss, .. } = event {
            self.validation = Some((*step, *loss));
        }
        Ok(())
    }

    fn on_end(&mut self) -> Result<(), TrainError> {
        self.writing.finish()
    }

    fn state(&self) -> Option<Value> {
        // The loads of its last window are there before a checkpoint.
        self.writing.wait();
        serde_json::to_value(&self.state).ok()
    }

    fn restore(&mut self, state: Value) -> Result<(), TrainError> {
        self.state = serde_json::from_value(state)
            .map_err(|error| TrainError::Callback { name: "prune_experts", cause: error.into() })?;
        Ok(())
    }

    fn on_rolled_back(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        self.choose_learning(context);
        Ok(())
    }

    fn roll_back(&mut self, state: Option<Value>) -> Result<(), TrainError> {
        state.map_or(Ok(()), |state| Callback::<M>::restore(self, state))?;
        self.state.given_up = true;
        Ok(())
    }
}
