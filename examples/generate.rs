//! Text out of a model: a run of `pretrain`, or a directory of published weights.
//!
//!     cargo run --release --example generate -- runs/pretrain "The expert"

use std::{
    io::{IsTerminal, Read, Write},
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, bail};
use clap::Parser;
use yuan::{
    model::{
        GenerationOptions,
        generate::{FinishReason, NewToken, Sampling},
        storage::parse_float_dtype,
        text::{Message, Tokenizer},
    },
    train::ModelDirectory,
};

/// Every token allocates and frees the same tensors, which glibc returns to the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Continue a text, or answer with --chat.
#[derive(Parser)]
struct Arguments {
    /// A run, one of its checkpoints, or a directory in Hugging Face's layout
    model: PathBuf,
    /// Texts to continue, together; default: standard input
    prompts: Vec<String>,
    /// The prompt is a user's message: wrap it as the model's chat template says
    #[arg(long)]
    chat: bool,
    /// What the system says first in a chat
    #[arg(long, requires = "chat", value_name = "TEXT")]
    system: Option<String>,
    /// Tokens that a text may grow by
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
    /// Divides the scores before a token is drawn; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.8, value_name = "T")]
    temperature: f64,
    /// Draw among this many of the likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw among the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f64,
    /// Makes tokens that occurred less likely; 1 does not
    #[arg(long, default_value_t = 1.0, value_name = "R")]
    repetition_penalty: f64,
    /// Go on past the tokens that end a text
    #[arg(long)]
    ignore_stop: bool,
    /// Decides the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to compute: flex, or another backend that this build has
    #[arg(long, default_value = "flex")]
    device: String,
    /// Type to compute in: f32, f16 or bf16
    #[arg(long, default_value = "f32", value_parser = parse_float_dtype)]
    dtype: burn::tensor::FloatDType,
}

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let device = yuan::device(&arguments.device)?;
    let directory = ModelDirectory::open(&arguments.model)?;
    let tokenizer = Tokenizer::load(&directory.tokenizer_directory())?;
    let texts = prompts(arguments)?;
    let prompts = texts
        .iter()
        .map(|text| encode(arguments, &tokenizer, text))
        .collect::<Result<Vec<_>, _>>()?;
    let model = directory.load(&device, Some(arguments.dtype))?;
    let options = GenerationOptions {
        max_new_tokens: arguments.max_new_tokens,
        sampling: Sampling {
            temperature: arguments.temperature,
            top_k: arguments.top_k,
            top_p: arguments.top_p,
            repetition_penalty: arguments.repetition_penalty,
        },
        stop_tokens: if arguments.ignore_stop {
            Vec::new()
        } else {
            tokenizer.stop_tokens(directory.config())
        },
        seed: arguments.seed,
    };

    let mut out = std::io::stdout();
    let single = prompts.len() == 1;
    if single && !arguments.chat {
        write!(out, "{}", texts[0]).and_then(|()| out.flush()).context("cannot write")?;
    }
    let (start, mut first, mut count) = (Instant::now(), None, 0_usize);
    let mut stream = tokenizer.stream();
    let mut failure = None;
    let generated = model.generate(&prompts, &options, |NewToken { token, .. }| {
        first.get_or_insert_with(Instant::now);
        count += 1;
        if !single {
            return ControlFlow::Continue(());
        }
        // A reader that has heard enough ends the generation.
        match stream.step(token) {
            Ok(text) => {
                match write!(out, "{}", text.unwrap_or_default()).and_then(|()| out.flush()) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failure {
        bail!("tokenizer: {error}");
    }
    if single {
        writeln!(out).context("cannot write")?;
    } else {
        for (text, generation) in texts.iter().zip(&generated) {
            let continuation = tokenizer.decode(&generation.tokens)?;
            let prompt = if arguments.chat { "" } else { text };
            writeln!(out, "{prompt}{continuation}\n").context("cannot write")?;
        }
    }
    if std::io::stderr().is_terminal() || !single {
        let read = prompts.iter().map(Vec::len).sum::<usize>();
        let reading = first.map_or(0.0, |first| first.duration_since(start).as_secs_f64());
        let rest = first.map_or(0.0, |first| first.elapsed().as_secs_f64());
        let ended =
            generated.iter().filter(|generation| generation.finish == FinishReason::Stop).count();
        drop(writeln!(
            std::io::stderr(),
            "[{read} tokens read in {reading:.2} s, {count} generated at {:.1} tokens/s, {ended} of {} ended by themselves]",
            count.saturating_sub(prompts.len()) as f64 / rest.max(1e-9),
            prompts.len()
        ));
    }
    Ok(())
}

fn prompts(arguments: &Arguments) -> anyhow::Result<Vec<String>> {
    if !arguments.prompts.is_empty() {
        return Ok(arguments.prompts.clone());
    }
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("cannot read the prompt from standard input")?;
    Ok(vec![text.trim_end().to_owned()])
}

fn encode(arguments: &Arguments, tokenizer: &Tokenizer, text: &str) -> anyhow::Result<Vec<u32>> {
    if text.is_empty() {
        bail!("there is no prompt: give one as an argument or on standard input");
    }
    if !arguments.chat {
        return Ok(tokenizer.encode(text, true)?);
    }
    let system = arguments.system.iter().map(|text| Message::new("system", text));
    Ok(tokenizer.encode_chat(&system.chain([Message::new("user", text)]).collect::<Vec<_>>())?)
}
