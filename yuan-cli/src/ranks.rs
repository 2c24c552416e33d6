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

use anyhow::{Context, anyhow, bail};
use clap::Args;
use rand::RngExt;
use yuan::{
    model::{
        TOKEN, ops,
        ranks::{Meeting, Ranks, connect},
    },
    prelude::*,
    train::{Display, Watch},
};

use crate::{
    console::{Console, Interrupted, WrongOption},
    signals::Signals,
};

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
    patience: u64,
    /// No fast versions
    #[arg(long)]
    portable: bool,
}

/// One of the processes that train together, by what a launcher says in the environment.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    rank: usize,
    size: usize,
    /// Which device of its machine it takes.
    local_rank: usize,
    /// Where the first rank listens.
    address: String,
    token: String,
}

impl Place {
    /// None where no launcher started several processes.
    ///
    /// # Errors
    ///
    /// If the variables contradict each other, or ranks of several machines have no token.
    pub fn of_environment() -> anyhow::Result<Option<Self>> {
        Self::of(|name| env::var(name).ok())
    }

    fn of(get: impl Fn(&str) -> Option<String>) -> anyhow::Result<Option<Self>> {
        // torchrun's names, or else Slurm's.
        let names = match get("WORLD_SIZE") {
            Some(_) => ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
            None => ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
        };
        let number = |name: &str| -> anyhow::Result<usize> {
            let value = get(name).with_context(|| format!("the launcher set no {name}"))?;
            value.parse().map_err(|_| anyhow!("{name}={value} is no number"))
        };
        if get(names[0]).is_none() || number(names[1])? < 2 {
            return Ok(None);
        }
        let [rank, size, local_rank] = [number(names[0])?, number(names[1])?, number(names[2])?];
        let host = get("MASTER_ADDR").or_else(|| first_host(&get("SLURM_JOB_NODELIST")?));
        let host = host.context("the launcher set no MASTER_ADDR: where is the first rank?")?;
        let port = match get("MASTER_PORT") {
            // torchrun itself listens at its port.
            Some(_) => number("MASTER_PORT")? + usize::from(get("TORCHELASTIC_RUN_ID").is_some()),
            // Jobs that run side by side get ports of their own.
            None => 20_000 + number("SLURM_JOB_ID").unwrap_or(0) % 20_000,
        };
        let is_local = matches!(host.as_str(), "localhost" | "127.0.0.1" | "::1");
        let token = get(TOKEN);
        if token.is_none() && !is_local {
            bail!(
                "ranks on several machines need a secret in common: set {TOKEN} to the same random \
                 text for all of them"
            );
        }
        let address = if host.contains(':') { format!("[{host}]") } else { host };
        let (address, token) = (format!("{address}:{port}"), token.unwrap_or_default());
        Ok(Some(Self { rank, size, local_rank, address, token }))
    }

    /// Whether this rank prepares the run and tells of it.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Meets the other ranks.
    ///
    /// # Errors
    ///
    /// If one does not come, or they cannot be arranged in so many rows.
    pub fn meet(&self, data: usize, patience: Duration) -> anyhow::Result<Ranks> {
        let Self { rank, size, address, token, .. } = self;
        let (address, token) = (address.clone(), token.clone());
        let meeting = Meeting { rank: *rank, size: *size, address, token, patience };
        Ok(Ranks::new(connect(&meeting)?, data)?)
    }

    /// The device of this rank among those of its machine.
    ///
    /// # Errors
    ///
    /// If there are fewer than processes, or it is none.
    pub fn device(&self, names: &[String]) -> anyhow::Result<yuan::burn::tensor::Device> {
        let name = match names {
            [one] => one,
            names => names.get(self.local_rank).with_context(|| {
                format!("process {} of this machine has no device in --device", self.local_rank)
            })?,
        };
        Ok(yuan::device(name).wrong_option()?.autodiff())
    }
}

