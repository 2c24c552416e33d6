//! Two models on the same items.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;

use crate::{EvalError, ItemScore, Statistic, read, statistic::middle};

/// How two evaluations of a benchmark differ, set by set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Every metric of every set.
    pub sets: Vec<Difference>,
}

/// How a metric of a set differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// The set.
    pub set: String,
    /// The metric.
    pub metric: String,
    /// Items.
    pub items: usize,
    /// Scores of the two, in 0 to 100.
    pub values: [f64; 2],
    /// Where 95 % of the second score less the first lie when items are drawn again, the same ones for
    /// both.
    pub interval: [f64; 2],
    /// Share of these draws in which the difference is zero or of the other sign.
    pub other_sign: f64,
}

/// Of a set and a metric: its statistic, and the numbers of every item.
type Numbers = BTreeMap<(String, String), (Statistic, BTreeMap<String, Vec<f64>>)>;

impl Comparison {
    /// Compares what items scored in two evaluations, by the files of [`ItemScore`]s that they wrote.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, or they are not of the same items.
    pub fn of(files: [&Path; 2]) -> Result<Self, EvalError> {
        let [a, b] = [numbers_in(files[0])?, numbers_in(files[1])?];
        let name = |file: usize| files[file].display();
        for (these, others, at) in [(&a, &b, 0), (&b, &a, 1)] {
            let is_missing = |key: &&(String, String)| {
                others.get(*key).is_none_or(|(statistic, _)| *statistic != these[*key].0)
            };
            if let Some((set, metric)) = these.keys().find(is_missing) {
                let reason =
                    format!("{} has no {metric} of {set}, and {} has", name(1 - at), name(at));
                return Err(EvalError::Incomparable(reason));
            }
        }
        let mut sets = Vec::new();
        for (number, ((set, metric), (statistic, of_a))) in a.into_iter().enumerate() {
            let (_, of_b) = &b[&(set.clone(), metric.clone())];
            if let Some(id) = of_a.keys().find(|id| !of_b.contains_key(*id)) {
                let reason = format!("{} has no item {id}, and {} has", name(1), name(0));
                return Err(EvalError::Incomparable(reason));
            }
            if let Some(id) = of_b.keys().find(|id| !of_a.contains_key(*id)) {
                let reason = format!("{} has no item {id}, and {} has", name(0), name(1));
                return Err(EvalError::Incomparable(reason));
            }
            let of_b: Vec<Vec<f64>> = of_a.keys().map(|id| of_b[id].clone()).collect();
            let of_a: Vec<Vec<f64>> = of_a.into_values().collect();
            let values = [&of_a, &of_b].map(|items| statistic.of(items));
            let found = values[1] - values[0];
            let drawn = statistic.resampled_difference([&of_a, &of_b], number as u64);
            let others = drawn.iter().filter(|drawn| **drawn * found <= 0.0).count();
            sets.push(Difference {
                set,
                metric,
                items: of_a.len(),
                values,
                other_sign: others as f64 / drawn.len().max(1) as f64,
                interval: middle(drawn),
            });
        }
        Ok(Self { sets })
    }
}

fn numbers_in(file: &Path) -> Result<Numbers, EvalError> {
    let mut numbers = Numbers::new();
    read::for_each_value(file, |item: ItemScore| {
        for (metric, (statistic, of_item)) in item.scores {
            if of_item.len() != statistic.width() || of_item.iter().any(|n| !n.is_finite()) {
                let reason = format!("{}: its numbers for {metric} are none", item.id);
                return Err(EvalError::format(file, reason));
            }
            let key = (item.set.clone(), metric);
            let of_set = numbers.entry(key).or_insert_with(|| (statistic, BTreeMap::new()));
            of_set.1.insert(item.id.clone(), of_item);
        }
        Ok(())
    })?;
    Ok(numbers)
}
