//! The live display: a progress bar on a terminal, plain lines anywhere else.

use std::io::{IsTerminal, Write, stderr};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    TrainError,
    callback::{Callback, Context, Event, StepMetrics},
};

/// Shows progress, loss, tokens per second and expert imbalance on standard error.
#[derive(Debug)]
pub struct Display {
    bar: Option<ProgressBar>,
    every: u64,
    steps: u64,
    validation: Option<f64>,
}

impl Display {
    /// A live bar if standard error is a terminal, else a line every `every` steps.
    pub fn new(every: u64) -> Self {
        let bar = stderr().is_terminal().then(|| ProgressBar::new(0));
        Self { bar, every: every.max(1), steps: 0, validation: None }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // A closed pipe must not end a run.
            None => drop(writeln!(stderr(), "{line}")),
        }
    }

    fn step_line(&self, metrics: &StepMetrics) -> String {
        let imbalance = metrics.max_over_mean.iter().copied().fold(0.0, f64::max);
        let validation = self.validation.map_or_else(String::new, |loss| format!("  validation {loss:.3}"));
        format!(
            "loss {:.3}{validation}  {:.0} tokens/s  busiest expert {imbalance:.1} x mean",
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
            let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {eta} left\n{msg}");
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
                if let Some(bar) = &self.bar {
                    bar.set_message(self.step_line(metrics));
                    bar.set_position(metrics.step);
                } else if metrics.step.is_multiple_of(self.every) || metrics.step == self.steps {
                    self.say(&format!(
                        "step {:>5}/{}  {}",
                        metrics.step,
                        self.steps,
                        self.step_line(metrics)
                    ));
                }
                if metrics.step == self.steps
                    && let Some(bar) = &self.bar
                {
                    bar.finish();
                }
            }
            Event::Validation { step, loss } => {
                self.validation = Some(*loss);
                if self.bar.is_none() {
                    self.say(&format!("step {step:>5}/{}  validation loss {loss:.4}", self.steps));
                }
            }
            Event::Phase { step, stable, stable_layers, layers } => {
                let phase = if *stable { "stable phase" } else { "transition phase" };
                self.say(&format!(
                    "step {step:>5}/{}  {phase}: loads of {stable_layers} of {layers} layers are stable",
                    self.steps
                ));
            }
            Event::Prune {
                step,
                experts_before,
                experts_after,
                parameters_before,
                parameters_after,
                pruned_load,
            } => {
                self.say(&format!(
                    "step {step:>5}/{}  pruned {experts_before:?} experts to {experts_after:?}: {:.1} M parameters to {:.1} M, {:.1} % of the load",
                    self.steps,
                    *parameters_before as f64 / 1e6,
                    *parameters_after as f64 / 1e6,
                    100.0 * pruned_load
                ));
            }
            _ => {}
        }
        Ok(())
    }
}
