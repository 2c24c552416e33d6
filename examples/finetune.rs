//! Tune a model on conversations and count how many held-out questions it answers.
//!
//!     cargo run --release --features chat --example finetune -- runs/pretrain 2000
//!
//! The conversations are a small task that `yuan::toy` makes: find in three sentences what a thing
//! costs. After some hundred steps a model answers in whole sentences with one of the three prices;
//! which one it is takes longer to learn. 2000 steps are most of an hour on two cores, and two minutes
//! on a GPU (`--features chat,cuda`, and `cuda` as a third argument). `yuan finetune` takes
//! conversations from files and has every setting as an option.

use std::{env, error::Error, fs, ops::ControlFlow, path::Path};

use yuan::{
    model::text::{ChatTemplate, Message, Tokenizer},
    prelude::*,
    toy::{self, Questions},
    train::{Claim, Display, ModelDirectory, data::ChatFiles},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let (Some(base), Some(steps)) = (arguments.next(), arguments.next()) else {
        return Err("usage: finetune MODEL STEPS [DEVICE]".into());
    };
    let device = yuan::device(&arguments.next().unwrap_or_else(|| "flex".into()))?;
    let [learnt, held_out] = toy::conversations(20_000);

    // Conversations are files of JSON lines; the loss covers the answers alone.
    let claim = Claim::first_free(Path::new("runs/finetune"))?;
    let file = env::temp_dir().join(format!("yuan-conversations-{}.jsonl", std::process::id()));
    let line = |[prompt, response]: &[String; 2]| {
        serde_json::json!({"prompt": prompt, "response": response}).to_string() + "\n"
    };
    fs::write(&file, learnt.iter().map(line).collect::<String>())?;
    let chat = ChatFiles { files: vec![file.clone()], validation: 0.02, separator: None };
    let config = TrainConfig {
        steps: steps.parse()?,
        learning_rate: 1e-3,
        laep: LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() },
        ..toy::train_config()
    };
    let new = NewRun::from_model(config, ModelDirectory::open(base.as_ref())?, chat)
        .with_chat_template(ChatTemplate::plain("<eod>"))
        .with_isolated_documents();
    let run = Run::create_in(claim, new)?;
    fs::remove_file(&file)?;

    let before = accuracy(run.directory(), &held_out)?;
    run.trainer(&device.autodiff())?.with_callback(Display::new(10))?.run()?;
    let after = accuracy(run.directory(), &held_out)?;
    println!("answered of {} held-out questions: {before} before, {after} after", held_out.len());
    println!("yuan generate {} --chat {:?}", run.directory().display(), held_out[0][0]);
    Ok(())
}

/// Questions that the latest checkpoint of a run answers.
fn accuracy(run: &Path, questions: &Questions) -> Result<usize, Box<dyn Error>> {
    let (directory, tokenizer) = (ModelDirectory::open(run)?, Tokenizer::load(run)?);
    let model = directory.load(&yuan::device("flex")?, None)?;
    let stop_tokens = tokenizer.stop_tokens(directory.config());
    let options = GenerationOptions { max_new_tokens: 16, stop_tokens, ..Default::default() };
    let mut right = 0;
    for [prompt, answer] in questions {
        let prompt = tokenizer.encode_chat(&[Message::new("user", prompt)])?;
        let mut tokens = Vec::new();
        model.generate(std::slice::from_ref(&prompt), &options, |new| {
            tokens.push(new.token);
            ControlFlow::Continue(())
        })?;
        right += usize::from(tokenizer.decode_after(&prompt, &tokens)?.trim() == answer);
    }
    Ok(right)
}
