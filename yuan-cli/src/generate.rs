//! `yuan generate`: text out of a model, as it comes.

use std::{
    io::{Read, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, anyhow, bail};
use burn::tensor::FloatDType;
use clap::Args;
use yuan::{
    model::{
        GenerationOptions, YuanModel,
        generate::{FinishReason, Generation, NewToken, Prompt, Sampling},
        storage::parse_float_dtype,
        text::{Message, Tokenizer},
        vision::{ImageLayout, ImagePositions, Picture},
    },
    train::ModelDirectory,
};

use crate::{
    console::{Console, WrongOption},
    images::Images,
};

/// Options of `yuan generate`.
#[derive(Args)]
pub struct Options {
    /// A run, one of its checkpoints, or a directory in Hugging Face's layout
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Texts to continue, together; default: standard input
    #[arg(value_name = "TEXTS")]
    prompts: Vec<String>,
    /// An image that the text is about: a PNG, JPEG, WebP, GIF, BMP or TIFF file; several in order
    #[arg(long = "image", value_name = "FILE")]
    images: Vec<PathBuf>,
    /// The prompt is a user's message: wrap it as the model's chat template says
    #[arg(long)]
    chat: bool,
    /// What the system says first in a chat
    #[arg(long, requires = "chat", value_name = "TEXT")]
    system: Option<String>,
    /// Tokens that a text may grow by
    #[arg(long, default_value_t = 128, value_name = "TOKENS", help_heading = "Sampling")]
    max_new_tokens: usize,
    /// Divides the scores before a token is drawn; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.8, value_name = "DIVISOR", help_heading = "Sampling")]
    temperature: f64,
    /// Draw among this many of the likeliest tokens
    #[arg(long, value_name = "TOKENS", help_heading = "Sampling")]
    top_k: Option<usize>,
    /// Draw among the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 0.95, value_name = "PROBABILITY", help_heading = "Sampling")]
    top_p: f64,
    /// Makes tokens that occurred less likely; 1 does not
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR", help_heading = "Sampling")]
    repetition_penalty: f64,
    /// Go on past the tokens that end a text
    #[arg(long, help_heading = "Sampling")]
    ignore_stop: bool,
    /// Positions of the tokens of images: increasing, as upstream serves its models, or together, as it
    /// trains them [default: as the model was trained here, else increasing]
    #[arg(long, value_name = "RULE", requires = "images", help_heading = "Images")]
    image_positions: Option<ImagePositions>,
    /// Decides the draws
    #[arg(long, value_name = "NUMBER", default_value_t = 0, help_heading = "Sampling")]
    seed: u64,
    /// Where to compute: flex, or another backend that this build has
    #[arg(long, value_name = "DEVICE", default_value = "flex", help_heading = "Devices")]
    device: String,
    /// Type to compute in: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = parse_float_dtype)]
    #[arg(help_heading = "Devices")]
    dtype: FloatDType,
}

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    let device = yuan::device(&options.device).wrong_option()?;
    let sampling = Sampling {
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
        repetition_penalty: options.repetition_penalty,
    };
    sampling.validate().wrong_option()?;
    let directory = ModelDirectory::open(&options.model)?;
    let tokenizer = Tokenizer::load(&directory.tokenizer_directory())?;
    let texts = texts(options)?;
    let images = images(options, &directory, &tokenizer)?;
    let mut prompts = Vec::with_capacity(texts.len());
    for text in &texts {
        prompts.push(encode(options, &tokenizer, text, images.as_ref())?);
    }
    let model = directory.load(&device, Some(options.dtype))?;
    let stop_tokens = match options.ignore_stop {
        true => Vec::new(),
        false => tokenizer.stop_tokens(directory.config()),
    };
    let trained = directory.config().image_positions();
    let generation = GenerationOptions {
        max_new_tokens: options.max_new_tokens,
        sampling,
        stop_tokens,
        seed: options.seed,
        // Upstream serves its models with increasing ones, whatever they were trained with.
        image_positions: options.image_positions.or(trained).unwrap_or_default(),
    };
    let mut pace = Pace { started: Instant::now(), first: None, tokens: 0 };
    // The images are looked at once, whatever is asked about them.
    let seen = images.map(|(_, images)| model.see(&images.tiles)).transpose()?;
    let with_images = |tokens| match &seen {
        Some(rows) => Prompt::with_images(tokens, rows.clone()),
        None => Prompt::from(tokens),
    };
    let prompts: Vec<Prompt> = prompts.into_iter().map(with_images).collect();
    let is_question = options.chat || seen.is_some();
    let generated = match &texts[..] {
        [text] => {
            let shown = if is_question { "" } else { text };
            stream_one(&model, &tokenizer, &prompts, &generation, shown, &mut pace)?
        }
        _ => {
            let generated = model.generate(&prompts, &generation, |_| {
                pace.count();
                ControlFlow::Continue(())
            })?;
            for (index, (text, generation)) in texts.iter().zip(&generated).enumerate() {
                let read = prompts[index].tokens();
                let continuation = tokenizer.decode_after(read, &generation.tokens)?;
                match is_question {
                    true => console.say(format_args!("> {text}\n{continuation}\n"))?,
                    false => console.say(format_args!("{text}{continuation}\n"))?,
                }
            }
            generated
        }
    };
    if console.shows_progress() || prompts.len() > 1 {
        let read = prompts.iter().map(|prompt| prompt.tokens().len()).sum();
        console.note(pace.summary(read, &generated));
    }
    Ok(())
}

