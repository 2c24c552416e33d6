//! A run as its metrics file tells it.

use std::{fs, ops::Range, path::Path};

use yuan_laep::{LayerLoad, LoadStatistics, PrunePlan};

use crate::{
    TrainError,
    callback::{Event, MetricsFile, StepMetrics},
};

/// The events of a run, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    events: Vec<Event>,
    /// Stretches that a roll-back undid, each from its prune to the roll-back.
    undone: Vec<Range<usize>>,
}

/// A run up to a prune, between two of them, or after the last.
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

/// A window of loads.
#[derive(Debug, Clone, Copy)]
pub struct Window<'a> {
    /// Steps completed.
    pub step: u64,
    /// Tokens per expert of every layer.
    pub layers: &'a [LayerLoad],
    /// How unequal they are.
    pub statistics: &'a [LoadStatistics],
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
        Ok(Self::new(text.lines().enumerate().map(event).collect::<Result<_, _>>()?))
    }

    /// A run of these events.
    pub fn new(events: Vec<Event>) -> Self {
        let (mut undone, mut latest_prune) = (Vec::new(), None);
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Prune { .. } => latest_prune = Some(at),
                Event::RollBack { .. } => undone.extend(latest_prune.take().map(|prune| prune..at + 1)),
                _ => {}
            }
        }
        Self { events, undone }
    }

    /// All events, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Every event that no roll-back undid, with its index among all [`events`](Self::events).
    pub fn lasting(&self) -> impl Iterator<Item = (usize, &Event)> {
        let is_undone = |at: usize| self.undone.iter().any(|range| range.contains(&at));
        self.events.iter().enumerate().filter(move |(at, _)| !is_undone(*at))
    }

    /// The stretches of events that a roll-back undid.
    pub fn undone(&self) -> impl Iterator<Item = &[Event]> {
        self.undone.iter().map(|range| &self.events[range.clone()])
    }

    /// All optimizer steps that were not undone.
    pub fn steps(&self) -> impl Iterator<Item = &StepMetrics> {
        self.lasting().filter_map(|(_, event)| match event {
            Event::Step(metrics) => Some(metrics),
            _ => None,
        })
    }

    /// All validations that were not undone, as step and loss.
    pub fn validations(&self) -> impl Iterator<Item = (u64, f64)> {
        self.lasting().filter_map(|(_, event)| match event {
            Event::Validation { step, loss } => Some((*step, *loss)),
            _ => None,
        })
    }

    /// All windows of loads that were not undone.
    pub fn windows(&self) -> impl Iterator<Item = Window<'_>> {
        self.lasting().filter_map(|(_, event)| match event {
            Event::Load { step, layers, statistics, .. } => Some(Window { step: *step, layers, statistics }),
            _ => None,
        })
    }

    /// All prunes that were not undone, as step and plan.
    pub fn prunes(&self) -> impl Iterator<Item = (u64, &PrunePlan)> {
        self.lasting().filter_map(|(_, event)| match event {
            Event::Prune { step, plan, .. } => Some((*step, plan)),
            _ => None,
        })
    }

    /// The run before its first prune, after it, after the second …; nothing for an empty file.
    pub fn phases(&self) -> Vec<Phase> {
        let events: Vec<&Event> = self.lasting().map(|(_, event)| event).collect();
        let Some((parameters, experts_per_layer)) = events.iter().find_map(|event| match event {
            Event::Start { parameters, experts_per_layer, .. } => {
                Some((*parameters, experts_per_layer.clone()))
            }
            _ => None,
        }) else {
            return Vec::new();
        };
        let (mut phases, mut start, mut current) = (Vec::new(), 0, (parameters, experts_per_layer));
        for (at, event) in events.iter().enumerate() {
            if let Event::Prune { parameters_after, experts_after, .. } = event {
                let before = std::mem::replace(&mut current, (*parameters_after, experts_after.clone()));
                phases.push(phase(&events[start..at], before));
                start = at + 1;
            }
        }
        phases.push(phase(&events[start..], current));
        phases
    }
}

fn phase(events: &[&Event], (parameters, experts_per_layer): (u64, Vec<usize>)) -> Phase {
    let mut phase = Phase {
        step: events.last().map_or(0, |event| event.step()),
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
