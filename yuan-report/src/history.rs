//! A run as its metrics file tells it.

use std::{fs, ops::Range, path::Path};

use yuan_files::FileError;
use yuan_laep::{LayerLoad, LoadStatistics, PrunePlan};
use yuan_train::{Event, MetricsFile, RolloutMetrics, StepMetrics};

use crate::ReportError;

/// Steps that a picture has room for, and more than any run takes.
const MOST_STEPS: u64 = 1 << 40;

/// The events of a run, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    events: Vec<Event>,
    /// Stretches that a roll-back undid, each from its prune to the roll-back.
    undone: Vec<Range<usize>>,
}

/// A run up to a prune, between two of them, or after the last.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// Steps completed at its end.
    pub step: u64,
    /// Parameters of the model.
    pub parameters: u64,
    /// Experts of every layer.
    pub experts_per_layer: Vec<usize>,
    /// Median over its steps; none for a stage without steps.
    pub tokens_per_second: Option<f64>,
    /// Its last validation, as step and loss.
    pub validation: Option<(u64, f64)>,
    /// Loads of its last complete window.
    pub loads: Option<Vec<LayerLoad>>,
    /// Where all this was read.
    pub lines: StageLines,
}

/// Indices of the events that a stage was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageLines {
    /// The start of the run, or the prune that the stage begins with: they say what the model is.
    pub model: usize,
    /// The last validation.
    pub validation: Option<usize>,
    /// The last window of loads.
    pub load: Option<usize>,
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
    /// Everything of a run but how long it took and where it was interrupted: a run that was
    /// resumed has the story of the uninterrupted one.
    pub fn story(&self) -> Vec<Event> {
        let mut story = Vec::with_capacity(self.events.len());
        for event in &self.events {
            match event.clone() {
                Event::Start { .. } | Event::Change { .. } => {}
                Event::Step(metrics) => {
                    story.push(Event::Step(StepMetrics { seconds: 0.0, ..metrics }));
                }
                Event::Rollout(metrics) => {
                    story.push(Event::Rollout(RolloutMetrics { seconds: 0.0, ..metrics }));
                }
                mut other => {
                    // It rests on speeds that were measured.
                    if let Event::Prune { predicted_gain, .. } = &mut other {
                        *predicted_gain = None;
                    }
                    story.push(other);
                }
            }
        }
        story
    }

    /// Reads `metrics.jsonl` of a run directory. A last line that is cut off, as a run that was
    /// killed leaves it, is left out.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or a line is no event.
    pub fn read(run_dir: &Path) -> Result<Self, ReportError> {
        let path = run_dir.join(MetricsFile::NAME);
        let text = fs::read_to_string(&path).map_err(FileError::of("read", &path))?;
        let mut events = Vec::new();
        for (index, line) in text.split_inclusive('\n').enumerate() {
            let reason = match serde_json::from_str::<Event>(line) {
                Ok(event) if event.step() <= MOST_STEPS => {
                    events.push(event);
                    continue;
                }
                Ok(event) => format!("there is no step {}", event.step()),
                Err(_) if !line.ends_with('\n') => continue,
                // The line as JSON is always line 1.
                Err(error) => error.to_string().replace(" at line 1 column ", " at column "),
            };
            let cause = std::io::Error::other(format!("line {}: {reason}", index + 1));
            return Err(FileError { action: "understand", path, cause }.into());
        }
        Ok(Self::new(events))
    }

    /// A run of these events.
    pub fn new(events: Vec<Event>) -> Self {
        let (mut undone, mut latest_prune) = (Vec::new(), None);
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Prune { .. } => latest_prune = Some(at),
                Event::RollBack { .. } => {
                    undone.extend(latest_prune.take().map(|prune| prune..at + 1));
                }
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

    /// What came of answers to prompts: those that are learnt from, or the held-out ones.
    pub fn rollouts(&self, held_out: bool) -> impl Iterator<Item = &RolloutMetrics> {
        self.lasting().filter_map(move |(_, event)| match event {
            Event::Rollout(metrics) if metrics.held_out == held_out => Some(metrics),
            _ => None,
        })
    }

    /// The stretches of events that a roll-back undid.
    pub fn undone(&self) -> impl Iterator<Item = &[Event]> {
        self.undone.iter().map(|range| &self.events[range.clone()])
    }

    /// The latest step that anything is told of, at least 1: how far pictures reach.
    pub(crate) fn last_step(&self) -> f64 {
        self.events.iter().map(Event::step).max().unwrap_or(1).max(1) as f64
    }

    /// Lines of the metrics file that were lost: what they told is unknown.
    pub fn lost_lines(&self) -> usize {
        let lost = self.events.iter().map(|event| match event {
            Event::HistoryLost { lines, .. } => *lines,
            _ => 0,
        });
        lost.fold(0, usize::saturating_add)
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
            Event::Validation { step, loss, .. } => Some((*step, *loss)),
            _ => None,
        })
    }

    /// All windows of loads that were not undone.
    pub fn windows(&self) -> impl Iterator<Item = Window<'_>> {
        self.lasting().filter_map(|(_, event)| match event {
            Event::Load { step, layers, statistics, .. } => {
                Some(Window { step: *step, layers, statistics })
            }
            _ => None,
        })
    }

    /// The last window of the loads of images and of text, if images were learnt from.
    pub fn image_loads(&self) -> Option<(&[LayerLoad], &[LayerLoad])> {
        let last = self.lasting().filter_map(|(_, event)| match event {
            Event::ImageLoad { images, text, .. } => Some((&images[..], &text[..])),
            _ => None,
        });
        last.last()
    }

    /// All prunes that were not undone, as step and plan.
    pub fn prunes(&self) -> impl Iterator<Item = (u64, &PrunePlan)> {
        self.lasting().filter_map(|(_, event)| match event {
            Event::Prune { step, plan, .. } => Some((*step, plan)),
            _ => None,
        })
    }

    /// Steps after which the experts were spread over the devices anew without a prune, and it was
    /// not undone.
    pub fn rearrangements(&self) -> impl Iterator<Item = u64> {
        self.lasting().filter_map(|(_, event)| match event {
            Event::Rearrange { step, .. } => Some(*step),
            _ => None,
        })
    }

    /// The run before its first prune, after it, after the second …; nothing for an empty file.
    pub fn stages(&self) -> Vec<Stage> {
        let mut stages: Vec<(Stage, Vec<f64>)> = Vec::new();
        for (line, event) in self.lasting() {
            let begins = match event {
                // A resumed run starts again, but it is the same run.
                Event::Start { parameters, experts_per_layer, .. } if stages.is_empty() => {
                    Some((*parameters, experts_per_layer))
                }
                Event::Prune { parameters_after, experts_after, .. } => {
                    Some((*parameters_after, experts_after))
                }
                _ => None,
            };
            if let Some((parameters, experts_per_layer)) = begins {
                let lines = StageLines { model: line, validation: None, load: None };
                let stage = Stage {
                    step: event.step(),
                    parameters,
                    experts_per_layer: experts_per_layer.clone(),
                    tokens_per_second: None,
                    validation: None,
                    loads: None,
                    lines,
                };
                stages.push((stage, Vec::new()));
            } else if let Some((stage, speeds)) = stages.last_mut() {
                stage.add(line, event, speeds);
            }
        }
        let finished = stages.into_iter().map(|(stage, mut speeds)| {
            speeds.sort_by(f64::total_cmp);
            Stage { tokens_per_second: speeds.get(speeds.len() / 2).copied(), ..stage }
        });
        finished.collect()
    }
}

impl Stage {
    fn add(&mut self, line: usize, event: &Event, speeds: &mut Vec<f64>) {
        self.step = event.step();
        match event {
            Event::Step(metrics) => speeds.push(metrics.tokens as f64 / metrics.seconds),
            Event::Validation { step, loss, .. } => {
                (self.validation, self.lines.validation) = (Some((*step, *loss)), Some(line));
            }
            Event::Load { layers, .. } => {
                (self.loads, self.lines.load) = (Some(layers.clone()), Some(line));
            }
            _ => {}
        }
    }
}
