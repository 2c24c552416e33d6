//! Settings from a TOML file: they become options in front of those that were typed, which
//! therefore win.
//!
//! A key is the name of an option without its dashes. Tables only order the file: `beta` may stand
//! in a table `[laep]` or at the top.

use std::{
    any::TypeId,
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf, absolute},
};

use anyhow::{Context, bail, ensure};
use clap::{Arg, ArgAction, Command, error::ErrorKind};
use toml::{Table, Value};

use crate::text::DataArgument;

/// The arguments, with the keys of the file that `--config` names as options behind the command.
///
/// # Errors
///
/// If the file cannot be read, or one of its keys is no option of the command or has a value that
/// the option does not take.
pub fn with_config_file(
    program: &Command,
    arguments: impl Iterator<Item = OsString>,
) -> anyhow::Result<Vec<OsString>> {
    let arguments: Vec<OsString> = arguments.collect();
    let Some((at, known)) = Known::of(program, &arguments) else { return Ok(arguments) };
    let typed = known.typed(&arguments);
    let Some(path) = &typed.config else { return Ok(arguments) };
    let options = known.options_of(&typed.names, Path::new(path))?;
    Ok(inserted(&arguments, at, options))
}

/// The options that were given, from the file or typed, as a file for `--config`: the last of each.
/// Paths are absolute, so that the file means the same wherever it is used.
pub fn as_config_file(program: &Command, arguments: &[OsString]) -> String {
    let Some((at, known)) = Known::of(program, arguments) else { return String::new() };
    known.given(&arguments[at + 1..]).to_string()
}

/// Arguments with more options behind the command, which stands at `at`: what was typed wins.
pub fn inserted(arguments: &[OsString], at: usize, options: Vec<OsString>) -> Vec<OsString> {
    let (before, behind) = arguments.split_at(at + 1);
    before.iter().cloned().chain(options).chain(behind.iter().cloned()).collect()
}

/// Options of a run's own that a file for other runs does not hold.
const OF_THIS_CALL: [&str; 5] = ["config", "run", "resume", "quiet", "verbose"];

/// The options of a command and of the program.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    program: &'a Command,
    command: &'a Command,
}

/// What was typed.
pub struct Typed {
    /// Names of the options.
    pub names: BTreeSet<String>,
    /// The file of settings: the last, if several are named.
    config: Option<OsString>,
}

impl<'a> Known<'a> {
    /// Where the name of the command stands, and the options that it has.
    pub fn of(program: &'a Command, arguments: &[OsString]) -> Option<(usize, Self)> {
        let mut words = arguments.iter().enumerate().skip(1);
        while let Some((at, word)) = words.next() {
            if word == "--config" {
                words.next();
            } else if !word.as_encoded_bytes().starts_with(b"-") {
                return Some((at, Self { program, command: program.find_subcommand(word)? }));
            }
        }
        None
    }

    /// Name of the command.
    pub fn command(&self) -> &str {
        self.command.get_name()
    }

    /// Names of the options among all arguments.
    pub fn typed(&self, arguments: &[OsString]) -> Typed {
        let (mut names, mut config) = (BTreeSet::new(), None);
        let mut words = arguments.iter().skip(1);
        while let Some(word) = words.next() {
            if word == "--" {
                break;
            }
            if let Some((name, value)) = long_option(word) {
                let takes_value = self.find(&name).is_some_and(takes_value);
                let value = value.or_else(|| takes_value.then(|| words.next().cloned()).flatten());
                if name == "config" {
                    config = value;
                }
                names.insert(name);
            } else if let Some(letters) = word.to_str().and_then(|word| word.strip_prefix('-')) {
                for argument in self.arguments() {
                    let short = argument.get_short().filter(|&short| letters.contains(short));
                    names.extend(short.and(argument.get_long()).map(str::to_owned));
                }
            }
        }
        Typed { names, config }
    }

    /// The last value of an option behind the command.
    pub fn value_of(&self, name: &str, behind: &[OsString]) -> Option<OsString> {
        self.values(behind)
            .filter(|(option, _)| option == name)
            .filter_map(|(_, value)| value)
            .last()
    }

