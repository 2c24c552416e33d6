//! A model that answers.

use std::{ops::ControlFlow, path::Path, time::Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use yuan::{
    eval::{Answer, AnswerWriter, Benchmark, Item, Profile},
    model::{
        GenerationOptions, YuanModel,
        generate::{FinishReason, Prompt, Sampling},
        text::{Message, Tokenizer},
        vision::ImageLayout,
    },
    train::ModelDirectory,
};

use super::Options;
use crate::{
    console::{Console, WrongOption},
    images::Images,
};

/// Has a model answer all items that have no answer yet, those of like length together.
pub fn ask(
    benchmark: Benchmark,
    data: &Path,
    model: &Path,
    options: &Options,
    file: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    let device = yuan::device(&options.device).wrong_option()?;
    let sampling =
        Sampling { temperature: options.temperature, top_p: options.top_p, ..Sampling::greedy() };
    sampling.validate().wrong_option()?;
    let directory = ModelDirectory::open(model)?;
    let tokenizer = Tokenizer::load(&directory.tokenizer_directory())?;
    let config = directory.config();
    let asking = Asking {
        layout: config.images.is_some().then(|| {
            ImageLayout::of(config, |token| tokenizer.token_id(token))
                .with_context(|| format!("{}", model.display()))
        }),
        tokenizer: &tokenizer,
    };
    let mut writer = AnswerWriter::open(file)?;
    let mut items: Vec<Item> = Vec::new();
    benchmark.for_each(data, options.profile, options.limit, |item| {
        if !writer.has(&item.id) {
            items.push(item);
        }
        Ok(())
    })?;
    // Short ones first: what is answered together is of like length, and the first answers come soon.
    items.sort_by_key(|item| (item.images.len(), item.prompt.len()));
    let model = directory.load(&device, Some(options.dtype))?;
    let generation = GenerationOptions {
        max_new_tokens: options.max_new_tokens,
        sampling,
        stop_tokens: tokenizer.stop_tokens(config),
        seed: options.seed,
        image_positions: config.image_positions().unwrap_or_default(),
    };
    let bar = bar(items.len(), console);
    let (started, mut tokens) = (Instant::now(), 0);
    let mut problems: Vec<String> = Vec::new();
    let mut asked = 0;
    for items in items.chunks(options.batch) {
        let (mut prompts, mut of_prompts) = (Vec::new(), Vec::new());
        for item in items {
            match asking.prompt(&model, item)? {
                Ok(prompt) => {
                    prompts.push(prompt);
                    of_prompts.push(item);
                }
                Err(problem) => problems.push(problem),
            }
        }
        let generated = model.generate(&prompts, &generation, |_| ControlFlow::Continue(()))?;
        asked += prompts.len();
        for ((item, prompt), generation) in of_prompts.iter().zip(&prompts).zip(&generated) {
            let mut answer = tokenizer.decode_after(prompt.tokens(), &generation.tokens)?;
            if options.profile == Profile::Yuan && generation.finish == FinishReason::Stop {
                // Their program keeps what ends an answer, and their scorer looks for it.
                answer += "<|end_of_sentence|>";
            }
            let count = generation.tokens.len() as u64;
            tokens += count;
            writer.write(&Answer { id: item.id.clone(), answer, tokens: Some(count) })?;
        }
        bar.inc(items.len() as u64);
    }
    bar.finish_and_clear();
    if let Some(first) = problems.first() {
        let count = problems.len();
        console.note(format_args!("{count} items could not be asked; the first: {first}."));
    }
    if asked > 0 {
        let seconds = started.elapsed().as_secs_f64();
        console.note(format_args!(
            "{asked} items answered in {seconds:.1} s, {:.1} tokens/s",
            tokens as f64 / seconds.max(1e-9)
        ));
    }
    Ok(())
}

fn bar(items: usize, console: &Console) -> ProgressBar {
    if !console.shows_progress() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("answers {bar:30} {pos} of {len}  {eta} left");
    ProgressBar::new(items as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// How items become prompts.
struct Asking<'a> {
    tokenizer: &'a Tokenizer,
    /// None if the model sees no images.
    layout: Option<anyhow::Result<ImageLayout>>,
}

impl Asking<'_> {
    /// The prompt of an item, or why it cannot be asked.
    fn prompt(&self, model: &YuanModel, item: &Item) -> anyhow::Result<Result<Prompt, String>> {
        let is_chat = self.tokenizer.chat_template().is_some();
        let message = Message::new("user", &item.prompt);
        if item.images.is_empty() {
            return Ok(Ok(Prompt::from(match is_chat {
                true => self.tokenizer.encode_chat(&[message])?,
                false => self.tokenizer.encode(&item.prompt, true)?,
            })));
        }
        let layout = match &self.layout {
            Some(Ok(layout)) => layout,
            Some(Err(error)) => anyhow::bail!("{error:#}"),
            None => anyhow::bail!("the model sees no images, and {} is about one", item.id),
        };
        let Images { tiles, rows } = match Images::open(&item.images, layout) {
            Ok(images) => images,
            Err(error) => return Ok(Err(format!("{}: {error}", item.id))),
        };
        let tokens = match is_chat {
            true => {
                let message = message.with_images(rows.len());
                self.tokenizer.encode_chat_with_images(&[message], layout, &rows)?
            }
            false => layout.question(&rows, &self.tokenizer.encode_plain(&item.prompt)?),
        };
        Ok(Ok(Prompt::with_images(tokens, model.see(&tiles)?)))
    }
}
