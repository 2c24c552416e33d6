//! Text out of a model: a run of `pretrain`, or a directory of published weights.
//!
//!     cargo run --release --example generate -- runs/pretrain "The expert"

use std::{
    env,
    error::Error,
    io::{Write, stdout},
    ops::ControlFlow,
};

use yuan::{
    model::{GenerationOptions, generate::Sampling, text::Tokenizer},
    train::ModelDirectory,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let (Some(model), Some(prompt)) = (arguments.next(), arguments.next()) else {
        return Err("usage: generate MODEL PROMPT".into());
    };

    // A directory is recognised by its files; only headers are read so far.
    let directory = ModelDirectory::open(model.as_ref())?;
    let tokenizer = Tokenizer::load(&directory.tokenizer_directory())?;
    let model = directory.load(&yuan::device("flex")?, None)?;

    let options = GenerationOptions {
        max_new_tokens: 64,
        sampling: Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::unchanged() },
        stop_tokens: tokenizer.stop_tokens(directory.config()),
        ..GenerationOptions::default()
    };
    print!("{prompt}");
    // Some tokens give no text until the next one completes a character.
    let tokens = tokenizer.encode(&prompt, true)?;
    let mut stream = tokenizer.stream(&tokens);
    model.generate(std::slice::from_ref(&tokens), &options, |new| {
        if let Ok(text) = stream.step(new.token) {
            print!("{text}");
            drop(stdout().flush());
        }
        ControlFlow::Continue(())
    })?;
    println!("{}", stream.finish()?);
    Ok(())
}