    /// The options behind the command, each with its value if it takes one.
    fn values(&self, behind: &[OsString]) -> impl Iterator<Item = (String, Option<OsString>)> {
        let mut words = behind.iter();
        std::iter::from_fn(move || {
            loop {
                let Some((name, value)) = long_option(words.next()?) else { continue };
                let Some(option) = self.find(&name) else { continue };
                let value =
                    value.or_else(|| takes_value(option).then(|| words.next().cloned()).flatten());
                return Some((name, value));
            }
        })
    }

    /// The options behind the command with their values, without those of this call alone.
    pub fn given(&self, behind: &[OsString]) -> Table {
        let mut table = Table::new();
        for (name, value) in self.values(behind) {
            let Some(option) = self.find(&name) else { continue };
            if OF_THIS_CALL.contains(&name.as_str()) {
                continue;
            }
            let value = match value {
                None => Value::from(true),
                Some(value) if is_path(option) => shown(absolute(&value).unwrap_or(value.into())),
                Some(value) if is_data(option) => {
                    shown(DataArgument::absolute(&value.to_string_lossy()))
                }
                Some(value) => shown(value),
            };
            if is_repeated(option) {
                let list = table.entry(name).or_insert_with(|| Value::Array(Vec::new()));
                if let Some(values) = list.as_array_mut() {
                    values.push(value);
                }
                continue;
            }
            // Of a list that was given in parts, all parts count; of anything else, the last.
            let parts = match (table.get(&name).and_then(Value::as_str), value.as_str()) {
                (Some(before), Some(more)) if is_list(option) => format!("{before},{more}").into(),
                _ => value,
            };
            table.insert(name, parts);
        }
        table
    }

    /// The value that an option has when it is not given.
    pub fn default_of(&self, name: &str) -> Option<String> {
        let defaults = self.find(name)?.get_default_values();
        let texts: Vec<_> = defaults.iter().map(|value| value.to_string_lossy()).collect();
        (!texts.is_empty()).then(|| texts.join(","))
    }

    /// The options of a file, without those that were typed and those that cannot stand beside
    /// them.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or holds what is no option.
    pub fn options_of(
        &self,
        typed: &BTreeSet<String>,
        path: &Path,
    ) -> anyhow::Result<Vec<OsString>> {
        let shown = path.display();
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            anyhow::anyhow!("{shown} is no TOML file: {}", error.message())
        })?;
        let mut entries = Vec::new();
        flatten(table, &mut entries);
        let (mut options, mut seen) = (Vec::new(), BTreeSet::new());
        for (key, value) in entries {
            let option = self.find(&key).filter(|_| key != "config");
            let Some(option) = option else {
                bail!("{shown}: `{key}` is no option of `yuan {}`", self.command());
            };
            ensure!(seen.insert(key.clone()), "{shown}: `{key}` has two values");
            let words = words_of(option, &key, value).with_context(|| shown.to_string())?;
            if !typed.contains(&key) && !self.conflicts(option, typed) {
                options.extend(words.into_iter().map(OsString::from));
            }
        }
        self.refuse_values(&options).with_context(|| shown.to_string())?;
        Ok(options)
    }

    fn arguments(&self) -> impl Iterator<Item = &'a Arg> + use<'a> {
        self.command.get_arguments().chain(self.program.get_arguments())
    }

    fn find(&self, name: &str) -> Option<&'a Arg> {
        self.arguments().find(|argument| argument.get_long() == Some(name))
    }

    /// Whether an option cannot stand beside one that was typed.
    fn conflicts(&self, option: &Arg, typed: &BTreeSet<String>) -> bool {
        self.arguments()
            .filter(|other| other.get_long().is_some_and(|name| typed.contains(name)))
            .any(|other| self.excludes(option, other) || self.excludes(other, option))
    }

    fn excludes(&self, one: &Arg, other: &Arg) -> bool {
        let known = if one.is_global_set() { self.program } else { self.command };
        known.get_arg_conflicts_with(one).iter().any(|excluded| excluded.get_id() == other.get_id())
    }

    /// Refuses values that the options do not take, in a sentence that can name the file.
    fn refuse_values(&self, options: &[OsString]) -> anyhow::Result<()> {
        let words = [self.program.get_name(), self.command()].map(OsString::from);
        let words = words.into_iter().chain(options.iter().cloned());
        let Err(error) = self.program.clone().try_get_matches_from(words) else { return Ok(()) };
        if matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
            let text = error.to_string();
            let sentence = text.lines().next().unwrap_or_default();
            bail!("{}", sentence.strip_prefix("error: ").unwrap_or(sentence));
        }
        Ok(())
    }
}

