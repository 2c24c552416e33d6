//! How likely a model finds text.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, anyhow, bail};
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde_json::json;
use yuan::{
    data::{
        Item as Found, Part, Place, SkippedFiles, Sources,
        tokenizer::{self, Encoder},
    },
    eval::{ItemScore, Statistic},
    files::write_whole,
    model::{ForwardOptions, YuanModel, text::Tokenizer},
    train::ModelDirectory,
};

use super::{ITEMS, Options, SCORES, refuse_other_scores};
use crate::console::{Console, WrongOption};

/// Measures every document by itself, in rows that do not overlap; the first token of a row is not
/// predicted.
pub fn run(options: &Options, data: &Path, out: &Path, console: &Console) -> anyhow::Result<()> {
    let model = options.model.as_deref().ok_or_else(|| anyhow!("name a model with --model"));
    let model = model.wrong_option()?;
    let device = yuan::device(&options.device).wrong_option()?;
    let directory = ModelDirectory::open(model)?;
    let texts = Tokenizer::load(&directory.tokenizer_directory())?;
    let eod = directory.config().tokens.eod.and_then(|eod| texts.token(eod));
    let eod = eod.context("the model's configuration names no token that ends a document")?;
    let file = directory.tokenizer_directory().join("tokenizer.json");
    let encoder = Encoder::new(&tokenizer::read(&file)?, &eod)?;
    let model = directory.load(&device, Some(options.dtype))?;
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let sources = Sources::find(&[data.to_path_buf()], Sources::FIELD)?;
    let mut measured = Measured { items: String::new(), sums: Vec::new() };
    let mut document: Option<(String, Vec<u32>)> = None;
    let mut skipped = SkippedFiles::default();
    sources.unreadable().iter().for_each(|file| skipped.add(file.clone(), 0));
    for found in sources.read_from(Place::default()) {
        let Part { name, text, is_first, is_last } = match found {
            Found::Part(part) => part,
            Found::Skipped { file, records } => {
                skipped.add(file, records);
                continue;
            }
        };
        if options.limit.is_some_and(|limit| measured.sums.len() as u64 >= limit) {
            break;
        }
        if is_first {
            document = Some((name, Vec::new()));
        }
        if let Some((_, tokens)) = &mut document {
            tokens.extend(encoder.encode(&text)?);
        }
        if let Some((name, mut tokens)) = document.take_if(|_| is_last) {
            tokens.push(encoder.eod());
            let sums = nats(&model, &tokens, options.seq, &device)?;
            measured.add(name, sums)?;
        }
    }
    if measured.sums.is_empty() {
        let why = skipped.summary().map_or_else(String::new, |summary| format!(": {summary}"));
        bail!("{} holds no text{why}", data.display());
    }
    if let Some(summary) = skipped.summary() {
        console.note(summary);
    }
    let value = Statistic::Perplexity.of(&measured.sums);
    let tokens: f64 = measured.sums.iter().map(|sums| sums[1]).sum();
    let documents = measured.sums.len();
    refuse_other_scores(&json!("perplexity"), out)?;
    let scores = json!({
        "benchmark": "perplexity",
        "perplexity": value,
        "nats_per_token": value.ln(),
        "documents": documents,
        "tokens": tokens,
        "seq": options.seq,
    });
    write_whole(&out.join(ITEMS), measured.items.as_bytes())?;
    write_whole(&out.join(SCORES), serde_json::to_string_pretty(&scores)?.as_bytes())?;
    console.say(format_args!(
        "perplexity {value:.3} ({:.4} nats a token) over {documents} documents of {tokens} tokens",
        value.ln()
    ))
}

struct Measured {
    items: String,
    sums: Vec<Vec<f64>>,
}

impl Measured {
    fn add(&mut self, id: String, sums: [f64; 2]) -> anyhow::Result<()> {
        let scores =
            BTreeMap::from([("perplexity".to_owned(), (Statistic::Perplexity, sums.to_vec()))]);
        let item = ItemScore { id, set: "text".into(), answered: true, scores };
        self.items += &serde_json::to_string(&item)?;
        self.items.push('\n');
        self.sums.push(sums.to_vec());
        Ok(())
    }
}

/// The sum of the negative logarithms of what tokens were given, and how many were.
fn nats(
    model: &YuanModel,
    tokens: &[u32],
    seq: usize,
    device: &Device,
) -> anyhow::Result<[f64; 2]> {
    let mut sums = [0.0; 2];
    let mut start = 0;
    while start + 1 < tokens.len() {
        let row = &tokens[start..tokens.len().min(start + seq + 1)];
        let tensor = |ids: &[u32]| {
            let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
            let shape = [1, ids.len()];
            Tensor::<2, Int>::from_data(TensorData::new(ids, shape), device)
        };
        let hidden = model.forward_hidden(tensor(&row[..row.len() - 1]), ForwardOptions::default());
        let losses = model.token_losses(hidden.hidden, tensor(&row[1..]));
        sums[0] += f64::from(losses.sum().try_into_scalar::<f32>()?);
        sums[1] += (row.len() - 1) as f64;
        start += seq;
    }
    Ok(sums)
}
