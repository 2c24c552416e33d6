//! Whether settings, model and devices fit each other: found out before a run, not in the middle of
//! it.

use serde_json::Value;
use yuan_laep::PlanError;
use yuan_model::{YuanConfig, ranks::Grid};

use crate::{Freeze, Learns, TrainConfig, TrainError, Trigger};

/// Checks settings and model of a new run together, so that nothing is found out in the middle of
/// it.
///
/// # Errors
///
/// Names the setting that is out of range, does not fit the model, or could not have an effect.
pub fn check_settings(config: &TrainConfig, model: &YuanConfig) -> Result<(), TrainError> {
    check_use(config, model)?;
    let laep = &config.laep;
    if laep.trigger != Trigger::Never && laep.plan.is_none() {
        let most = model.experts_per_layer.iter().max().copied().unwrap_or(0);
        if laep.limits.min_experts > most {
            let expected = format!("must be at most the {most} experts of a layer");
            let (name, value) = ("min_experts", laep.limits.min_experts as f64);
            return Err(TrainError::OutOfRange { name, value, expected });
        }
    }
    check_time(config)
}

/// Checks what a run, however old, cannot be used without.
///
/// # Errors
///
/// Names the setting that is out of range or does not fit the model.
pub(super) fn check_use(config: &TrainConfig, model: &YuanConfig) -> Result<(), TrainError> {
    config.validate()?;
    if config.bias_update_rate.is_some() && !model.router_selection_bias {
        return Err(TrainError::NoSelectionBias);
    }
    if config.freeze != Freeze::default() && model.images.is_none() {
        return Err(TrainError::NothingToFreeze);
    }
    if config.freeze.language && config.learns != Learns::All {
        return Err(TrainError::NothingLearns);
    }
    let (experts, top_k) = (&model.experts_per_layer, model.top_k);
    let laep = &config.laep;
    if let Some(plan) = &laep.plan {
        plan.check_against(experts, top_k)?;
    }
    if laep.trigger != Trigger::Never && laep.plan.is_none() {
        laep.limits.check_model(experts, top_k)?;
    }
    if laep.rearrange_every.is_some() {
        check_groups(experts, laep.groups)?;
        if let Some(plan) = &laep.plan {
            check_groups(&plan.experts_per_layer(), laep.groups)?;
        }
    }
    Ok(())
}

/// Checks that the experts of every layer can be spread over the groups in equal parts.
///
/// # Errors
///
/// Names the first layer that cannot.
pub(crate) fn check_groups(experts_per_layer: &[usize], groups: usize) -> Result<(), PlanError> {
    for (layer, &num_experts) in experts_per_layer.iter().enumerate() {
        if !num_experts.is_multiple_of(groups) {
            return Err(PlanError::Ungrouped { layer, num_experts, groups });
        }
    }
    Ok(())
}

/// Checks that what is to happen after certain steps can happen before the run ends.
fn check_time(config: &TrainConfig) -> Result<(), TrainError> {
    let laep = &config.laep;
    let last = match &laep.trigger {
        Trigger::Never => None,
        Trigger::Steps(at) => at.last().copied(),
        // The earliest.
        Trigger::Stable { .. } => laep.window_steps.checked_mul(laep.stability.windows as u64 + 1),
    };
    let (Some(last), end) = (last, config.steps) else { return Ok(()) };
    if laep.guard.is_none() && matches!(laep.trigger, Trigger::Stable { .. }) {
        // A run that is too short for stable loads prunes nothing, and says so.
        return Ok(());
    }
    if last > end {
        return Err(TrainError::PruneAfterEnd { step: last, steps: end });
    }
    match config.laep.guard {
        Some(guard) if last.saturating_add(guard.steps) > end => {
            Err(TrainError::NoTimeToGuard { step: last, needs: guard.steps, steps: end })
        }
        _ => Ok(()),
    }
}

/// Checks that rows and experts can be spread over ranks, and the groups of a plan in equal parts.
///
/// # Errors
///
/// Names what cannot.
pub fn check_ranks(config: &TrainConfig, model: &YuanConfig, grid: Grid) -> Result<(), TrainError> {
    check_rows(config, grid)?;
    grid.check(model)?;
    let (groups, ranks) = (config.laep.groups, grid.expert());
    let is_spread = config.laep.trigger != Trigger::Never || config.laep.rearrange_every.is_some();
    if is_spread && !groups.is_multiple_of(ranks) {
        return Err(TrainError::UnevenGroups { groups, ranks });
    }
    Ok(())
}

/// Checks that every rank gets a row of each batch.
///
/// # Errors
///
/// If there are more ranks than rows.
pub fn check_rows(config: &TrainConfig, grid: Grid) -> Result<(), TrainError> {
    let (rows, ranks) = (config.batch_size, grid.size());
    match rows < ranks {
        true => Err(TrainError::TooFewRows { rows, ranks }),
        false => Ok(()),
    }
}

/// Settings, by their names in `run.json`, that a run may go on with otherwise than it began.
pub const CHANGEABLE_SETTINGS: [&str; 8] = [
    "steps",
    "batch_size",
    "accumulation",
    "validate_every",
    "checkpoint_every",
    "async_checkpoint",
    "laep.groups",
    "laep.limits.multiple_of",
];

/// The value of a setting, `laep.groups`, if it has one.
pub(crate) fn value_of<'a>(settings: &'a Value, name: &str) -> Option<&'a Value> {
    settings.pointer(&format!("/{}", name.replace('.', "/"))).filter(|value| !value.is_null())
}

/// The settings as `run.json` holds them.
pub(crate) fn to_json(config: &TrainConfig) -> Value {
    serde_json::to_value(config).expect("settings are plain data")
}

/// The first setting, by its name in `run.json`, that differs and may not change in a run.
pub(super) fn fixed_setting(old: &TrainConfig, new: &TrainConfig) -> Option<String> {
    difference(&to_json(old), &to_json(new), "")
}

/// Where two values differ first in what may not change: `laep.limits.beta`.
fn difference(old: &Value, new: &Value, path: &str) -> Option<String> {
    let path = path.trim_start_matches('.');
    if CHANGEABLE_SETTINGS.contains(&path) {
        return None;
    }
    let (Some(olds), Some(news)) = (old.as_object(), new.as_object()) else {
        return (old != new).then(|| path.to_owned());
    };
    let names = olds.keys().chain(news.keys().filter(|name| !olds.contains_key(*name)));
    names.into_iter().find_map(|name| {
        difference(&old[name.as_str()], &new[name.as_str()], &format!("{path}.{name}"))
    })
}
