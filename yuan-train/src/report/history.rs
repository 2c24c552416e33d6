//! A run as its metrics file tells it.

use std::{fs, path::Path};

use yuan_laep::LayerLoad;

use crate::{
    TrainError,
    callback::{Event, MetricsFile, StepMetrics},
};

/// The events of a run, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    events: Vec<Event>,
}

/// A run before its prune, or after it; a run that never pruned has only the former.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// Steps completed at its end.
    pub step: u64,
    /// Parameters of the model.
    pub parameters: u64,
    /// Experts of every layer.
    pub experts_per_layer: Vec<usize>,
    /// Median over its steps; none for a phase without steps.
    pub tokens_per_second: Option<f64>,
    /// Its last validation, as step and loss.
    pub validation: Option<(u64, f64)>,
    /// Loads of its last complete window.
    pub loads: Option<Vec<LayerLoad>>,
}

impl History {
    /// Reads `metrics.jsonl` of a run directory.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or a line is no event.
    pub fn read(run_dir: &Path) -> Result<Self, TrainError> {
        let path = run_dir.join(MetricsFile::NAME);
        let text = fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let event = |(number, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|error| TrainError::Io {
                action: "understand",
                path: path.clone(),
                source: std::io::Error::other(format!("line {}: {error}", number + 1)),
            })
        };
        Ok(Self { events: text.lines().enumerate().map(event).collect::<Result<_, _>>()? })
    }

    /// All events, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// All optimizer steps.
    pub fn steps(&self) -> impl Iterator<Item = &StepMetrics> {
        self.events.iter().filter_map(|event| match event {
            Event::Step(metrics) => Some(metrics),
            _ => None,
        })
    }

    /// All validations, as step and loss.
    pub fn validations(&self) -> impl Iterator<Item = (u64, f64)> {
        self.events.iter().filter_map(|event| match event {
            Event::Validation { step, loss } => Some((*step, *loss)),
            _ => None,
        })
    }

    /// Step after which experts were pruned.
    pub fn pruned_at(&self) -> Option<u64> {
        self.events.iter().find(|event| matches!(event, Event::Prune { .. })).map(Event::step)
    }

    /// The run before its prune, and after it if there was one; nothing for an empty file.
    pub fn phases(&self) -> Vec<Phase> {
        let Some((parameters, experts_per_layer)) = self.events.iter().find_map(|event| match event {
            Event::Start { parameters, experts_per_layer, .. } => {
                Some((*parameters, experts_per_layer.clone()))
            }
            _ => None,
        }) else {
            return Vec::new();
        };
        let (mut phases, mut start, mut current) = (Vec::new(), 0, (parameters, experts_per_layer));
        for (at, event) in self.events.iter().enumerate() {
            if let Event::Prune { parameters_after, experts_after, .. } = event {
                let before = std::mem::replace(&mut current, (*parameters_after, experts_after.clone()));
                phases.push(phase(&self.events[start..at], before));
                start = at + 1;
            }
        }
        phases.push(phase(&self.events[start..], current));
        phases
    }
}

fn phase(events: &[Event], (parameters, experts_per_layer): (u64, Vec<usize>)) -> Phase {
    let mut phase = Phase {
        step: events.last().map_or(0, Event::step),
        parameters,
        experts_per_layer,
        tokens_per_second: None,
        validation: None,
        loads: None,
    };
    let mut speeds = Vec::new();
    for event in events {
        match event {
            Event::Step(metrics) => speeds.push(metrics.tokens as f64 / metrics.seconds),
            Event::Validation { step, loss } => phase.validation = Some((*step, *loss)),
            Event::Load { layers, .. } => phase.loads = Some(layers.clone()),
            _ => {}
        }
    }
    speeds.sort_by(f64::total_cmp);
    phase.tokens_per_second = speeds.get(speeds.len() / 2).copied();
    phase
}