/// `--beta=0.1` as its name and, if it is in the same word, its value.
fn long_option(word: &OsStr) -> Option<(String, Option<OsString>)> {
    let text = word.to_string_lossy();
    let option = text.strip_prefix("--").filter(|option| !option.is_empty())?;
    Some(match option.split_once('=') {
        Some((name, value)) => (name.to_owned(), Some(value.into())),
        None => (option.to_owned(), None),
    })
}

fn takes_value(option: &Arg) -> bool {
    option.get_action().takes_values()
}

fn is_list(option: &Arg) -> bool {
    option.get_value_delimiter().is_some()
}

/// Whether an option is given once for each value of a list.
fn is_repeated(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::Append) && !is_list(option)
}

fn is_data(option: &Arg) -> bool {
    option.get_value_parser().type_id() == TypeId::of::<DataArgument>()
}

fn is_path(option: &Arg) -> bool {
    option.get_value_parser().type_id() == TypeId::of::<PathBuf>()
}

fn shown(text: impl AsRef<OsStr>) -> Value {
    text.as_ref().to_string_lossy().into_owned().into()
}

/// Every key with its value, whatever table it stands in.
fn flatten(table: Table, entries: &mut Vec<(String, Value)>) {
    for (key, value) in table {
        match value {
            Value::Table(inner) => flatten(inner, entries),
            // As it is spelled in `run.json`, too.
            value => entries.push((key.replace('_', "-"), value)),
        }
    }
}

/// An option with its value as words of the command line; none for a switch that is off.
fn words_of(option: &Arg, key: &str, value: Value) -> anyhow::Result<Vec<String>> {
    let text = match value {
        Value::Boolean(is_on) if !takes_value(option) => {
            return Ok(is_on.then(|| format!("--{key}")).into_iter().collect());
        }
        value if !takes_value(option) => bail!("`{key}` is true or false, not {value}"),
        Value::Array(values) => {
            ensure!(!values.is_empty(), "`{key}` is an empty list: leave it out");
            let mut texts = Vec::new();
            for value in values {
                texts.push(plain(key, value)?);
            }
            if is_repeated(option) {
                return Ok(texts.iter().map(|text| format!("--{key}={text}")).collect());
            }
            texts.join(",")
        }
        value => plain(key, value)?,
    };
    Ok(vec![format!("--{key}={text}")])
}

