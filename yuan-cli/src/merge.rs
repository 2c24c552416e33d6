//! Settings from a TOML file: they become options in front of those that were typed, which
//! therefore win.
//!
//! A key is the name of an option without its dashes. Tables only order the file: `beta` may stand
//! in a table `[laep]` or at the top.

use std::{ffi::OsString, fs, path::Path};

use anyhow::{Context, bail};
use toml::{Table, Value};

/// The arguments, with the keys of the file that `--config` names as options behind the command.
pub fn with_config_file(
    arguments: impl Iterator<Item = OsString>,
) -> anyhow::Result<Vec<OsString>> {
    let arguments: Vec<OsString> = arguments.collect();
    let Some(path) = value_of(&arguments, "--config") else { return Ok(arguments) };
    let shown = Path::new(&path).display();
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {shown}"))?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        anyhow::anyhow!("{shown} is no TOML file: {}", error.message())
    })?;
    let mut options = Vec::new();
    flatten(&table, &mut options).with_context(|| format!("cannot use {shown}"))?;
    // A typed option replaces that of the file, lists included.
    options.retain(|option| !arguments.iter().any(|typed| name(typed) == name(option)));
    // Behind the command: the first word that is neither an option nor the file's name.
    let mut is_value = false;
    let at = arguments.iter().skip(1).position(|word| {
        let was_value = std::mem::replace(&mut is_value, word == "--config");
        !was_value && !is_option(word)
    });
    let command = at.map_or(1, |at| at + 2);
    let (before, behind) = arguments.split_at(command.min(arguments.len()));
    Ok(before.iter().cloned().chain(options).chain(behind.iter().cloned()).collect())
}

/// The options that were given, from the file or typed, as a file for `--config`: the last of each.
pub fn as_config_file(arguments: &[OsString]) -> String {
    let mut table = Table::new();
    let mut words = arguments.iter().skip(1).map(|word| word.to_string_lossy()).peekable();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix("--") else { continue };
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Value::from(value)),
            None => match words.next_if(|next| !is_option(&OsString::from(next.as_ref()))) {
                Some(value) => (option, Value::from(value.as_ref())),
                None => (option, Value::from(true)),
            },
        };
        if matches!(name, "config" | "run" | "resume" | "quiet" | "verbose") {
            continue;
        }
        // Of a list that was given in parts, all parts count; of anything else, the last.
        let parts = match (table.get(name).and_then(Value::as_str), value.as_str()) {
            (Some(before), Some(more)) if LISTS.contains(&name) => {
                format!("{before},{more}").into()
            }
            _ => value,
        };
        table.insert(name.to_owned(), parts);
    }
    table.to_string()
}

/// `--beta` of `--beta=0.1`.
fn name(option: &OsString) -> String {
    let option = option.to_string_lossy();
    option.split('=').next().unwrap_or_default().to_owned()
}

/// Options that hold every value they are given.
const LISTS: [&str; 2] = ["device", "prune-at"];

fn value_of(arguments: &[OsString], option: &str) -> Option<OsString> {
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == option {
            return words.next().cloned();
        }
        let word = word.to_string_lossy();
        if let Some(value) = word.strip_prefix(option).and_then(|rest| rest.strip_prefix('=')) {
            return Some(value.into());
        }
    }
    None
}

/// A negative number is a value.
fn is_option(word: &OsString) -> bool {
    let word = word.to_string_lossy();
    word.starts_with('-') && word.parse::<f64>().is_err()
}

fn flatten(table: &Table, options: &mut Vec<OsString>) -> anyhow::Result<()> {
    for (key, value) in table {
        // As it is spelled in `run.json`, too.
        let key = key.replace('_', "-");
        let text = match value {
            Value::Table(inner) => {
                flatten(inner, options)?;
                continue;
            }
            Value::Boolean(true) => {
                options.push(format!("--{key}").into());
                continue;
            }
            Value::Boolean(false) => continue,
            Value::Array(values) => {
                values.iter().map(plain).collect::<anyhow::Result<Vec<_>>>()?.join(",")
            }
            value => plain(value)?,
        };
        options.push(format!("--{key}={text}").into());
    }
    Ok(())
}

fn plain(value: &Value) -> anyhow::Result<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        other => bail!("{other} is no value of an option"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(Into::into).collect()
    }

    #[test]
    fn keys_of_the_file_stand_before_what_was_typed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("small.toml");
        fs::write(
            &path,
            "steps = 8\n[laep]\nalpha = [0.2, inf]\nno-laep = false\nrecompute = true",
        )
        .unwrap();
        let typed = format!("yuan pretrain --config {} --steps 9", path.display());
        let merged = with_config_file(words(&typed).into_iter()).unwrap();
        let expected = format!(
            "yuan pretrain --alpha=0.2,inf --recompute --config {} --steps 9",
            path.display()
        );
        let sort = |mut words: Vec<OsString>| {
            words[2..4].sort();
            words
        };
        assert_eq!(sort(merged.clone()), sort(words(&expected)));
        let file = as_config_file(&merged);
        assert_eq!(file, "alpha = \"0.2,inf\"\nrecompute = true\nsteps = \"9\"\n");
    }

    #[test]
    fn the_file_may_be_named_before_the_command_and_lists_are_kept_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("small.toml");
        fs::write(&path, "learning_rate = 0.01").unwrap();
        let path = path.display();
        let typed = format!("yuan --config {path} pretrain --prune-at 12 --prune-at 18");
        let merged = with_config_file(words(&typed).into_iter()).unwrap();
        let expected = format!(
            "yuan --config {path} pretrain --learning-rate=0.01 --prune-at 12 --prune-at 18"
        );
        assert_eq!(merged, words(&expected));
        let file = as_config_file(&merged);
        assert_eq!(file, "learning-rate = \"0.01\"\nprune-at = \"12,18\"\n");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bad.toml");
        let message = |text: Option<&str>| {
            if let Some(text) = text {
                fs::write(&path, text).unwrap();
            }
            let typed = format!("yuan pretrain --config={}", path.display());
            format!("{:#}", with_config_file(words(&typed).into_iter()).unwrap_err())
        };
        assert!(message(None).contains("cannot read") && message(None).contains("bad.toml"));
        assert!(message(Some("steps = ")).contains("bad.toml is no TOML file"));
        assert!(message(Some("steps = [[1]]")).contains("is no value of an option"));
    }
}
