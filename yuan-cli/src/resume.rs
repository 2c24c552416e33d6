//! `yuan pretrain --resume`: the options that the run was made with hold again, but for those that
//! may change in the middle of a run.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::bail;
use clap::Command;
use toml::Value;
use yuan::{
    files::is_same,
    laep::PerLayer,
    train::{CHANGEABLE_SETTINGS, MetricsFile, Run},
};

use crate::{merge, merge::Known};

/// Where runs are that nobody named.
pub const RUNS: &str = "runs";

/// Options that are no setting of the run: where and how it is computed this time.
const OF_THIS_TIME: [&str; 4] = ["device", "data-parallel", "patience", "portable"];

/// Whether a resumed run may have an option otherwise than before.
fn may_change(option: &str) -> bool {
    let is_named = |setting: &str| {
        let name = setting.rsplit('.').next().unwrap_or(setting);
        name.replace('_', "-") == option || (name, option) == ("batch_size", "batch")
    };
    OF_THIS_TIME.contains(&option) || CHANGEABLE_SETTINGS.into_iter().any(is_named)
}

/// Arguments, and the names of the options that the user gave.
pub struct Given {
    pub arguments: Vec<OsString>,
    pub names: BTreeSet<String>,
}

/// The arguments; of a command that resumes a run, with the run's own options behind it.
///
/// # Errors
///
/// If an option that may not change is not as it was, or the run's file of options is damaged.
pub fn with_options_of_run(program: &Command, arguments: Vec<OsString>) -> anyhow::Result<Given> {
    let Some((at, known)) = Known::of(program, &arguments) else {
        return Ok(Given { arguments, names: BTreeSet::new() });
    };
    let names = known.typed(&arguments).names;
    if known.command() != "pretrain" || !names.contains("resume") {
        return Ok(Given { arguments, names });
    }
    let named = known.value_of("run", &arguments[at + 1..]).map(PathBuf::from);
    let Some(run) = named.clone().or_else(|| latest(Path::new(RUNS))) else {
        // The command itself says what is missing.
        return Ok(Given { arguments, names });
    };
    let mut options = match named {
        Some(_) => Vec::new(),
        None => vec!["--run".into(), run.clone().into_os_string()],
    };
    if run.join(Run::SETTINGS).is_file() {
        refuse_changes(&known, &run, known.given(&arguments[at + 1..]))?;
        let file = run.join(Run::OPTIONS);
        if file.is_file() {
            options.extend(known.options_of(&names, &file)?);
        }
    }
    Ok(Given { arguments: merge::inserted(&arguments, at, options), names })
}

/// Refuses an option that the run was made with another value of.
fn refuse_changes(known: &Known, run: &Path, given: toml::Table) -> anyhow::Result<()> {
    let shown = run.display();
    let file = run.join(Run::OPTIONS);
    let own = match file.is_file() {
        true => Some(known.given(&known.options_of(&BTreeSet::new(), &file)?)),
        false => None,
    };
    for (name, value) in given {
        if may_change(&name) {
            continue;
        }
        let Some(own) = &own else {
            bail!(
                "--{name} cannot be given with --resume: the run in {shown} goes on by its own \
                 settings ({})",
                Run::SETTINGS
            );
        };
        let before = own.get(&name).map(text).or_else(|| known.default_of(&name));
        let now = text(&value);
        let is_same = before.as_deref().is_some_and(|before| is_equal(before, &now));
        if is_same || is_in_force(run, &name, &now) {
            continue;
        }
        let rest = "leave the option out, or start another run";
        match (value, before) {
            (Value::Boolean(_), _) => {
                bail!("--{name}: the run in {shown} was made without: {rest}")
            }
            (_, Some(before)) => {
                bail!("--{name} {now}: the run in {shown} was made with {before}: {rest}")
            }
            (_, None) => bail!("--{name} {now}: the run in {shown} was made without: {rest}"),
        }
    }
    Ok(())
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Whether an option without a default says what holds in the run anyway.
fn is_in_force(run: &Path, name: &str, now: &str) -> bool {
    let Ok(run) = Run::open(run) else { return false };
    let limits = &run.config().laep.limits;
    let is = |limit: &PerLayer| now.parse::<PerLayer>().is_ok_and(|now| now == *limit);
    match name {
        "alpha" => is(&limits.alpha),
        "beta" => is(&limits.beta),
        "min-experts" => is_equal(now, &limits.min_experts.to_string()),
        _ => false,
    }
}

/// Whether two texts are the same, the same number, or names of the same file.
fn is_equal(one: &str, other: &str) -> bool {
    let integers = (one.parse::<i128>(), other.parse::<i128>());
    let numbers = (one.parse::<f64>(), other.parse::<f64>());
    match (integers, numbers) {
        ((Ok(one), Ok(other)), _) => one == other,
        (_, (Ok(one), Ok(other))) => one == other,
        _ => one == other || is_same(Path::new(one), Path::new(other)),
    }
}

/// The run that was written into last.
fn latest(runs: &Path) -> Option<PathBuf> {
    let written = |run: &Path| -> Option<SystemTime> {
        let time = |name| fs::metadata(run.join(name)).and_then(|file| file.modified()).ok();
        let settings = time(Run::SETTINGS)?;
        Some(time(MetricsFile::NAME).map_or(settings, |metrics| metrics.max(settings)))
    };
    let found = fs::read_dir(runs).ok()?.flatten().map(|entry| entry.path());
    let found = found.filter_map(|run| Some((written(&run)?, run)));
    found.max().map(|(_, run)| run)
}
