//! How the program speaks: results on standard output, notes on standard error, one line an error.

use std::{
    fmt::{self, Display},
    io::{self, IsTerminal, Write, stderr, stdout},
    path::PathBuf,
    process::ExitCode,
};

use ::console::Term;
use anyhow::Context;
use clap::Args;

/// Options of every command.
#[derive(Args)]
#[command(next_help_heading = "Output")]
pub struct Options {
    /// Say nothing but results and errors
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say more where there is more to say: every step of a training that does not run on a
    /// terminal
    #[arg(long, short, global = true)]
    verbose: bool,
    /// Take options from this file, by their names; those that are typed win
    #[arg(long, global = true, value_name = "TOML")]
    config: Option<PathBuf>,
}

impl Options {
    pub fn open(&self) -> Console {
        // The file was merged into the arguments before they were parsed.
        let _ = &self.config;
        Console { quiet: self.quiet, verbose: self.verbose }
    }
}

/// Columns that such a bar needs.
const WIDE: u16 = 80;

/// Where a command says what it has to say.
pub struct Console {
    quiet: bool,
    verbose: bool,
}

impl Console {
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Whether a library's bar that moves, and is as wide as it likes, would be seen well.
    pub fn shows_progress(&self) -> bool {
        let moves = std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let is_wide = || Term::stderr().size_checked().is_some_and(|(_, columns)| columns >= WIDE);
        !self.quiet && stderr().is_terminal() && moves && is_wide()
    }

    /// Steps between the lines of a training where there is no terminal.
    pub fn steps_between_lines(&self) -> u64 {
        if self.verbose { 1 } else { 10 }
    }

    /// A result, on standard output.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn say(&self, text: impl Display) -> anyhow::Result<()> {
        let written = writeln!(stdout(), "{text}").and_then(|()| stdout().flush());
        written.context("cannot write to standard output")
    }

    /// What is going on, on standard error. That nobody reads it must not end a run.
    pub fn note(&self, text: impl Display) {
        if !self.quiet {
            drop(writeln!(stderr(), "{text}"));
        }
    }
}

/// What is wrong with an option, in one sentence.
#[derive(Debug)]
struct OptionError(String);

impl Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OptionError {}

/// For errors that an option is to blame for: the program ends with status 2.
pub trait WrongOption<T> {
    /// The same error, which is now that of an option.
    fn wrong_option(self) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> WrongOption<T> for Result<T, E> {
    fn wrong_option(self) -> anyhow::Result<T> {
        self.map_err(|error| OptionError(format!("{:#}", error.into())).into())
    }
}

/// A signal ended the work before it was done, which is no failure and yet no success.
#[derive(Debug)]
pub struct Interrupted(pub i32);

impl Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted by signal {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

/// Ends the program: a failure is one line with all its causes, whatever `RUST_BACKTRACE` says, and
/// status 1, or 2 if an option is wrong. Whoever closed the pipe has read enough, which is no
/// failure.
pub fn exit(done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(&Interrupted(signal)) = error.downcast_ref() {
                // As shells count: 130 after Ctrl-C, 143 after SIGTERM.
                return ExitCode::from(128 + u8::try_from(signal).unwrap_or(0));
            }
            drop(writeln!(stderr(), "Error: {error:#}"));
            ExitCode::from(if error.is::<OptionError>() { 2 } else { 1 })
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let is_closed = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(is_closed)
}
