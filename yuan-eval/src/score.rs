//! From answers to scores.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{
    Answers, Benchmark, EvalError, Item, OutsideScores, Profile, Statistic, statistic::middle,
};

/// What came of the answers to a benchmark.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// The benchmark.
    pub benchmark: Benchmark,
    /// Whose rules were used.
    pub profile: Profile,
    /// Every metric of every set.
    pub sets: Vec<SetScore>,
    /// The mean that is published of the benchmark, if all that it is made of is there.
    pub average: Option<Average>,
    /// Parts of that mean that are missing.
    pub missing: Vec<String>,
    /// Items.
    pub items: u64,
    /// Those of them that have an answer; the others count as wrong.
    pub answered: u64,
    /// Answers to no item of the files that are there.
    pub unknown: u64,
    /// Scores from outside that belong to no item.
    pub unused_scores: u64,
    /// Lines that are no answers, and the first of them.
    pub malformed: (u64, Option<String>),
    /// Lines that answer an item again; the last one counts.
    pub repeated: u64,
    /// Answers that score lowest.
    pub worst: Vec<Worst>,
}

/// A metric of a set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetScore {
    /// The set.
    pub set: String,
    /// The metric.
    pub metric: String,
    /// In 0 to 100.
    pub value: f64,
    /// Where 95 % of it lie when items are drawn again.
    pub interval: [f64; 2],
    /// Items of the set.
    pub items: u64,
    /// Those of them that have an answer.
    pub answered: u64,
    /// Words of an answer in the mean.
    pub words: f64,
}

/// A mean over sets.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Average {
    /// In 0 to 100.
    pub value: f64,
    /// Where 95 % of it lie when the items of every set are drawn again.
    pub interval: [f64; 2],
}

/// What one item adds to the sums of its metrics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ItemScore {
    /// The item.
    pub id: String,
    /// Its set.
    pub set: String,
    /// Whether it has an answer.
    pub answered: bool,
    /// By the names of the metrics: how they become a score, and the numbers.
    pub scores: BTreeMap<String, (Statistic, Vec<f64>)>,
}

/// An answer that scores low.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worst {
    /// The item.
    pub id: String,
    /// What it alone scores, in 0 to 100.
    pub value: f64,
    /// The end of what was asked.
    pub asked: String,
    /// The beginning of what was answered.
    pub answered: String,
    /// The beginning of what is right.
    pub right: String,
}

/// Answers that score lowest, in number.
const WORST: usize = 12;
/// Characters that are shown of a text.
const SHOWN: usize = 400;

/// The numbers of a set, in the order of its items.
#[derive(Default)]
struct Sums {
    answered: u64,
    words: u64,
    items: u64,
    metrics: Vec<(String, Statistic, Vec<Vec<f64>>)>,
}

impl Scored {
    /// Scores answers. `each` is shown what every item scores; of each set only the first items are
    /// taken if there is a limit.
    ///
    /// # Errors
    ///
    /// If the data cannot be read, or `each` fails.
    pub fn of(
        benchmark: Benchmark,
        data: &Path,
        profile: Profile,
        answers: &Answers,
        outside: &OutsideScores,
        limit: Option<u64>,
        mut each: impl FnMut(ItemScore) -> Result<(), EvalError>,
    ) -> Result<Self, EvalError> {
        let mut order: Vec<String> = Vec::new();
        let mut sets: BTreeMap<String, Sums> = BTreeMap::new();
        let mut worst: Vec<Worst> = Vec::new();
        let mut ids = HashSet::new();
        let mut with_outside = 0;
        benchmark.for_each(data, profile, limit, |item| {
            let sums = sets.entry(item.set.clone()).or_insert_with(|| {
                order.push(item.set.clone());
                Sums::default()
            });
            if !ids.insert(item.id.clone()) {
                return Err(EvalError::Incomparable(format!("two items have the id {}", item.id)));
            }
            with_outside += usize::from(outside.know(&item.id));
            let answer = answers.get(&item.id);
            let said = answer.map(|answer| benchmark.cut(&answer.answer, profile));
            let scores = scores_of(&item, said.as_deref(), outside);
            sums.add(&scores, said.as_deref());
            if let (Some(said), Some((_, statistic, numbers))) = (said, scores.first()) {
                note(&mut worst, &item, &said, statistic.value(numbers));
            }
            let scores = scores.into_iter().map(|(name, s, numbers)| (name, (s, numbers)));
            let (id, set) = (item.id, item.set);
            each(ItemScore { id, set, answered: answer.is_some(), scores: scores.collect() })
        })?;
        if ids.is_empty() {
            let reason = format!("{} holds no item of {benchmark}", data.display());
            return Err(EvalError::Incomparable(reason));
        }
        let answered: u64 = sets.values().map(|sums| sums.answered).sum();
        let (mut found, resampled) = set_scores(&order, &sets);
        let (average, missing) = average(benchmark, &found, &resampled);
        found.extend(group_scores(benchmark, &found, &resampled));
        Ok(Self {
            benchmark,
            profile,
            sets: found,
            average,
            missing,
            items: sets.values().map(|sums| sums.items).sum(),
            answered,
            unknown: if limit.is_some() { 0 } else { answers.len() as u64 - answered },
            unused_scores: if limit.is_some() { 0 } else { (outside.len() - with_outside) as u64 },
            malformed: (answers.malformed, answers.first_malformed.clone()),
            repeated: answers.repeated,
            worst,
        })
    }
}

