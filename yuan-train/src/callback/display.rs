//! The live display: plain lines, and on a terminal a progress bar below them.

use std::{
    env,
    io::{IsTerminal, Write, stderr},
};

use indicatif::{ProgressBar, ProgressStyle};
use yuan_laep::LoadStatistics;

use crate::{Callback, Context, Event, RolloutMetrics, StepMetrics, TrainError};

/// A prune with less than this part of the run behind it is worth a warning.
const FEW: u64 = 20;

/// Shows progress, loss, tokens per second and expert imbalance on standard error.
#[derive(Debug)]
pub struct Display {
    bar: Option<ProgressBar>,
    every: u64,
    steps: u64,
    validation: Option<f64>,
    /// Largest Gini coefficient of the latest window.
    gini: Option<f64>,
    /// Dead experts of every layer in the latest window.
    dead: Vec<usize>,
}

impl Display {
    /// A line every `every` steps, and a live bar if standard error is a terminal that can move its
    /// cursor.
    pub fn new(every: u64) -> Self {
        let can_move = env::var_os("TERM").is_none_or(|term| term != "dumb");
        let bar = (stderr().is_terminal() && can_move).then(|| ProgressBar::new(0));
        Self { bar, every: every.max(1), steps: 0, validation: None, gini: None, dead: Vec::new() }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // A closed pipe must not end a run.
            None => drop(writeln!(stderr(), "{line}")),
        }
    }

    fn line(&self, step: u64, what: &str) {
        self.say(&format!("step {step:>5}/{}  {what}", self.steps));
    }

    /// Takes note of a window's loads and gives alarm when experts died.
    fn loads(&mut self, step: u64, statistics: &[LoadStatistics]) {
        self.gini = Some(statistics.iter().map(|layer| layer.gini).fold(0.0, f64::max));
        let dead: Vec<usize> = statistics.iter().map(|layer| layer.dead_experts).collect();
        for (layer, &now) in dead.iter().enumerate() {
            if now > self.dead.get(layer).copied().unwrap_or(0) {
                self.line(
                    step,
                    &format!("layer {layer}: {now} experts received no token in the last window"),
                );
            }
        }
        self.dead = dead;
    }

    fn step_line(&self, metrics: &StepMetrics) -> String {
        let imbalance = metrics.max_over_mean.iter().copied().fold(0.0, f64::max);
        let validation =
            self.validation.map_or_else(String::new, |loss| format!("  validation {loss:.3}"));
        let gini = self.gini.map_or_else(String::new, |gini| format!("  gini {gini:.2}"));
        let dead = match self.dead.iter().sum::<usize>() {
            0 => String::new(),
            dead => format!("  {dead} dead experts"),
        };
        format!(
            "loss {:.3}{validation}  {:.0} tokens/s  busiest expert {imbalance:.1} x mean{gini}{dead}",
            metrics.loss,
            metrics.tokens as f64 / metrics.seconds
        )
    }
}

