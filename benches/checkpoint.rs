//! Loading and saving a checkpoint beside `dd` with the same bytes on the same disk, and peak
//! memory.
//!
//!     cargo bench --bench checkpoint
//!
//! `YUAN_BENCH_DIR` names the directory to work in (default: target/). Reading is measured from the
//! page cache and, where the system lets us drop it (root), from the disk. Every measurement is a
//! process of its own.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use burn::tensor::{Device, FloatDType};
use yuan::{
    model::{
        YuanConfig, YuanModel,
        hf::{HfCheckpoint, LoadOptions, SaveOptions},
        named,
    },
    train::peak_resident,
};

/// As in the programs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// 443 M parameters: 1.77 GB.
fn config() -> YuanConfig {
    YuanConfig {
        hidden_size: 1024,
        num_attention_heads: 8,
        attention_projection_size: 2048,
        expert_hidden_size: 1024,
        experts_per_layer: vec![16; 7],
        ..YuanConfig::toy(8192)
    }
}

/// What a child process does; it prints seconds and peak memory.
fn child(task: &str, from: &Path, to: &Path) {
    let device = Device::flex();
    let load = |dtype| {
        let options = LoadOptions { dtype, ..LoadOptions::default() };
        HfCheckpoint::open(from)
            .and_then(|checkpoint| checkpoint.load(&device, &options))
            .expect("it loads")
    };
    let options = SaveOptions { overwrite: true, ..SaveOptions::default() };
    let mut start = Instant::now();
    match task {
        "make" => {
            device.seed(0);
            let model =
                named::initialized(YuanModel::new(&config(), &device).expect("a valid model"));
            model.save_hf(to, &options).expect("it is saved");
        }
        // What no way of loading can undercut: the same bytes in fresh memory.
        "fs::read" => drop(fs::read(from.join("model.safetensors")).expect("it is read")),
        "load" => drop(load(None)),
        "load as bf16" => drop(load(Some(FloatDType::BF16))),
        "save" => {
            let model = load(None);
            start = Instant::now();
            model.save_hf(to, &options).expect("it is saved");
        }
        "copy" => {
            let checkpoint = HfCheckpoint::open(from).expect("it opens");
            checkpoint.rewrite(to, None, &options).expect("it is copied");
        }
        "prune by a quarter" => {
            let checkpoint = HfCheckpoint::open(from).expect("it opens");
            let kept = vec![(0..12).collect(); checkpoint.config().num_layers()];
            checkpoint.rewrite(to, Some(&kept), &options).expect("it is pruned");
        }
        other => panic!("no task {other}"),
    }
    println!("{} {}", start.elapsed().as_secs_f64(), peak_resident().unwrap_or(0));
}

struct Bench {
    from: PathBuf,
    to: PathBuf,
    bytes: u64,
    cold: bool,
}

impl Bench {
    fn drop_caches(&self) -> bool {
        drop(Command::new("sync").status());
        fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
    }

    fn ours(&self, task: &str) -> (f64, f64) {
        if self.to != self.from {
            drop(fs::remove_dir_all(&self.to)); // `dd` has nothing to replace either
        }
        let program = std::env::current_exe().expect("a path");
        let output = Command::new(program)
            .args([Path::new(task), &self.from, &self.to])
            .output()
            .expect("it starts");
        assert!(output.status.success(), "{task}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout);
        let mut numbers =
            text.split_whitespace().map(|number| number.parse::<f64>().expect("a number"));
        (numbers.next().expect("seconds"), numbers.next().expect("bytes"))
    }

    fn dd(&self, arguments: &[String]) -> f64 {
        let start = Instant::now();
        let status = Command::new("dd")
            .args(arguments)
            .args(["bs=8M", "status=none"])
            .status()
            .expect("dd starts");
        assert!(status.success(), "dd {arguments:?}");
        start.elapsed().as_secs_f64()
    }

    fn dd_read(&self) -> f64 {
        self.dd(&[
            format!("if={}", self.from.join("model.safetensors").display()),
            "of=/dev/null".into(),
        ])
    }

    /// The same bytes, from the page cache to the disk, as saving leaves them.
    fn dd_write(&self) -> f64 {
        let to = self.to.with_extension("dd");
        let from = self.from.join("model.safetensors");
        let seconds = self.dd(&[
            format!("if={}", from.display()),
            format!("of={}", to.display()),
            "conv=fsync".into(),
        ]);
        fs::remove_file(to).expect("it was written");
        seconds
    }

    fn row(&self, name: &str, theirs: f64, (seconds, peak): (f64, f64), model: Option<f64>) {
        let speed = |seconds: f64| self.bytes as f64 / 1e9 / seconds;
        let memory =
            model.map_or(format!("{:.2} GB", peak / 1e9), |model| format!("{:.2}", peak / model));
        let line = format!(
            "{name:<26} {:>8.2} {:>8.2} {:>7.2}   {memory}",
            speed(theirs),
            speed(seconds),
            theirs / seconds
        );
        drop(writeln!(std::io::stdout(), "{line}"));
    }
}

fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [task, from, to] = &arguments[..] {
        return child(task, Path::new(from), Path::new(to));
    }
    let root =
        std::env::var_os("YUAN_BENCH_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let directory = root.join("checkpoint-bench");
    fs::create_dir_all(&directory).expect("a directory to work in");
    let bytes = 4 * config().parameter_count().total();
    let mut bench =
        Bench { from: directory.join("from"), to: directory.join("to"), bytes, cold: false };
    let made = bench.to.clone();
    bench.to.clone_from(&bench.from);
    bench.ours("make");
    bench.to = made;
    bench.cold = bench.drop_caches();
    println!(
        "{:.2} GB, GB/s                   dd     ours   ratio   peak memory / model",
        bytes as f64 / 1e9
    );
    let model = Some(bytes as f64);
    for round in 1..=2 {
        println!("round {round}");
        if bench.cold {
            bench.drop_caches();
            let theirs = bench.dd_read();
            bench.drop_caches();
            bench.row("load from disk", theirs, bench.ours("load"), model);
            bench.drop_caches();
            bench.row("std::fs::read from disk", theirs, bench.ours("fs::read"), model);
        }
        bench.dd_read();
        bench.row("load from page cache", bench.dd_read(), bench.ours("load"), model);
        bench.row("std::fs::read", bench.dd_read(), bench.ours("fs::read"), model);
        bench.row(
            "load as bf16",
            bench.dd_read(),
            bench.ours("load as bf16"),
            Some(bytes as f64 / 2.0),
        );
        bench.row("save", bench.dd_write(), bench.ours("save"), model);
        bench.row("copy without the model", bench.dd_write(), bench.ours("copy"), None);
        bench.row("prune by a quarter", bench.dd_write(), bench.ours("prune by a quarter"), None);
    }
    fs::remove_dir_all(directory).expect("it was written");
}