/// The first of Slurm's hosts: `node[03-04,7]` is `node03`.
fn first_host(list: &str) -> Option<String> {
    let Some((name, numbers)) = list.split_once('[') else {
        return Some(list.split(',').next()?.to_owned());
    };
    if let Some((first, _)) = name.split_once(',') {
        return Some(first.to_owned());
    }
    let first = numbers.split([',', '-', ']']).next()?;
    Some(format!("{name}{first}"))
}

/// `yuan rank`: trains as one of the processes that `yuan pretrain` started.
pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    ops::set_fast_paths(!options.portable);
    let place = Place::of_environment()?
        .context("yuan rank is started by yuan pretrain, which says which rank it is")?;
    end_with_parent();
    let patience = Duration::from_secs(options.patience);
    let ranks = place.meet(options.data_parallel, patience)?;
    let device = place.device(&options.device)?;
    let run = Run::open(&options.run)?;
    let signals = Signals::listen_quietly().context("cannot listen to signals")?;
    train(&run, device, ranks, patience, console, &signals)
}

/// Ends this process when the one that started it is gone: its standard input ends then.
fn end_with_parent() {
    thread::spawn(|| {
        drop(io::copy(&mut io::stdin(), &mut io::sink()));
        process::exit(1);
    });
}

/// Trains on one rank to the end, to a signal, or until another rank is lost.
///
/// # Errors
///
/// The first error of this rank, or which other one is gone.
pub fn train(
    run: &Run,
    device: yuan::burn::tensor::Device,
    ranks: Ranks,
    patience: Duration,
    console: &Console,
    signals: &Signals,
) -> anyhow::Result<()> {
    let is_shown = ranks.world().is_first() && !console.is_quiet();
    let display = is_shown.then(|| Display::new(console.steps_between_lines()));
    let watch =
        Watch { servers: Vec::new(), ranks: Some(ranks.world().clone()), patience: patience * 2 };
    let (run, signals) = (run.clone(), signals.clone());
    watch.supervise(move |pulse| {
        let trainer = run.trainer_on_rank(&device, &ranks)?;
        let trainer = trainer.with_callback(pulse)?.with_callback(signals)?;
        let mut trainer = match display {
            Some(display) => trainer.with_callback(display)?,
            None => trainer,
        };
        Ok(trainer.run()?)
    })
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
                failed.get_or_insert((rank, status, Instant::now()));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> anyhow::Result<Option<Place>> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Place::of(|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn launchers_say_which_rank_a_process_is() {
        assert_eq!(place(&[]).unwrap(), None);
        assert_eq!(place(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap(), None);
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", "none"),
        ];
        let found = place(&torchrun).unwrap().unwrap();
        assert_eq!((found.rank, found.size, found.local_rank), (3, 4, 1));
        assert_eq!(found.address, "127.0.0.1:29501");
        let slurm = [
            ("SLURM_PROCID", "9"),
            ("SLURM_NTASKS", "16"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "41234"),
            ("SLURM_JOB_NODELIST", "gpu[03-04]"),
        ];
        let error = place(&slurm).unwrap_err().to_string();
        assert!(error.contains("set YUAN_TOKEN"), "{error}");
        let found = place(&[&slurm[..], &[(TOKEN, "secret")]].concat()).unwrap().unwrap();
        assert_eq!((found.address.as_str(), found.rank), ("gpu03:21234", 9));
        let error = place(&[("RANK", "0"), ("WORLD_SIZE", "many")]).unwrap_err().to_string();
        assert_eq!(error, "WORLD_SIZE=many is no number");
    }

    #[test]
    fn the_first_of_slurms_hosts_is_found() {
        let first = |list| first_host(list).unwrap();
        assert_eq!(first("node7"), "node7");
        assert_eq!(first("a1,b[2-3]"), "a1");
        assert_eq!(first("b[2-3],a1"), "b2");
        assert_eq!(first("node[03,07-09]"), "node03");
    }
}