/// Names, statistics and numbers of an item's metrics.
fn scores_of(
    item: &Item,
    said: Option<&str>,
    outside: &OutsideScores,
) -> Vec<(String, Statistic, Vec<f64>)> {
    let numbers = item.gold.score(said.unwrap_or_default());
    let own = item.gold.metrics().iter().zip(numbers);
    let mut scores: Vec<_> =
        own.map(|(&(name, statistic), n)| (name.to_owned(), statistic, n)).collect();
    if matches!(item.gold, crate::Gold::Summary(_)) {
        for name in OutsideScores::NAMES.into_iter().filter(|name| outside.have(name)) {
            // An answer without this score leaves its set without it.
            let points = match said {
                Some(_) => outside.get(&item.id, name),
                None => Some(0.0),
            };
            scores
                .extend(points.map(|points| (name.to_owned(), Statistic::Mean, vec![points, 1.0])));
        }
    }
    scores
}

impl Sums {
    fn add(&mut self, scores: &[(String, Statistic, Vec<f64>)], said: Option<&str>) {
        self.items += 1;
        self.answered += u64::from(said.is_some());
        self.words += said.map_or(0, |said| said.split_whitespace().count() as u64);
        for (name, statistic, numbers) in scores {
            let at = self.metrics.iter().position(|(known, ..)| known == name);
            let at = at.unwrap_or_else(|| {
                self.metrics.push((name.clone(), *statistic, Vec::new()));
                self.metrics.len() - 1
            });
            self.metrics[at].2.push(numbers.clone());
        }
    }
}

/// Keeps the answers that score lowest.
fn note(worst: &mut Vec<Worst>, item: &Item, said: &str, value: f64) {
    if worst.len() == WORST && worst.last().is_some_and(|last| last.value <= value) {
        return;
    }
    let beginning = |text: &str| -> String { text.chars().take(SHOWN).collect() };
    let skipped = item.prompt.chars().count().saturating_sub(SHOWN);
    let at = worst.partition_point(|other| other.value <= value);
    let found = Worst {
        id: item.id.clone(),
        value,
        asked: item.prompt.chars().skip(skipped).collect(),
        answered: beginning(said),
        right: beginning(&item.gold.shown()),
    };
    worst.insert(at, found);
    worst.truncate(WORST);
}

/// Scores of all sets, and beside each of them those of items that were drawn again.
fn set_scores(order: &[String], sets: &BTreeMap<String, Sums>) -> (Vec<SetScore>, Vec<Vec<f64>>) {
    let (mut found, mut resampled) = (Vec::new(), Vec::new());
    for (number, set) in order.iter().enumerate() {
        let sums = &sets[set];
        let whole = |(_, _, items): &&(_, _, Vec<_>)| items.len() as u64 == sums.items;
        for (metric, statistic, items) in sums.metrics.iter().filter(whole) {
            let drawn = statistic.resampled(items, number as u64);
            found.push(SetScore {
                set: set.clone(),
                metric: metric.clone(),
                value: statistic.of(items),
                interval: middle(drawn.clone()),
                items: sums.items,
                answered: sums.answered,
                words: sums.words as f64 / sums.answered.max(1) as f64,
            });
            resampled.push(drawn);
        }
    }
    (found, resampled)
}

/// Means of sets that are published, of those that are there.
fn group_scores(benchmark: Benchmark, found: &[SetScore], resampled: &[Vec<f64>]) -> Vec<SetScore> {
    let mut groups = Vec::new();
    for (name, metric, sets) in benchmark.groups() {
        let place = |set: &&str| {
            found.iter().position(|score| score.set == **set && score.metric == metric)
        };
        let Some(places) = sets.iter().map(place).collect::<Option<Vec<_>>>() else {
            continue;
        };
        let mean = |of: &dyn Fn(usize) -> f64| {
            places.iter().map(|&at| of(at)).sum::<f64>() / places.len() as f64
        };
        let draws = resampled[places[0]].len();
        let drawn = (0..draws).map(|draw| mean(&|at| resampled[at][draw])).collect();
        groups.push(SetScore {
            set: name.into(),
            metric: metric.into(),
            value: mean(&|at| found[at].value),
            interval: middle(drawn),
            items: places.iter().map(|&at| found[at].items).sum(),
            answered: places.iter().map(|&at| found[at].answered).sum(),
            words: mean(&|at| found[at].words),
        });
    }
    groups
}

/// The published mean, or what it lacks.
fn average(
    benchmark: Benchmark,
    found: &[SetScore],
    resampled: &[Vec<f64>],
) -> (Option<Average>, Vec<String>) {
    let (mut value, mut drawn, mut missing) = (0.0, Vec::new(), Vec::new());
    for (set, metric, weight) in benchmark.mean_of() {
        let at = found.iter().position(|score| score.set == set && score.metric == metric);
        let Some(at) = at else {
            missing.push(format!("{set} ({metric})"));
            continue;
        };
        value += weight * found[at].value;
        drawn.resize(resampled[at].len(), 0.0);
        drawn.iter_mut().zip(&resampled[at]).for_each(|(sum, one)| *sum += weight * one);
    }
    match missing.is_empty() {
        true => (Some(Average { value, interval: middle(drawn) }), missing),
        false => (None, missing),
    }
}
