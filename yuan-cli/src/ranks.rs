//! Several devices: a process for each, which train together.
//!
//! `yuan pretrain --device cuda:0,cuda:1` prepares the run and starts a `yuan rank` for every device.
//! Launchers of clusters (`torchrun --no-python`, `srun`) start the processes themselves and say in
//! the environment which one each is.

use std::{
    env, io,
    net::TcpListener,
    path::Path,
    process::{self, Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Args;
use rand::RngExt;
use yuan::{
    burn::tensor::Device,
    model::{
        ops,
        ranks::{Meeting, RankError, Ranks, TOKEN, connect},
    },
    prelude::*,
    rl,
    train::{Display, Watch},
};

use crate::{
    console::{Console, Interrupted, WrongOption},
    signals::Signals,
};

/// Longest patience, a week.
pub const MOST_PATIENCE: u64 = 7 * 24 * 3600;

/// Options of `yuan rank`.
#[derive(Args)]
pub struct Options {
    /// Directory of the run
    #[arg(long, value_name = "DIR")]
    run: std::path::PathBuf,
    /// Devices of this machine, one for each of its processes
    #[arg(long, value_name = "DEVICES", value_delimiter = ',')]
    device: Vec<String>,
    /// Rows of ranks that each hold all experts
    #[arg(long, default_value_t = 1, value_name = "ROWS")]
    data_parallel: usize,
    /// Longest time to wait for another rank
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=MOST_PATIENCE))]
    patience: u64,
    /// No fast versions
    #[arg(long)]
    portable: bool,
}

/// The device of a process among those of its machine.
///
/// # Errors
///
/// If there are fewer than processes, or it is none.
pub fn device_of(meeting: &Meeting, names: &[String]) -> anyhow::Result<Device> {
    let name = match names {
        [one] => one,
        names => names.get(meeting.local_rank).with_context(|| {
            format!("process {} of this machine has no device in --device", meeting.local_rank)
        })?,
    };
    Ok(yuan::device(name).wrong_option()?.autodiff())
}

/// `yuan rank`: trains as one of the processes that `yuan pretrain` started.
pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    ops::set_fast_paths(!options.portable);
    let patience = Duration::from_secs(options.patience);
    let meeting = Meeting::of_environment(patience)?
        .context("yuan rank is started by yuan pretrain, which says which rank it is")?;
    end_with_parent();
    let ranks = Ranks::new(connect(&meeting)?, options.data_parallel)?;
    let device = device_of(&meeting, &options.device)?;
    let run = Run::open(&options.run)?;
    let signals = Signals::listen_quietly().context("cannot listen to signals")?;
    train(&run, device, ranks, patience, console, &signals)
}

/// Ends this process without the ceremonies of its libraries: a GPU may wait for a rank that is gone,
/// and they would wait for the GPU.
fn leave() -> ! {
    #[cfg(unix)]
    signal_hook::low_level::exit(OTHER_FAILED);
    #[cfg(not(unix))]
    process::exit(OTHER_FAILED);
}

/// Status of a rank that ends because another one did.
const OTHER_FAILED: i32 = 3;

/// Whether an error says that another rank is gone.
fn is_of_another(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(TrainError::Ranks(RankError::Gone { .. }) | TrainError::Lost(_))
    )
}

/// Ends this process when the one that started it is gone: its standard input ends then.
fn end_with_parent() {
    thread::spawn(|| {
        drop(io::copy(&mut io::stdin(), &mut io::sink()));
        process::exit(1);
    });
}

/// Trains on one rank to the end or to a signal; when another rank is lost, the process ends.
///
/// # Errors
///
/// The first error of this rank.
pub fn train(
    run: &Run,
    device: Device,
    ranks: Ranks,
    patience: Duration,
    console: &Console,
    signals: &Signals,
) -> anyhow::Result<()> {
    let is_shown = ranks.world().is_first() && !console.is_quiet();
    let display = is_shown.then(|| Display::new(console.steps_between_lines()));
    let watch = Watch { ranks: Some(ranks.world().clone()), patience: patience.saturating_mul(2) };
    let (run, signals) = (run.clone(), signals.clone());
    let trained = watch.supervise(move |pulse| {
        let trainer = match run.data().learns_from_rewards() {
            true => rl::trainer_on_rank(&run, &device, &ranks)?,
            false => run.trainer_on_rank(&device, &ranks)?,
        };
        let trainer = trainer.with_callback(pulse)?.with_callback(signals)?;
        let mut trainer = match display {
            Some(display) => trainer.with_callback(display)?,
            None => trainer,
        };
        Ok(trainer.run()?)
    });
    if let Err(error) = &trained
        && is_of_another(error)
    {
        eprintln!("Error: {error}");
        leave();
    }
    trained
}

