//! What the rows of a prepared data set cost a run: the time until the first row, the wait of a step
//! for its rows while another thread makes them, and the memory of the process.
//!
//!     cargo bench --bench rows -- DIR [STEPS] [ROWS] [SEQ]

use std::{
    error::Error,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use yuan::{
    data::{Dataset, Mixture},
    train::{
        data::{RowStream, TokenRows},
        peak_resident,
    },
};

/// What a step is taken to last.
const STEP: Duration = Duration::from_millis(100);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(directory) = arguments.next() else {
        println!("usage: cargo bench --bench rows -- DIR [STEPS] [ROWS] [SEQ]");
        return Ok(());
    };
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse());
    let (steps, rows, seq): (usize, usize, usize) = (number(100)?, number(8)?, number(2048)?);

    let started = Instant::now();
    let dataset = Dataset::open(directory.as_ref())?;
    let mixture = Mixture::new(seq, Some(0), vec![("set", 1.0, dataset.train()?)])?;
    let mut stream = RowStream::of(Arc::new(TokenRows::new(mixture, dataset.info().eod)));
    stream.next_rows(rows)?;
    let first = started.elapsed();
    let (mut waited, mut longest) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..steps {
        sleep(STEP);
        let asked = Instant::now();
        stream.next_rows(rows)?;
        let wait = asked.elapsed();
        waited += wait;
        longest = longest.max(wait);
    }
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{} tokens: first rows after {:.0} ms; {steps} steps of {rows} x {seq} tokens waited {:.3} ms \
         on average, {:.3} ms at most; peak {:.0} MB",
        dataset.info().train.tokens,
        milliseconds(first),
        milliseconds(waited) / steps as f64,
        milliseconds(longest),
        peak_resident().unwrap_or(0) as f64 / 1e6
    );
    Ok(())
}