fn plain(key: &str, value: Value) -> anyhow::Result<String> {
    Ok(match value {
        Value::String(text) => text,
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        other => bail!("`{key}` is a number or a text, not {other}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program with an option of every kind.
    fn program() -> Command {
        let switch = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let value = |name: &'static str| Arg::new(name).long(name).allow_negative_numbers(true);
        let steps = value("steps").value_parser(clap::value_parser!(u64));
        let data = value("data").value_parser(clap::value_parser!(PathBuf));
        let prune_at = value("prune-at").value_delimiter(',').action(ArgAction::Append);
        let pretrain = Command::new("pretrain")
            .args([steps, data, prune_at, value("alpha"), value("learning-rate")])
            .args([switch("recompute"), switch("no-laep").conflicts_with("prune-at")]);
        Command::new("yuan").subcommand(pretrain).args([
            value("config").global(true),
            switch("quiet").short('q').global(true).conflicts_with("verbose"),
            switch("verbose").short('v').global(true),
        ])
    }

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(Into::into).collect()
    }

    /// What becomes of typed words, of which `FILE` is a file with this text.
    fn merged(text: &str, typed: &str) -> anyhow::Result<String> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("small.toml");
        fs::write(&path, text)?;
        let path = path.display().to_string();
        let typed = typed.replace("FILE", &path);
        let merged = with_config_file(&program(), words(&typed).into_iter())?;
        let merged: Vec<String> =
            merged.iter().map(|word| word.to_string_lossy().replace(&path, "FILE")).collect();
        Ok(merged.join(" "))
    }

    #[test]
    fn keys_of_the_file_stand_before_what_was_typed() {
        let text = "steps = 8\n[laep]\nalpha = [0.2, inf]\nno-laep = false\nlearning_rate = 0.01";
        assert_eq!(
            merged(text, "yuan pretrain --config FILE --steps -9").unwrap(),
            "yuan pretrain --alpha=0.2,inf --learning-rate=0.01 --config FILE --steps -9"
        );
        assert_eq!(
            merged("recompute = true", "yuan --config FILE pretrain --prune-at 12").unwrap(),
            "yuan --config FILE pretrain --recompute --prune-at 12"
        );
        // The last file counts; behind `--` there are no options.
        let typed = "yuan pretrain --config none --config=FILE -- --config none";
        let expected = "yuan pretrain --steps=8 --config none --config=FILE -- --config none";
        assert_eq!(merged("steps = 8", typed).unwrap(), expected);
        // No command, or none that there is: clap says what is wrong.
        assert_eq!(merged("steps = 8", "yuan --config FILE").unwrap(), "yuan --config FILE");
        let typed = "yuan --config FILE help";
        assert_eq!(merged("steps = 8", typed).unwrap(), typed);
    }

    #[test]
    fn what_cannot_stand_beside_a_typed_option_is_left_out() {
        let typed = "yuan pretrain --config FILE --prune-at 3 -v";
        assert_eq!(merged("no-laep = true\nquiet = true", typed).unwrap(), typed);
        let typed = "yuan pretrain --no-laep --config FILE";
        assert_eq!(merged("prune-at = [3, 6]", typed).unwrap(), typed);
    }

    #[test]
    fn the_given_options_make_a_file_that_gives_them_again() {
        let typed = "yuan -q pretrain --config x --prune-at 12 --prune-at 18 --learning-rate=-1 \
                     --recompute --run r --data some/dir --steps 3 --steps 4";
        let file = as_config_file(&program(), &words(typed));
        let data = std::env::current_dir().unwrap().join("some/dir");
        let expected = format!(
            "data = {:?}\nlearning-rate = \"-1\"\nprune-at = \"12,18\"\nrecompute = true\n\
             steps = \"4\"\n",
            data.display().to_string()
        );
        assert_eq!(file, expected);
        assert_eq!(
            merged(&file, "yuan pretrain --config FILE").unwrap(),
            format!(
                "yuan pretrain --data={} --learning-rate=-1 --prune-at=12,18 --recompute \
                 --steps=4 --config FILE",
                data.display()
            )
        );
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named_with_the_key() {
        let message =
            |text: &str| format!("{:#}", merged(text, "yuan pretrain --config=FILE").unwrap_err());
        for (text, expected) in [
            ("steps = ", "small.toml is no TOML file"),
            ("steps = [[1]]", "small.toml: `steps` is a number or a text, not [1]"),
            ("steps = false", "small.toml: `steps` is a number or a text, not false"),
            ("steps = []", "small.toml: `steps` is an empty list"),
            ("steps = \"many\"", "small.toml: invalid value 'many' for '--steps"),
            ("recompute = 1", "small.toml: `recompute` is true or false, not 1"),
            ("nonsense = false", "small.toml: `nonsense` is no option of `yuan pretrain`"),
            ("help = true", "small.toml: `help` is no option of `yuan pretrain`"),
            ("\"\" = true", "small.toml: `` is no option of `yuan pretrain`"),
            ("config = \"x\"", "small.toml: `config` is no option of `yuan pretrain`"),
            ("steps = 1\n[a]\nsteps = 2", "small.toml: `steps` has two values"),
        ] {
            assert!(message(text).contains(expected), "{text}: {}", message(text));
        }
        let typed = words("yuan pretrain --config=/nowhere/x.toml").into_iter();
        let error = with_config_file(&program(), typed).unwrap_err();
        assert!(format!("{error:#}").contains("cannot read /nowhere/x.toml"), "{error:#}");
    }
}