/// Generates one text and shows it as it comes; a reader that has heard enough ends the generation.
fn stream_one(
    model: &YuanModel,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    options: &GenerationOptions,
    shown: &str,
    pace: &mut Pace,
) -> anyhow::Result<Vec<Generation>> {
    let mut out = std::io::stdout();
    // With the first token, so that nothing stands there if there is none to come.
    let mut prompt = shown;
    let mut stream = tokenizer.stream(prompts[0].tokens());
    let mut failure: Option<anyhow::Error> = None;
    let generated = model.generate(prompts, options, |NewToken { token, .. }| {
        pace.count();
        let shown = match stream.step(token) {
            Ok(text) => {
                let prompt = std::mem::take(&mut prompt);
                write!(out, "{prompt}{text}").and_then(|()| out.flush())
            }
            Err(error) => {
                failure = Some(error.into());
                return ControlFlow::Break(());
            }
        };
        match shown {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(anyhow::Error::new(error).context(NOT_WRITTEN));
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    writeln!(out, "{prompt}{}", stream.finish()?).context(NOT_WRITTEN)?;
    Ok(generated)
}

/// The images that the texts are about, and how they stand in a text.
fn images(
    options: &Options,
    directory: &ModelDirectory,
    tokenizer: &Tokenizer,
) -> anyhow::Result<Option<(ImageLayout, Images)>> {
    if options.images.is_empty() {
        return Ok(None);
    }
    let layout = ImageLayout::of(directory.config(), |token| tokenizer.token_id(token));
    let layout = layout.with_context(|| format!("{}", options.model.display()))?;
    // A shell makes many words of `--image *.png`, and all but the first would be questions.
    if let Some(name) = options.prompts.iter().find(|prompt| is_image_file(prompt)) {
        let reason =
            anyhow!("`{name}` is an image, not a question: write --image before every one");
        return Err(reason).wrong_option();
    }
    let images = Images::open(&options.images, &layout)?;
    Ok(Some((layout, images)))
}

fn is_image_file(text: &str) -> bool {
    let path = Path::new(text);
    path.is_file() && Picture::size_of(path).is_ok()
}

/// Where a text could not go.
const NOT_WRITTEN: &str = "cannot write to standard output";

/// How fast tokens come.
struct Pace {
    started: Instant,
    first: Option<Instant>,
    tokens: usize,
}

impl Pace {
    fn count(&mut self) {
        self.first.get_or_insert_with(Instant::now);
        self.tokens += 1;
    }

    /// What was read and generated, and how fast.
    fn summary(&self, read: usize, generated: &[Generation]) -> String {
        let first = self.first.unwrap_or(self.started);
        let reading = first.duration_since(self.started).as_secs_f64();
        // The first token of every text belongs to the reading.
        let after_first = self.tokens.saturating_sub(generated.len()) as f64;
        let ended = generated.iter().filter(|text| text.finish == FinishReason::Stop).count();
        format!(
            "[{read} tokens read in {reading:.2} s, {} generated at {:.1} tokens/s, {ended} of {} \
             ended by themselves]",
            self.tokens,
            after_first / first.elapsed().as_secs_f64().max(1e-9),
            generated.len()
        )
    }
}

fn texts(options: &Options) -> anyhow::Result<Vec<String>> {
    if !options.prompts.is_empty() {
        return Ok(options.prompts.clone());
    }
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("cannot read the prompt from standard input")?;
    Ok(vec![text.trim_end().to_owned()])
}

fn encode(
    options: &Options,
    tokenizer: &Tokenizer,
    text: &str,
    images: Option<&(ImageLayout, Images)>,
) -> anyhow::Result<Vec<u32>> {
    if text.is_empty() {
        bail!("there is no prompt: give one as an argument or on standard input");
    }
    let mut messages = Vec::new();
    messages.extend(options.system.iter().map(|text| Message::new("system", text)));
    Ok(match images {
        None if !options.chat => tokenizer.encode(text, true)?,
        None => {
            messages.push(Message::new("user", text));
            tokenizer.encode_chat(&messages)?
        }
        // As the rows of its training had it.
        Some((layout, images)) if !options.chat => {
            let tokens = tokenizer.encode_plain(text)?;
            if tokens.iter().all(|&token| layout.is_marker(token)) {
                bail!(
                    "`{text}` holds nothing but tokens that mark images and texts: ask a question"
                );
            }
            layout.question(&images.rows, &tokens)
        }
        Some((layout, Images { rows, .. })) => {
            messages.push(Message::new("user", text).with_images(rows.len()));
            tokenizer.encode_chat_with_images(&messages, layout, rows)?
        }
    })
}
