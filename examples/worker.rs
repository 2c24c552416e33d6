//! Serve a device of this machine to a training on another one.
//!
//!     cargo run --release --features remote --example worker -- --listen 0.0.0.0:7000
//!     cargo run --release --features remote --example pretrain -- --device ws://a:7000,ws://b:7000

use std::{
    io::{Read, Write},
    net::TcpListener,
    process::ExitCode,
    thread,
};

use anyhow::{Context, anyhow};
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Every step allocates and frees the same large tensors, which glibc returns to the system each
/// time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serve a device to trainings of other processes, until the process is told to end.
#[derive(Parser)]
struct Arguments {
    /// Device to serve: flex, cuda:0, … as far as this build has it
    #[arg(long, default_value = "flex")]
    device: String,
    /// Address and port to listen on; port 0 takes a free one. Whoever reaches it may compute here:
    /// keep it inside
    #[arg(long, default_value = "127.0.0.1:0", value_name = "HOST:PORT")]
    listen: String,
    /// Compute with Burn's own operations instead of ours
    #[arg(long)]
    portable: bool,
    /// End when standard input does: for programs that start workers and may be killed themselves
    #[arg(long)]
    until_stdin_ends: bool,
}

fn main() -> ExitCode {
    yuan::exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    // Burn's server would tell of every tensor that it fetches; RUST_LOG=info does.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    yuan::model::ops::set_fast_paths(!arguments.portable);
    let device = yuan::device(&arguments.device)?;
    let listener = TcpListener::bind(&arguments.listen)
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let address = listener.local_addr()?;
    // A program that starts workers reads where they are.
    writeln!(std::io::stdout(), "serving {} at ws://{address}", arguments.device)?;
    std::io::stdout().flush()?;
    if arguments.until_stdin_ends {
        thread::spawn(|| {
            drop(std::io::stdin().read_to_end(&mut Vec::new()));
            std::process::exit(0);
        });
    }
    yuan::model::device::serve(device, listener).map_err(|reason| anyhow!("cannot serve: {reason}"))
}
