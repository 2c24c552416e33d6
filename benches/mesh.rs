//! What a mesh's devices say to each other, alone: a copy, the exchange of a layer's tokens, the
//! sum of gradients.
//!
//!     cargo bench --bench mesh                                              # one CPU twice: no wires
//!     cargo bench --bench mesh --features cuda -- --device cuda:0,cuda:1,cuda:2,cuda:3 --precision bf16
//!
//! A line of JSON each. `gb_per_s` is what leaves the busiest device in a second, both directions
//! of its link being free; `of_link` is that over the rate of a single copy between the first
//! device and the last.

use std::time::Instant;

use anyhow::{anyhow, ensure};
use burn::tensor::{Device, FloatDType, Tensor};
use clap::Parser;
use serde_json::json;
use yuan::{
    model::Exchange,
    train::{Precision, all_reduce, measure_link},
};

/// Time the copies of a mesh.
#[derive(Parser)]
struct Arguments {
    /// Devices of one row
    #[arg(long, default_value = "flex,flex", value_delimiter = ',')]
    device: Vec<String>,
    /// f32 or bf16, of the tokens; gradients are f32
    #[arg(long, default_value = "f32")]
    precision: String,
    /// Tokens of a device
    #[arg(long, default_value_t = 32768)]
    tokens: usize,
    /// Experts of a token
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// Experts of a device
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Width of a token
    #[arg(long, default_value_t = 1024)]
    hidden: usize,
    /// Repetitions that count
    #[arg(long, default_value_t = 10)]
    repeat: usize,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    run(&Arguments::parse())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let devices =
        arguments.device.iter().map(|name| yuan::device(name)).collect::<Result<Vec<_>, _>>()?;
    ensure!(devices.len() > 1, "--device names one device; a mesh has at least two");
    let precision: Precision =
        arguments.precision.parse().map_err(|what| anyhow!("--precision is {what}"))?;
    let link = measure_link(&devices[0], &devices[devices.len() - 1])?;
    println!(
        "{}",
        json!({ "what": "copy", "devices": devices.len(), "gb_per_s": round(link / 1e9) })
    );
    let bench = Bench { devices, link, repeat: arguments.repeat };
    bench.exchange(arguments, precision.dtype())?;
    [1, 16, 256].into_iter().try_for_each(|mib| bench.all_reduce(mib))
}

struct Bench {
    devices: Vec<Device>,
    link: f64,
    repeat: usize,
}

impl Bench {
    /// Tokens to their experts and back, every expert equally loaded.
    fn exchange(&self, arguments: &Arguments, dtype: FloatDType) -> anyhow::Result<()> {
        let (devices, pairs) = (self.devices.len(), arguments.tokens * arguments.top_k);
        let experts = devices * arguments.experts;
        let counts: Vec<usize> = (0..experts)
            .map(|expert| pairs / experts + usize::from(expert < pairs % experts))
            .collect();
        let exchange = Exchange::new(vec![counts; devices], &vec![arguments.experts; devices]);
        let rows = |device| Tensor::<2>::ones([pairs, arguments.hidden], device).cast(dtype);
        let rows: Vec<Tensor<2>> = self.devices.iter().map(rows).collect();
        let seconds = self.time(|| {
            let arrived =
                exchange.send(rows.clone()).into_iter().map(|arrived| Some(arrived?.rows));
            exchange.send_back(arrived.collect(), &self.devices).into_iter().flatten().collect()
        })?;
        let bytes = 2 * (devices - 1) * pairs / devices * arguments.hidden * rows[0].dtype().size();
        self.print("exchange, there and back", bytes, seconds);
        Ok(())
    }

    fn all_reduce(&self, mib: usize) -> anyhow::Result<()> {
        let elements = mib << 18;
        let tensors: Vec<Tensor<1>> =
            self.devices.iter().map(|device| Tensor::ones([elements], device)).collect();
        let seconds = self.time(|| all_reduce(vec![tensors.clone()]).remove(0))?;
        let bytes = 2 * (self.devices.len() - 1) * 4 * elements / self.devices.len();
        self.print(&format!("all-reduce of {mib} MiB"), bytes, seconds);
        Ok(())
    }

    /// Median seconds of `work`, from idle devices to idle devices.
    fn time<const D: usize>(&self, work: impl Fn() -> Vec<Tensor<D>>) -> anyhow::Result<f64> {
        let mut times = Vec::with_capacity(self.repeat);
        for turn in 0..self.repeat + 3 {
            self.idle()?;
            let start = Instant::now();
            let results = work();
            self.idle()?;
            if turn >= 3 {
                times.push(start.elapsed().as_secs_f64());
            }
            drop(results);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn idle(&self) -> anyhow::Result<()> {
        Ok(self.devices.iter().try_for_each(Device::sync)?)
    }

    fn print(&self, what: &str, bytes: usize, seconds: f64) {
        let rate = bytes as f64 / seconds;
        let line = json!({
            "what": what,
            "devices": self.devices.len(),
            "mb_per_device": round(bytes as f64 / 1e6),
            "ms": round(1e3 * seconds),
            "gb_per_s": round(rate / 1e9),
            "of_link": round(rate / self.link),
        });
        println!("{line}");
    }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
