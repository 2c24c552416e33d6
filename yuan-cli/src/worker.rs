//! `yuan worker`: serve a device of this machine to a training on another one.
//!
//!     export YUAN_TOKEN=$(openssl rand -hex 16)     # the same for all processes
//!     yuan worker --listen 0.0.0.0:7000
//!     yuan pretrain --device ws://a:7000,ws://b:7000

use clap::Args;

use crate::console::Console;

/// Options of `yuan worker`.
#[derive(Args)]
#[cfg_attr(not(feature = "remote"), allow(dead_code, reason = "this build cannot serve"))]
pub struct Options {
    /// Device to serve: flex, cuda:0, … as far as this build has it
    #[arg(long, value_name = "DEVICE", default_value = "flex", help_heading = "Devices")]
    device: String,
    /// Address and port to listen on; port 0 takes a free one. Other machines are let in only where
    /// the environment has a secret (docs/distributed.md)
    #[arg(long, default_value = "127.0.0.1:0", value_name = "HOST:PORT", help_heading = "Devices")]
    listen: String,
    /// Let other machines in without a secret: whoever reaches the port may compute here
    #[arg(long, help_heading = "Devices")]
    insecure: bool,
    /// Compute with Burn's own operations only
    #[arg(long, help_heading = "Devices")]
    portable: bool,
    /// End when standard input does: for programs that start workers and may be killed themselves
    #[arg(long)]
    until_stdin_ends: bool,
}

#[cfg(not(feature = "remote"))]
pub fn run(_: &Options, _: &Console) -> anyhow::Result<()> {
    anyhow::bail!("this program was built without the feature `remote`, which serves devices")
}

#[cfg(feature = "remote")]
pub fn run(options: &Options, console: &Console) -> anyhow::Result<()> {
    use std::{io::Read, net::TcpListener, thread};

    use anyhow::{Context, anyhow, bail};
    use tracing_subscriber::EnvFilter;
    use yuan::model::TOKEN;

    // Burn's server would tell of every tensor that it fetches; RUST_LOG=info does.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    yuan::model::ops::set_fast_paths(!options.portable);
    let device = yuan::device(&options.device)?;
    let listener = TcpListener::bind(&options.listen)
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = listener.local_addr()?;
    let has_secret = std::env::var_os(TOKEN).is_some_and(|token| !token.is_empty());
    if !address.ip().is_loopback() && !has_secret && !options.insecure {
        bail!(
            "other machines could compute here: set {TOKEN} to a secret that the training knows, \
             or add --insecure"
        );
    }
    // A program that starts workers reads where they are.
    console.say(format_args!("serving {} at ws://{address}", options.device))?;
    if options.until_stdin_ends {
        thread::spawn(|| {
            drop(std::io::stdin().read_to_end(&mut Vec::new()));
            std::process::exit(0);
        });
    }
    yuan::model::serve(device, listener).map_err(|reason| anyhow!("cannot serve: {reason}"))
}
