//! `yuan prepare`: text to tokens, in bounded memory and with any number of threads.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use yuan::data::{DataError, PrepareOptions, Sources, tokenizer::END_OF_DOCUMENT};

use crate::{
    console::{Console, Interrupted, WrongOption},
    signals::Signals,
    text::{Bar, note_dataset, refuse_inside},
};

/// Options of `yuan prepare`.
#[derive(Args)]
#[command(
    after_help = "Files are read by their endings: .jsonl is a document a line, .parquet one a row, \
    anything else is a document; all but .parquet may be compressed (.gz, .zst). What is no text is \
    left out and named. Token files in Megatron's layout (NAME.idx with NAME.bin) are copied; name \
    their tokenizer. The result is DIR/train.bin and .idx, DIR/validation.bin and .idx in \
    Megatron's layout, DIR/tokenizer.json and DIR/dataset.json. A preparation that was stopped goes \
    on when the same command is given again."
)]
pub struct Options {
    /// Files of text, and directories of files
    #[arg(required = true, value_name = "PATH")]
    sources: Vec<PathBuf>,
    /// Directory of the tokens
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Take this tokenizer: a tokenizer.json, or the directory of a model or a run
    #[arg(long, value_name = "PATH", conflicts_with_all = ["vocab", "sample"])]
    tokenizer: Option<PathBuf>,
    /// Train a tokenizer with so many entries
    #[arg(long, value_name = "ENTRIES", default_value_t = 32_768)]
    vocab: usize,
    /// Megabytes of text to train the tokenizer on, spread over all files
    #[arg(long, value_name = "MEGABYTES", default_value_t = 64)]
    sample: u64,
    /// Field of a line, or column of a table, that holds the text
    #[arg(long, value_name = "NAME", default_value = Sources::FIELD)]
    field: String,
    /// Token of the tokenizer that ends a document
    #[arg(long, value_name = "TOKEN", default_value = END_OF_DOCUMENT)]
    end_of_document: String,
    /// Share of the documents that is kept to validate with
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    validation: f64,
    /// Keep documents that were there before, to the last character
    #[arg(long)]
    keep_duplicates: bool,
    /// Threads that make tokens; 0: one for each core
    #[arg(long, value_name = "THREADS", default_value_t = 0)]
    threads: usize,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    refuse_inside(&options.out, &options.sources).wrong_option()?;
    let sources = options.sources.clone();
    let prepare = match &options.tokenizer {
        Some(tokenizer) => PrepareOptions::with_tokenizer(sources, tokenizer.clone()),
        None => PrepareOptions::train_tokenizer(sources, options.vocab)
            .with_sample(options.sample.saturating_mul(1_000_000)),
    };
    let prepare = PrepareOptions {
        field: options.field.clone(),
        end_of_document: options.end_of_document.clone(),
        validation: options.validation,
        drop_duplicates: !options.keep_duplicates,
        threads: options.threads,
        ..prepare
    };
    let signals = Signals::listen_to("the preparation keeps what it has and ends");
    let signals = signals.context("cannot listen to signals")?;
    let bar = Bar::new(console, Some(signals.clone()));
    let dataset = match yuan::data::prepare(&options.out, &prepare, &bar) {
        Err(DataError::Stopped) => {
            console.note("Interrupted. The same command goes on from here.");
            return Err(Interrupted(signals.received().unwrap_or(0)).into());
        }
        Err(error @ DataError::Setting(_)) => return Err(error).wrong_option(),
        prepared => prepared?,
    };
    note_dataset(console, &dataset);
    let info = dataset.info();
    for (what, split) in [("to train on", info.train), ("to validate with", info.validation)] {
        console.say(format_args!(
            "{} tokens {what}, in {} documents",
            split.tokens, split.documents
        ))?;
    }
    console.say(format_args!(
        "yuan pretrain --data {} learns them.",
        crate::text::quoted(dataset.directory())
    ))
}
