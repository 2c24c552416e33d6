//! Pre-train a toy Yuan3.0 model with LAEP on real text, end to end.
//!
//!     cargo run --release --example pretrain

mod arguments;

use std::{
    fs,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use arguments::Arguments;
use burn::tensor::FloatDType;
use clap::Parser;
use yuan::{
    model::{DeviceMesh, MeshModel, PrunableExperts, YuanConfig, YuanModel, device::REMOTE, named},
    train::{
        LanguageModel, ModelDirectory, Place, PruneExperts, SelectionBias, SpeedModel, TrainConfig,
        Trainer, Watch,
        callback::{BalanceBias, CheckpointEvery, Display, MetricsFile, Trigger, ValidateEvery},
        checkpoint::Checkpoint,
        data::{self, RowStream, TokenStreams},
        memory,
        model_directory::TOKENIZER,
        report::{self, History, html_report, pictures, summary_table},
    },
};

/// Every step allocates and frees the same large tensors, which glibc returns to the system each
/// time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    yuan::model::ops::set_fast_paths(!arguments.portable);
    let devices = arguments.device.iter().map(|name| Ok(yuan::device(name)?));
    let mesh = DeviceMesh::new(devices.collect::<anyhow::Result<_>>()?, arguments.data_parallel)?
        .autodiff();
    let run_dir = if arguments.resume { arguments.existing_run()? } else { arguments.new_run()? };
    if !arguments.resume
        && let Err(error) = prepare(arguments, &run_dir, &mesh)
    {
        // Half a preparation is no run; the directory was free before.
        drop(fs::remove_dir_all(&run_dir));
        return Err(error);
    }
    let is_remote = arguments.device.iter().any(|name| name.starts_with(REMOTE));
    let config = match mesh.devices() {
        [device] if !is_remote => {
            let mut trainer = open(&run_dir, device, Ok)?;
            trainer.run()?;
            trainer.config().clone()
        }
        _ => train_on(mesh, arguments, run_dir.clone())?,
    };
    close(&run_dir, &config)
}

/// Trains on several devices, and gives up when one of them is lost.
fn train_on(
    mesh: DeviceMesh,
    arguments: &Arguments,
    run_dir: PathBuf,
) -> anyhow::Result<TrainConfig> {
    let servers =
        arguments.device.iter().filter_map(|name| name.strip_prefix(REMOTE).map(str::to_owned));
    let watch =
        Watch { servers: servers.collect(), patience: Duration::from_secs(arguments.patience) };
    watch.supervise(move |pulse| {
        let spread = |model: YuanModel| Ok(MeshModel::distribute(&model, &mesh)?);
        let mut trainer = open(&run_dir, &mesh, spread)?.with_callback(pulse)?;
        check_groups(trainer.config(), &mesh)?;
        trainer.run()?;
        Ok(trainer.config().clone())
    })
}

/// A plan spreads the experts over groups, of which every device of a row gets as many.
fn check_groups(config: &TrainConfig, mesh: &DeviceMesh) -> anyhow::Result<()> {
    let (groups, devices) = (config.laep.groups, mesh.expert());
    let is_spread = config.laep.trigger != Trigger::Never || config.laep.rearrange_every > 0;
    if is_spread && !groups.is_multiple_of(devices) {
        bail!("{groups} groups cannot be spread over the {devices} devices that share the experts");
    }
    Ok(())
}

/// Files of a run that are written once, before the first step.
const CONFIG: &str = "run.json";
const MODEL: &str = "config.json";
/// For the libraries that read a tokenizer by these files.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TOKENIZER_CONFIG_JSON: &str =
    "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"eos_token\": \"<eod>\"\n}\n";

/// Reads the text, trains the tokenizer and writes down what the run is.
fn prepare(arguments: &Arguments, run_dir: &Path, mesh: &DeviceMesh) -> anyhow::Result<()> {
    let init = arguments.init.as_deref().map(ModelDirectory::open).transpose()?;
    let mut config = arguments.train_config(init.as_ref().map(ModelDirectory::config))?;
    let documents = match &arguments.data {
        Some(directory) => data::read_directory(directory)?,
        None => {
            data::read_crate_sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))?
        }
    };
    let bytes: usize = documents.iter().map(|document| document.text.len()).sum();
    note(&format!("{} documents, {:.1} MB of text", documents.len(), bytes as f64 / 1e6));
    let tokenizer = match &init {
        Some(init) => data::read_tokenizer(&init.tokenizer_directory().join(TOKENIZER))?,
        None => {
            note("training the tokenizer");
            data::train_tokenizer(&documents, arguments.vocab, std::io::stderr().is_terminal())?
        }
    };
    let streams = TokenStreams::new(&documents, &tokenizer)?;
    note(&format!(
        "{} tokens to train on, {} to validate",
        streams.train.len(),
        streams.validation.len()
    ));
    // Too little text is found out here, before a run directory exists.
    row_streams(&streams, &config)?;

    fs::create_dir_all(run_dir).with_context(|| format!("cannot create {}", run_dir.display()))?;
    let write = |name: &str, text: String| {
        let path = run_dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    streams.save(run_dir)?;
    let vocab_size = tokenizer.get_vocab_size(true);
    let tokenizer =
        tokenizer.to_string(true).map_err(|error| anyhow::anyhow!("tokenizer: {error}"))?;
    write(TOKENIZER, tokenizer)?;
    write(TOKENIZER_CONFIG, TOKENIZER_CONFIG_JSON.into())?;
    let model = match &init {
        Some(init) => start_from(init, run_dir, vocab_size, streams.eod)?,
        None => arguments.model_config(vocab_size, streams.eod)?,
    };
    write(MODEL, model.to_json())?;
    // Measuring takes a moment, which only a prediction is worth.
    config.laep.speed =
        if arguments.no_laep { None } else { Some(SpeedModel::measure(&model, mesh, &config)?) };
    // Last, since a directory with this file is a run that can be resumed.
    write(CONFIG, serde_json::to_string_pretty(&config)?)
}

