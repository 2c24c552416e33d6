//! The program `yuan`: pre-train, plan, prune, convert and show mixture-of-experts models.

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use console::WrongOption as _;

mod ablation;
mod console;
mod convert;
mod efficiency;
mod evaluate;
mod finetune;
mod generate;
mod images;
mod inspect;
mod limits;
mod merge;
mod numbers;
mod plan;
mod prepare;
mod pretrain;
mod prune;
mod ranks;
mod report;
mod resume;
mod rl;
mod signals;
mod text;
mod weights;

/// Every step allocates and frees the same large tensors, which glibc returns to the system each
/// time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pre-train, prune and run mixture-of-experts language models (Yuan3.0) with layer-adaptive expert
/// pruning (LAEP).
#[derive(Parser)]
#[command(name = "yuan", version, propagate_version = true, arg_required_else_help = true)]
#[command(args_override_self = true)] // of an option given twice, the later holds; a list takes both
#[command(after_help = "Every command explains its options: yuan COMMAND --help")]
struct Program {
    #[command(flatten)]
    console: console::Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pre-train a model on text; LAEP prunes it when the expert loads are stable
    Pretrain(Box<pretrain::Options>),
    /// Turn text into tokens, in the layout that Megatron reads
    Prepare(prepare::Options),
    /// Tune a model on conversations, of which it learns the answers
    Finetune(Box<finetune::Options>),
    /// Learn from rewards: the model answers prompts, and right and short answers become likelier
    Rl(Box<rl::Options>),
    /// Show what LAEP would prune, from token loads alone
    Plan(plan::Options),
    /// Continue a text, or answer with --chat
    Generate(generate::Options),
    /// Score answers to the enterprise benchmarks, and have a model give them
    Evaluate(evaluate::Options),
    /// Convert a model: a run to Hugging Face's layout and back, other types, other files
    Convert(convert::Options),
    /// Prune published weights by a plan, tensor by tensor
    Prune(prune::Options),
    /// Show what is in a checkpoint, from its headers alone
    Inspect(inspect::Options),
    /// Draw the report of a run anew and print its table
    Report(report::Options),
    /// Calculate what pruning and rearranging should do to the speed of Yuan3.0 Ultra, and what the
    /// ranks of a cluster would hold
    Efficiency(efficiency::Options),
    /// Train the variants of the paper's Tables 1 and 2 in miniature and compare their losses
    Ablation(ablation::Options),
    /// Train as one of several processes, which `yuan pretrain` starts
    #[command(hide = true)]
    Rank(ranks::Options),
}

fn main() -> ExitCode {
    let parser = parser();
    let given = merge::with_config_file(&parser, std::env::args_os())
        .and_then(|arguments| resume::with_options_of_run(&parser, arguments));
    let given = match given {
        Ok(given) => given,
        Err(error) => return console::exit(Err(error).wrong_option()),
    };
    let matches = parser.clone().get_matches_from(&given.arguments);
    let program = Program::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let console = program.console.open();
    let done = match program.command {
        Command::Pretrain(options) => {
            let given = pretrain::Given {
                file: merge::as_config_file(&parser, &given.arguments),
                names: given.names,
            };
            pretrain::run(&options, &console, given, None)
        }
        Command::Prepare(options) => prepare::run(&options, &console),
        Command::Finetune(options) => {
            let given = pretrain::Given {
                file: merge::as_config_file(&parser, &given.arguments),
                names: given.names,
            };
            finetune::run(*options, &console, given)
        }
        Command::Rl(options) => rl::run(&options, &console),
        Command::Plan(options) => plan::run(&options, &console),
        Command::Generate(options) => generate::run(&options, &console),
        Command::Evaluate(options) => evaluate::run(&options, &console),
        Command::Convert(options) => convert::run(&options, &console),
        Command::Prune(options) => prune::run(&options, &console),
        Command::Inspect(options) => inspect::run(&options, &console),
        Command::Report(options) => report::run(&options, &console),
        Command::Efficiency(options) => efficiency::run(&options, &console),
        Command::Ablation(options) => ablation::run(&options, &console),
        Command::Rank(options) => ranks::run(&options, &console),
    };
    console::exit(done)
}

/// The program's options; a negative number is a value, not the name of one.
fn parser() -> clap::Command {
    let program = Program::command().mut_subcommand("finetune", |command| {
        let command = command
            .mut_arg("data", |argument| argument.value_name("FILE").help(finetune::DATA_HELP))
            .mut_arg("learning_rate", |argument| {
                argument.hide_default_value(true).help(finetune::RATE_HELP)
            });
        finetune::OF_FRESH_MODELS.iter().fold(command, |command, name| {
            command.mut_arg(name, |argument| argument.hide(true).conflicts_with("from"))
        })
    });
    program.mut_subcommands(|command| {
        command.mut_args(|argument| {
            let takes_value = argument.get_action().takes_values();
            if takes_value { argument.allow_negative_numbers(true) } else { argument }
        })
    })
}