/// How long the other ranks may take to end by themselves when one has failed.
const GRACE: Duration = Duration::from_secs(20);

/// Starts a process for every device and waits for all of them.
///
/// # Errors
///
/// If one cannot be started or fails; the others are ended then.
pub fn start(
    run: &Path,
    devices: &[String],
    data: usize,
    patience: u64,
    portable: bool,
    console: &Console,
    signals: &Signals,
) -> anyhow::Result<()> {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = port.context("no port for the ranks to meet at")?.port();
    let token = format!("{:032x}", rand::rng().random::<u128>());
    let program = env::current_exe().context("cannot find this program to start its ranks")?;
    let mut ranks = Vec::with_capacity(devices.len());
    for rank in 0..devices.len() {
        let mut command = Command::new(&program);
        if console.is_quiet() || rank > 0 {
            command.arg("--quiet");
        } else if console.steps_between_lines() == 1 {
            command.arg("--verbose");
        }
        command.arg("rank").arg("--run").arg(run).arg("--device").arg(devices.join(","));
        command.args(["--data-parallel", &data.to_string(), "--patience", &patience.to_string()]);
        if portable {
            command.arg("--portable");
        }
        command
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", devices.len().to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .env(TOKEN, &token)
            .env_remove("TORCHELASTIC_RUN_ID")
            .stdin(Stdio::piped());
        // A terminal's signal reaches all processes of a group; ranks get it from this one, once.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        match command.spawn() {
            Ok(child) => ranks.push(child),
            Err(error) => {
                end(&mut ranks);
                return Err(error).context(format!("cannot start rank {rank}"));
            }
        }
    }
    wait(ranks, signals)
}

/// Waits for all ranks; after one has failed, for a moment.
fn wait(mut ranks: Vec<Child>, signals: &Signals) -> anyhow::Result<()> {
    let mut ended: Vec<Option<ExitStatus>> = vec![None; ranks.len()];
    let mut failed: Option<(usize, ExitStatus, Instant)> = None;
    let mut is_told = false;
    while ended.iter().any(Option::is_none) {
        thread::sleep(Duration::from_millis(50));
        if let (Some(signal), false) = (signals.received(), is_told) {
            is_told = true;
            ranks.iter().for_each(|rank| tell(rank, signal));
        }
        for (rank, (child, ended)) in ranks.iter_mut().zip(&mut ended).enumerate() {
            if ended.is_some() {
                continue;
            }
            *ended = child.try_wait().context("cannot wait for a rank")?;
            // `wait` would close the standard input, which tells a rank that this process is gone.
            if let Some(status) = ended.filter(|status| !status.success()) {
                let since = failed.map_or_else(Instant::now, |(.., since)| since);
                let is_cause = |status: ExitStatus| status.code() != Some(OTHER_FAILED);
                // The first one that did not only follow another.
                if failed.is_none_or(|(_, known, _)| !is_cause(known) && is_cause(status)) {
                    failed = Some((rank, status, since));
                }
            }
        }
        if failed.is_some_and(|(.., since)| since.elapsed() > GRACE) {
            end(&mut ranks);
        }
    }
    match failed {
        None => Ok(()),
        Some(_) if signals.received().is_some() => {
            Err(Interrupted(signals.received().unwrap_or(0)).into())
        }
        Some((rank, status, _)) => bail!(
            "rank {rank} failed ({status}), and the others were ended; --resume goes on from the \
             latest checkpoint"
        ),
    }
}

fn end(ranks: &mut [Child]) {
    for rank in ranks {
        // It may have ended meanwhile.
        drop(rank.kill());
        drop(rank.wait());
    }
}

/// Passes a signal on to a rank that did not get it with this process.
fn tell(rank: &Child, signal: i32) {
    #[cfg(unix)]
    drop(Command::new("kill").args([format!("-{signal}"), rank.id().to_string()]).status());
    #[cfg(not(unix))]
    let _ = (rank, signal);
}