/// Writes another model's weights down as the run's first checkpoint.
fn start_from(
    init: &ModelDirectory,
    run_dir: &Path,
    vocab_size: usize,
    eod: u32,
) -> anyhow::Result<YuanConfig> {
    let mut config = init.config().clone();
    if config.vocab_size < vocab_size {
        bail!("the tokenizer has {vocab_size} entries, the model only {}", config.vocab_size);
    }
    if let Some(other) = config.tokens.eod.replace(eod).filter(|&other| other != eod) {
        bail!("config.json says that {other} ends a document, the tokenizer {eod}");
    }
    Checkpoint::save_initial(run_dir, &init.load(&yuan::device("flex")?, Some(FloatDType::F32))?)?;
    Ok(config)
}

/// Opens a run at its latest checkpoint, or at its start.
///
/// `spread` brings a fresh model to where it is trained.
fn open<M>(
    run_dir: &Path,
    place: &M::Place,
    spread: impl FnOnce(YuanModel) -> anyhow::Result<M>,
) -> anyhow::Result<Trainer<M>>
where
    M: LanguageModel + PrunableExperts + SelectionBias,
{
    let config = run_dir.join(CONFIG);
    let Ok(text) = fs::read_to_string(&config) else {
        bail!("{} holds no run to resume", run_dir.display());
    };
    let config: TrainConfig = serde_json::from_str(&text)
        .with_context(|| format!("{} is no run's configuration", config.display()))?;
    let model = YuanConfig::load(&run_dir.join(MODEL))?;
    let eod = model.tokens.eod.context("config.json names no end-of-document token")?;
    let streams = row_streams(&TokenStreams::load(run_dir, eod)?, &config)?;
    let trainer = match Checkpoint::latest(run_dir)? {
        Some(checkpoint) => Trainer::resume(config.clone(), run_dir, place, &checkpoint, streams)?,
        None => {
            let home = &place.devices()[0];
            // As if the first step drew them.
            home.seed(config.seed.wrapping_add(1));
            let model = spread(named::initialized(YuanModel::new(&model, home)?))?;
            Trainer::new(config.clone(), run_dir, place, model, streams)?
        }
    };
    Ok(trainer
        .with_callback(BalanceBias { update_rate: config.bias_update_rate })?
        .with_callback(PruneExperts::new(config.laep.clone())?)?
        .with_callback(ValidateEvery(config.validate_every))?
        .with_callback(CheckpointEvery(config.checkpoint_every))?
        .with_callback(MetricsFile::default())?
        .with_callback(Display::new(10))?)
}

fn row_streams(streams: &TokenStreams, config: &TrainConfig) -> anyhow::Result<[RowStream; 2]> {
    let rows =
        |tokens: &[u32], seed| RowStream::new(tokens.to_vec(), streams.eod, config.seq_len, seed);
    let train = rows(&streams.train, Some(config.seed)).context("too little text to train on")?;
    Ok([
        train,
        rows(&streams.validation, None).context(
            "too little text to validate on: about one file in twenty is kept for it, so bring more files",
        )?,
    ])
}

/// Draws the pictures, writes the report and prints the table.
fn close(run_dir: &Path, config: &TrainConfig) -> anyhow::Result<()> {
    let history = History::read(run_dir)?;
    let name = run_dir.file_name().unwrap_or(run_dir.as_os_str()).to_string_lossy();
    let mut files = vec![
        ("loss.svg", pictures::loss(&history)?),
        ("expert_load.svg", pictures::expert_load(&history)?),
        ("load_history.svg", pictures::load_history(&history)?),
        ("report.html", html_report(&name, &history)?),
    ];
    let plan = history.prunes().next().map(|(_, plan)| plan);
    if let Some(plan) = plan {
        files.push(("load_profile.svg", pictures::load_profile(plan)?));
        files.push(("device_groups.svg", pictures::device_groups(plan)?));
    }
    for (file, text) in files {
        report::save(&run_dir.join(file), &text)?;
    }
    let mut out = std::io::stdout();
    writeln!(out, "\n{}", summary_table(&history))?;
    if plan.is_none() {
        let why = match &config.laep.trigger {
            _ if history.undone().next().is_some() => "the guard undid the prune",
            Trigger::Never => "LAEP was off",
            Trigger::Steps(_) => "the run ended before the step to prune at",
            Trigger::Stable { .. } => "the loads of all layers were never stable",
        };
        writeln!(out, "Nothing was pruned: {why}.")?;
    }
    if let Some(peak) = memory::peak_resident() {
        writeln!(out, "Peak memory of the process: {:.2} GB.", peak as f64 / 1e9)?;
    }
    let report = run_dir.join("report.html");
    writeln!(
        out,
        "The report is {}; metrics, plan and checkpoints are beside it",
        report.display()
    )?;
    Ok(())
}

fn note(line: &str) {
    // A closed pipe must not end a run.
    drop(writeln!(std::io::stderr(), "{line}"));
}
