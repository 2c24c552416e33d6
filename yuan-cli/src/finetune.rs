//! `yuan finetune`: instruction tuning on conversations, or on questions about images.

use std::{fs, path::PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use toml::Table;
use yuan::{
    data::tokenizer::END_OF_DOCUMENT,
    model::{
        text::{ChatTemplate, Tokenizer},
        vision::ImagePositions,
    },
    train::{
        ModelDirectory, NewRun,
        data::{ChatFiles, PageFiles},
    },
};

use crate::{
    console::{Console, WrongOption},
    numbers::share,
    pretrain,
};

/// Options of `yuan finetune`, beside those of `yuan pretrain`.
#[derive(Args)]
#[group(skip)] // another struct of this name is flattened into it
#[command(
    after_help = "A line of FILE.jsonl is {\"messages\": [{\"role\": \"user\", \"content\": …}, …]} or \
    {\"prompt\": …, \"response\": …}; the loss covers what the assistant says and what ends it. Lines \
    with \"image\": PATH or \"images\": [PATH, …], and .tar files in WebDataset's layout, are questions \
    about images, for a model that sees. \
    Nothing is pruned unless --prune-at, --rounds, --plan or --guard ask for it. A run that was \
    interrupted goes on with yuan pretrain --resume --run DIR."
)]
pub struct Options {
    /// Model to tune: a run, or a directory in Hugging Face's layout
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// Chat template to use in place of the model's: a Jinja file
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    template: Option<PathBuf>,
    /// Share of the conversations that is kept to validate with
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = share, help_heading = "Data")]
    validation: f64,
    /// Find answers by Yuan's own rule: they begin behind this token and end with the end of the
    /// document, whatever the template marks
    #[arg(long, value_name = "TOKEN", help_heading = "Data")]
    separator: Option<String>,
    /// Positions of the tokens of images: together (at 0 up to the last image), as upstream trains its
    /// models, or increasing [default: as the model was trained, else together]
    #[arg(long, value_name = "RULE", help_heading = "Data")]
    image_positions: Option<ImagePositions>,
    /// Keep attention inside a conversation; others in its row are not seen
    #[arg(long, help_heading = "Data")]
    isolate: bool,
    #[command(flatten)]
    training: pretrain::Options,
}

/// Options of `yuan pretrain` that decide what the model is, which it is already.
pub const OF_FRESH_MODELS: [&str; 8] =
    ["init", "vocab", "layers", "hidden", "experts", "router", "no_lfa", "resume"];

/// What `--data` is here.
pub const DATA_HELP: &str = "Conversations, or questions about images: files of JSON lines, which \
     may be compressed (.gz, .zst), or archives (.tar)";

/// What `--learning-rate` is here.
pub const RATE_HELP: &str = "Peak learning rate [default: 0.0002]";

pub fn run(options: Options, console: &Console, given: pretrain::Given) -> anyhow::Result<()> {
    let Options { from, template, validation, separator, image_positions, isolate, mut training } =
        options;
    if training.data.is_empty() {
        return Err(anyhow::anyhow!(
            "name the conversations, or questions about images, with --data FILE"
        ))
        .wrong_option();
    }
    let files: Vec<PathBuf> = training.data.iter().map(|data| data.path().to_path_buf()).collect();
    for (file, data) in files.iter().zip(&training.data) {
        if data.weight() != 1.0 {
            let file = file.display();
            return Err(anyhow::anyhow!("{file}: data to tune on is not mixed by weight"))
                .wrong_option();
        }
        if !file.is_file() {
            bail!(
                "cannot read {}: expected a file of JSON lines (.jsonl) or an archive (.tar)",
                file.display()
            );
        }
    }
    training.be_tuning(&given.names);
    let model = ModelDirectory::open(&from)?;
    let pages: Vec<bool> = files.iter().map(|file| PageFiles::is_one(file)).collect();
    if pages.contains(&true) {
        if let Some(text) = pages.iter().position(|has_images| !has_images) {
            let file = files[text].display();
            bail!("{file} has no images, and the other files do: tune on one kind at a time");
        }
        if separator.is_some() || template.is_some() || isolate {
            return Err(anyhow::anyhow!(
                "questions about images are written by upstream's rule: leave out --separator, \
                 --template and --isolate"
            ))
            .wrong_option();
        }
        let pages = PageFiles::new(files, validation);
        let before = model.config().image_positions();
        let positions = image_positions.or(before).unwrap_or(pages.positions);
        let data = PageFiles { positions, ..pages }.into();
        let tuning = pretrain::Tuning { model, data, template: None, isolate };
        let file = options_file(&given.file, &from)?;
        return pretrain::run(&training, console, pretrain::Given { file, ..given }, Some(tuning));
    }
    if image_positions.is_some() {
        return Err(anyhow::anyhow!("--image-positions is for questions about images"))
            .wrong_option();
    }
    let template = match template {
        Some(path) => {
            let text = fs::read_to_string(&path);
            Some(text.with_context(|| format!("cannot read {}", path.display()))?)
        }
        None => {
            let tokenizer = Tokenizer::load(&model.tokenizer_directory())?;
            let is_plain = tokenizer.chat_template().is_none();
            if is_plain {
                console.note(
                    "The model has no chat template: turns are written as User: … and \
                              Assistant: …, one a line.",
                );
            }
            let eod = model.config().tokens.eod.and_then(|eod| tokenizer.token(eod));
            let end = eod.unwrap_or_else(|| END_OF_DOCUMENT.to_owned());
            is_plain.then(|| ChatTemplate::plain(&end))
        }
    };
    let data = ChatFiles { files, validation, separator }.into();
    let tuning = pretrain::Tuning { model, data, template, isolate };
    let file = options_file(&given.file, &from)?;
    pretrain::run(&training, console, pretrain::Given { file, ..given }, Some(tuning))
}

/// The options as `yuan pretrain` knows them, with which such a run is gone on with.
fn options_file(given: &str, from: &std::path::Path) -> anyhow::Result<String> {
    let mut table: Table = given.parse()?;
    for name in ["template", "validation", "separator", "image_positions", "isolate", "from"] {
        table.remove(name);
    }
    let from = std::path::absolute(from)?;
    table.insert("init".into(), from.to_string_lossy().into_owned().into());
    Ok(table.to_string())
}

impl pretrain::Tuning {
    /// The run that these make.
    pub fn new_run<'a>(self, config: yuan::train::TrainConfig) -> NewRun<'a> {
        let run = NewRun::from_model(config, self.model, self.data);
        let run = if self.isolate { run.with_isolated_documents() } else { run };
        match self.template {
            Some(template) => run.with_chat_template(template),
            None => run,
        }
    }
}