impl<M> Callback<M> for Display {
    fn name(&self) -> &'static str {
        "display"
    }

    fn on_start(&mut self, context: &mut Context<'_, M>) -> Result<(), TrainError> {
        self.steps = context.config().steps;
        if let Some(bar) = &self.bar {
            // Both lines are cut to the width of the terminal.
            let style =
                ProgressStyle::with_template("{wide_bar} {pos}/{len}  {eta} left\n{wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_length(self.steps);
            bar.set_position(context.step());
            bar.reset_eta();
        }
        Ok(())
    }

    fn on_event(&mut self, event: &Event) -> Result<(), TrainError> {
        match event {
            Event::Start { step, parameters, experts_per_layer, .. } => {
                let verb = if *step == 0 { "training" } else { "resuming" };
                let experts: usize = experts_per_layer.iter().sum();
                self.say(&format!(
                    "{verb} {:.1} M parameters, {experts} experts in {} layers, from step {step} of {}",
                    *parameters as f64 / 1e6,
                    experts_per_layer.len(),
                    self.steps
                ));
            }
            Event::Step(metrics) => {
                let line = self.step_line(metrics);
                if metrics.step.is_multiple_of(self.every) || metrics.step == self.steps {
                    self.line(metrics.step, &line);
                }
                if let Some(bar) = &self.bar {
                    bar.set_message(line);
                    bar.set_position(metrics.step);
                }
                if metrics.step == self.steps
                    && let Some(bar) = &self.bar
                {
                    bar.finish();
                }
            }
            Event::Rollout(RolloutMetrics { step, held_out, right, reward, tokens, .. }) => {
                let which = if *held_out { "held-out prompts" } else { "rollouts" };
                self.line(
                    *step,
                    &format!(
                        "{which}: {:.1} % right, reward {reward:.2}, {tokens:.1} tokens an answer",
                        100.0 * right
                    ),
                );
            }
            Event::Validation { step, loss, .. } => {
                self.validation = Some(*loss);
                self.line(*step, &format!("validation loss {loss:.4}"));
            }
            Event::Load { step, statistics, .. } => self.loads(*step, statistics),
            Event::Phase { step, stable, layers } => {
                let (phase, count) = (if *stable { "stable" } else { "transition" }, layers.len());
                let moving: Vec<String> = (0..count)
                    .filter(|&layer| !layers[layer])
                    .map(|layer| layer.to_string())
                    .collect();
                let which = match moving.len() {
                    0 => String::new(),
                    n if n == count => ", all moving".into(),
                    1..=12 => format!(", moving: {}", moving.join(" ")),
                    n => format!(", {n} moving"),
                };
                self.line(
                    *step,
                    &format!(
                        "{phase} phase: {} of {count} layers stable{which}",
                        count - moving.len()
                    ),
                );
            }
            Event::Prune {
                step,
                round,
                experts_before,
                experts_after,
                parameters_before,
                parameters_after,
                pruned_load,
                bytes_moved,
                ..
            } => {
                self.dead.clear();
                let left = self.steps.saturating_sub(*step);
                if left.saturating_mul(FEW) < self.steps {
                    self.line(
                        *step,
                        &format!("only {left} steps are left to recover from a prune"),
                    );
                }
                let again = if *round > 1 { format!(" (round {round})") } else { String::new() };
                self.line(*step, &format!(
                    "pruned {experts_before:?} experts to {experts_after:?}{again}: {:.1} M parameters to {:.1} M, {:.1} % of the load{}",
                    *parameters_before as f64 / 1e6,
                    *parameters_after as f64 / 1e6,
                    100.0 * pruned_load,
                    moved(*bytes_moved)
                ));
            }
            Event::Rearrange { step, groups_before, groups_after, bytes_moved, .. } => {
                let worst = |groups: &[f64]| groups.iter().copied().fold(1.0, f64::max);
                let (before, after) = (worst(groups_before), worst(groups_after));
                self.line(*step, &format!(
                    "rearranged the experts: busiest group {before:.2} to {after:.2} times the mean in the worst layer{}",
                    moved(*bytes_moved)
                ));
            }
            Event::Guard { step, loss, allowed_loss, satisfied } => {
                let then = if *satisfied { "the prune stays" } else { "the prune is undone" };
                let found = match loss {
                    Some(loss) if *satisfied => {
                        format!("validation loss {loss:.4} is within {allowed_loss:.4}")
                    }
                    Some(loss) => {
                        format!("validation loss {loss:.4} is not within {allowed_loss:.4}")
                    }
                    None => "the loss is not a number".into(),
                };
                self.line(*step, &format!("guard: {found}, {then}"));
            }
            Event::Skip { step, what, value } => {
                self.line(*step, &format!("the {what} is {value}: the batch is left out"));
            }
            Event::RollBack { step, to_step } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(*to_step);
                }
                self.line(
                    *step,
                    &format!("back to step {to_step}, before the prune; there will be no other"),
                );
            }
            Event::HistoryLost { step, lines, kept_in } => {
                let kept = match kept_in {
                    Some(name) => format!("what there was is kept in {name}"),
                    None => "the file is gone".into(),
                };
                self.line(*step, &format!("{lines} lines of metrics.jsonl are lost: {kept}"));
            }
            Event::Change { step, setting, from, to } => {
                self.line(*step, &format!("{setting} is {to} from here on; it was {from}"));
            }
            _ => {}
        }
        Ok(())
    }
}

fn moved(bytes: u64) -> String {
    if bytes == 0 {
        String::new()
    } else {
        format!("; {:.1} MB moved between devices", bytes as f64 / 1e6)
    }
}
