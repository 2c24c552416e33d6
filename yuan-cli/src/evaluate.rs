//! `yuan evaluate`: answers to benchmarks, from a model or from a file, and what they score.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    str::FromStr,
    time::UNIX_EPOCH,
};

use anyhow::{Context, anyhow, bail};
use burn::tensor::FloatDType;
use clap::Args;
use serde_json::json;
use yuan::{
    eval::{Answers, Benchmark, Comparison, OutsideScores, Profile, Published, Scored},
    files::{Checksum, Summing, write_whole},
    model::storage::parse_float_dtype,
    report::evaluation_page,
    train::Checkpoint,
};

use crate::{
    console::{Console, WrongOption},
    numbers::at_least_one,
};

mod answer;
mod perplexity;

/// Options of `yuan evaluate`.
#[derive(Args)]
#[command(
    after_help = "DIR holds the files as they are published: doc2dial/test.json … (chatrag), xsum.jsonl … \
    (summeval), MMTab-eval_test_data_49K.json with the tables and images/ (mmtab), \
    docmatrix_questions.jsonl with images/ (docmatix), or text (perplexity). A line of an answers file is \
    {\"id\": …, \"answer\": …}; --prompts writes the ids, so that any program can answer. Items without \
    an answer count as wrong."
)]
pub struct Options {
    /// chatrag, summeval, mmtab, docmatix or perplexity
    #[arg(value_name = "BENCHMARK", required_unless_present = "compare")]
    task: Option<Task>,
    /// Directory with the published files
    #[arg(long, value_name = "DIR", required_unless_present = "compare")]
    data: Option<PathBuf>,
    /// Model that answers: a run, one of its checkpoints, or a directory in Hugging Face's layout
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["answers", "prompts"])]
    model: Option<PathBuf>,
    /// Answers that any program gave
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// Write what is asked to this file, a line for each item, and do no more
    #[arg(long, value_name = "FILE", conflicts_with = "answers")]
    prompts: Option<PathBuf>,
    /// Scores that other programs gave to summaries, a line of JSON each, in 0 to 1: id, `BERTScore`, `SummaC`
    #[arg(long, value_name = "FILE")]
    scores: Option<PathBuf>,
    /// Whose prompts and rules: authors or yuan
    #[arg(long, value_name = "PROFILE", default_value = "authors")]
    profile: Profile,
    /// Take only the first items of each set
    #[arg(long, value_name = "ITEMS", value_parser = at_least_one::<u64>)]
    limit: Option<u64>,
    /// Directory for answers, scores and the page
    #[arg(long, value_name = "RUN", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Compare two such directories, item by item
    #[arg(long, value_names = ["RUN_A", "RUN_B"], num_args = 2, help_heading = "Output")]
    #[arg(conflicts_with_all = ["task", "data", "out"])]
    compare: Vec<PathBuf>,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 512, value_name = "TOKENS", help_heading = "Sampling")]
    max_new_tokens: usize,
    /// Divides the scores before a token is drawn; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.6, value_name = "DIVISOR", help_heading = "Sampling")]
    temperature: f64,
    /// Draw among the likeliest tokens that together have this probability
    #[arg(long, value_name = "PROBABILITY", default_value_t = 0.95, help_heading = "Sampling")]
    top_p: f64,
    /// Decides the draws
    #[arg(long, value_name = "NUMBER", default_value_t = 0, help_heading = "Sampling")]
    seed: u64,
    /// Items that are answered together
    #[arg(long, value_name = "ITEMS", default_value_t = 8, value_parser = at_least_one::<usize>)]
    #[arg(help_heading = "Devices")]
    batch: usize,
    /// Tokens of a row whose perplexity is measured
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = at_least_one::<usize>)]
    seq: usize,
    /// Where to compute: flex, or another backend that this build has
    #[arg(long, value_name = "DEVICE", default_value = "flex", help_heading = "Devices")]
    device: String,
    /// Type to compute in: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = parse_float_dtype)]
    #[arg(help_heading = "Devices")]
    dtype: FloatDType,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    Benchmark(Benchmark),
    Perplexity,
}

impl FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "perplexity" => Ok(Self::Perplexity),
            text => {
                text.parse().map(Self::Benchmark).map_err(|error| format!("{error}, perplexity"))
            }
        }
    }
}

/// What every item scored, for comparisons.
const ITEMS: &str = "items.jsonl";
const SCORES: &str = "scores.json";
const ANSWERS: &str = "answers.jsonl";
const PAGE: &str = "evaluation.html";
/// What the answers of a directory are answers to.
const SETTINGS: &str = "evaluation.json";

pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    if let [a, b] = &options.compare[..] {
        return compare([a, b], console);
    }
    let (Some(task), Some(data)) = (options.task, &options.data) else {
        bail!("name a benchmark and its --data");
    };
    let out = || {
        let out = options.out.as_deref();
        out.ok_or_else(|| anyhow!("name a directory for what comes of it with --out RUN"))
            .wrong_option()
    };
    let benchmark = match task {
        Task::Benchmark(benchmark) => benchmark,
        Task::Perplexity => return perplexity::run(options, data, out()?, console),
    };
    if let Some(file) = &options.prompts {
        return write_prompts(benchmark, data, options, file, console);
    }
    let out = out()?;
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let answers = match (&options.model, &options.answers) {
        (Some(model), _) => {
            let file = out.join(ANSWERS);
            begin(benchmark, data, model, options, out)?;
            answer::ask(benchmark, data, model, options, &file, console)?;
            file
        }
        (None, Some(file)) => file.clone(),
        (None, None) => {
            let what = "name a --model that answers, or a file with --answers; --prompts writes what to ask";
            return Err(anyhow!(what)).wrong_option();
        }
    };
    score(benchmark, data, &answers, options, out, console)
}

/// Takes note of what a model is asked, or refuses to mix its answers with others.
fn begin(
    benchmark: Benchmark,
    data: &Path,
    model: &Path,
    options: &Options,
    out: &Path,
) -> anyhow::Result<()> {
    let settings = json!({
        "benchmark": benchmark,
        "profile": options.profile,
        "asked": digest(benchmark, data, options)?,
        "weights": weights(model)?,
        "model": fs::canonicalize(model).unwrap_or_else(|_| model.to_path_buf()),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    });
    let file = out.join(SETTINGS);
    let has_answers = fs::metadata(out.join(ANSWERS)).is_ok_and(|found| found.len() > 0);
    let before = fs::read(&file).ok();
    let before = before.and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    match has_answers {
        true if before.as_ref() == Some(&settings) => Ok(()),
        true => bail!(
            "{} holds answers that were given otherwise, to another benchmark or by another model: \
             choose another --out",
            out.display()
        ),
        false => Ok(write_whole(&file, serde_json::to_string_pretty(&settings)?.as_bytes())?),
    }
}

/// What is asked, in a number: answers to other questions are not answers to these.
fn digest(benchmark: Benchmark, data: &Path, options: &Options) -> anyhow::Result<Checksum> {
    let mut all = Summing::new(std::io::sink());
    benchmark.for_each(data, options.profile, None, |item| {
        let asked = format!("{}\n{}\n{:?}\n", item.id, item.prompt, item.images);
        all.write_all(asked.as_bytes()).expect("nothing is written");
        Ok(())
    })?;
    Ok(all.checksum())
}

/// The files of a model's weights with their sizes and times: a model that learnt more is another one.
fn weights(model: &Path) -> anyhow::Result<Vec<String>> {
    let directory = match Checkpoint::find(model)? {
        Some(checkpoint) => checkpoint.path,
        None => model.to_path_buf(),
    };
    let mut files = Vec::new();
    let unreadable = || format!("cannot read {}", directory.display());
    for entry in fs::read_dir(&directory).with_context(unreadable)? {
        let entry = entry.with_context(unreadable)?;
        if entry.path().extension().is_some_and(|ending| ending == "safetensors") {
            let found = entry.metadata().with_context(unreadable)?;
            let time = found.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            let time = time.unwrap_or_default().as_nanos();
            files.push(format!("{} {} {time}", entry.path().display(), found.len()));
        }
    }
    files.sort();
    Ok(files)
}

fn write_prompts(
    benchmark: Benchmark,
    data: &Path,
    options: &Options,
    file: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    let (mut text, mut count) = (String::new(), 0_u64);
    benchmark.for_each(data, options.profile, options.limit, |item| {
        count += 1;
        text += &json!({"id": item.id, "prompt": item.prompt, "images": item.images}).to_string();
        text.push('\n');
        Ok(())
    })?;
    match fs::symlink_metadata(file) {
        // A pipe or a device is written to, not replaced.
        Ok(found) if !found.is_file() => {
            let written = fs::write(file, text);
            written.with_context(|| format!("cannot write {}", file.display()))?;
        }
        _ => write_whole(file, text.as_bytes())?,
    }
    console.say(format_args!("{count} prompts are in {}", file.display()))
}

fn score(
    benchmark: Benchmark,
    data: &Path,
    answers: &Path,
    options: &Options,
    out: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    let answers = Answers::read(answers)?;
    let outside = options.scores.as_deref().map(OutsideScores::read).transpose()?;
    let outside = outside.unwrap_or_default();
    let mut items = String::new();
    let each = |item| {
        items += &serde_json::to_string(&item).expect("names and numbers are plain data");
        items.push('\n');
        Ok(())
    };
    refuse_other_scores(&serde_json::to_value(benchmark)?, out)?;
    let scored =
        Scored::of(benchmark, data, options.profile, &answers, &outside, options.limit, each)?;
    let scores = serde_json::to_string_pretty(&scored)?;
    let files = [(ITEMS, items), (SCORES, scores), (PAGE, evaluation_page(&scored))];
    for (name, text) in files {
        write_whole(&out.join(name), text.as_bytes())?;
    }
    show(&scored, console)?;
    console.say(format_args!("The page is {}; scores are beside it", out.join(PAGE).display()))
}

