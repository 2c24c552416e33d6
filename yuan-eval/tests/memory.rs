//! Ten thousand answers are scored in memory that does not grow with their texts.

use std::{fmt::Write, fs};

use peak_alloc::PeakAlloc;
use yuan_eval::{Answers, Benchmark, OutsideScores, Profile, Scored};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

/// Items of the benchmark.
const ITEMS: usize = 10_000;

#[test]
fn ten_thousand_summaries_are_scored_in_bounded_memory() {
    let directory = tempfile::tempdir().unwrap();
    let mut data = String::new();
    let mut said = String::new();
    // 40 MB of dialogues, which nobody needs in memory at once.
    let dialogue =
        "The expert asked the router for another token and was told to wait. ".repeat(60);
    for number in 0..ITEMS {
        let summary = format!("the expert number {number} waits for a token");
        let line = serde_json::json!({"dialogue": dialogue, "summary": summary});
        writeln!(data, "{line}").unwrap();
    }
    fs::write(directory.path().join("xsum.jsonl"), &data).unwrap();
    let mut ids = Vec::with_capacity(ITEMS);
    let benchmark = Benchmark::SummEval;
    let keep = |item: yuan_eval::Item| {
        ids.push(item.id);
        Ok(())
    };
    benchmark.for_each(directory.path(), Profile::Authors, None, keep).unwrap();
    for (number, id) in ids.iter().enumerate() {
        let answer = format!("expert number {} waits", number % 100);
        writeln!(said, "{}", serde_json::json!({"id": id, "answer": answer})).unwrap();
    }
    let file = directory.path().join("answers.jsonl");
    fs::write(&file, said).unwrap();
    drop((data, ids));

    let before = PEAK.current_usage_as_mb();
    PEAK.reset_peak_usage();
    let answers = Answers::read(&file).unwrap();
    let (outside, mut items) = (OutsideScores::default(), 0);
    let count = |_| {
        items += 1;
        Ok(())
    };
    let scored =
        Scored::of(benchmark, directory.path(), Profile::Authors, &answers, &outside, None, count);
    assert_eq!((items, scored.unwrap().sets.len()), (ITEMS, 2), "ROUGE-1 and ROUGE-2 of each");
    let used = PEAK.peak_usage_as_mb() - before;
    assert!(used < 30.0, "{used} MB for answers of 1 MB and 40 MB of data");
}