/// Scores of one benchmark do not replace those of another one.
fn refuse_other_scores(benchmark: &serde_json::Value, out: &Path) -> anyhow::Result<()> {
    let Ok(text) = fs::read(out.join(SCORES)) else { return Ok(()) };
    let scores: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    match &scores["benchmark"] {
        serde_json::Value::Null => Ok(()),
        known if known == benchmark => Ok(()),
        known => bail!("{} holds scores of {known}: choose another --out", out.display()),
    }
}

fn show(scored: &Scored, console: &Console) -> anyhow::Result<()> {
    console.say(format_args!(
        "{:<24} {:<12} {:>6}  {:<14} {:>9} {:>13} {:>7}",
        "set", "metric", "score", "95 %", "published", "answered", "words"
    ))?;
    for set in &scored.sets {
        let [low, high] = set.interval;
        let beside = Published::find(scored.benchmark, Some(&set.set), &set.metric);
        console.say(format_args!(
            "{:<24} {:<12} {:>6.1}  {:<14} {:>9} {:>13} {:>7.1}",
            set.set,
            set.metric,
            set.value,
            format!("{low:.1} to {high:.1}"),
            beside.map_or_else(String::new, |number| format!("{:.1}", number.ultra)),
            format!("{} of {}", set.answered, set.items),
            set.words
        ))?;
    }
    let mean = Published::find(scored.benchmark, None, "mean");
    if let (Some(average), Some(mean)) = (scored.average, mean) {
        let [low, high] = average.interval;
        console.say(format_args!(
            "{:<24} {:<12} {:>6.1}  {:<14} {:>9.1}",
            "all",
            "mean",
            average.value,
            format!("{low:.1} to {high:.1}"),
            mean.ultra
        ))?;
    }
    if !scored.missing.is_empty() {
        let missing = scored.missing.join(", ");
        console.note(format_args!("There is no mean over the benchmark without {missing}."));
    }
    let unanswered = scored.items - scored.answered;
    if unanswered > 0 {
        console.note(format_args!("{unanswered} items have no answer and count as wrong."));
    }
    if scored.unknown > 0 {
        console.note(format_args!("{} answers belong to no item.", scored.unknown));
    }
    if scored.unused_scores > 0 {
        console.note(format_args!("{} lines of --scores belong to no item.", scored.unused_scores));
    }
    if let (count, Some(first)) = &scored.malformed {
        console.note(format_args!("{count} lines are no answers; {first}."));
    }
    if scored.repeated > 0 {
        console.note(format_args!(
            "{} items are answered again; the last answer counts.",
            scored.repeated
        ));
    }
    if scored.benchmark == Benchmark::Docmatix {
        console.note(
            "How the published numbers of Docmatix were scored is not known; F1 over words is a guess.",
        );
    }
    Ok(())
}

/// Refuses evaluations that were scored by different rules, or that do not say by which.
fn refuse_other_rules(runs: [&PathBuf; 2]) -> anyhow::Result<()> {
    let profile = |run: &PathBuf| -> anyhow::Result<String> {
        let file = run.join(SCORES);
        let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let scores: Option<serde_json::Value> = serde_json::from_slice(&text).ok();
        let profile = scores.and_then(|scores| Some(scores["profile"].as_str()?.to_owned()));
        profile.with_context(|| {
            format!("{} does not say by which rules it was scored: score it again", file.display())
        })
    };
    let [one, other] = [profile(runs[0])?, profile(runs[1])?];
    if one != other {
        bail!(
            "{} was scored by the rules of {one}, {} by those of {other}: score both with the same \
             --profile",
            runs[0].display(),
            runs[1].display()
        );
    }
    Ok(())
}

fn compare([a, b]: [&PathBuf; 2], console: &Console) -> anyhow::Result<()> {
    refuse_other_rules([a, b])?;
    let [file_a, file_b] = [a, b].map(|run| run.join(ITEMS));
    let found = Comparison::of([&file_a, &file_b])?;
    console.say(format_args!(
        "{:<24} {:<12} {:>8} {:>8} {:>8}  {:<18} {:>7} {:>11}",
        "set", "metric", "first", "second", "change", "95 %", "items", "other sign"
    ))?;
    for set in &found.sets {
        let [first, second] = set.values;
        let [low, high] = set.interval;
        console.say(format_args!(
            "{:<24} {:<12} {first:>8.2} {second:>8.2} {:>+8.2}  {:<18} {:>7} {:>9.1} %",
            set.set,
            set.metric,
            second - first,
            format!("{low:+.2} to {high:+.2}"),
            set.items,
            100.0 * set.other_sign
        ))?;
    }
    console.note(
        "Items are drawn again, the same ones for both: 95 % of the changes lie in the interval, and \
         `other sign` is the share of them that are zero or go the other way.",
    );
    Ok(())
}
