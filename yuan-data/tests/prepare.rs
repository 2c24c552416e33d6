//! Preparing text: the same bytes whatever happens in between.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use yuan_data::{
    DataError, Dataset, NoProgress, PrepareOptions, Progress, Stage, TokenFile, TokenType,
    TokenWriter, prepare, tokenizer::Encoder,
};

/// Some documents, two of them the same.
fn write_sources(directory: &Path) {
    for i in 0..60 {
        let words = (0..5000 + i * 7).map(|word| format!("word{} ", word * (i + 3) % 71));
        fs::write(directory.join(format!("{i:02}.txt")), words.collect::<String>()).unwrap();
    }
    let text = |i: usize| format!("line {i} of the second file, and {} more", i % 7);
    let lines = (0..400).map(|i| serde_json::json!({"text": text(i % 350)}).to_string() + "\n");
    fs::write(directory.join("lines.jsonl"), lines.collect::<String>()).unwrap();
    // A document of several parts.
    let long: String = (0..34_000).map(|i| format!("long{}\n", i % 1009)).collect();
    fs::write(directory.join("long.txt"), long).unwrap();
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect()
}

/// Stops at every so many-th call.
struct Stopping(AtomicU32, u32);

impl Progress for Stopping {
    fn goes_on(&self, stage: Stage, _: u64, _: u64) -> bool {
        stage == Stage::Tokenizer || !(self.0.fetch_add(1, Relaxed) + 1).is_multiple_of(self.1)
    }
}

#[test]
fn threads_and_interruptions_change_no_byte() {
    let temp = tempfile::tempdir().unwrap();
    let sources = temp.path().join("sources");
    fs::create_dir(&sources).unwrap();
    write_sources(&sources);
    let options = PrepareOptions::train_tokenizer(vec![sources.clone()], 400);
    let whole = prepare(&temp.path().join("whole"), &options, &NoProgress).unwrap();
    let expected = files(whole.directory());
    let names: Vec<_> = expected.keys().map(String::as_str).collect();
    let all = [
        "dataset.json",
        "tokenizer.json",
        "train.bin",
        "train.idx",
        "validation.bin",
        "validation.idx",
    ];
    assert_eq!(names, all);

    let one = PrepareOptions { threads: 1, ..options.clone() };
    let out = temp.path().join("stopped");
    let mut stops = 0;
    let stopped = loop {
        match prepare(&out, &one, &Stopping(AtomicU32::new(0), 1)) {
            Ok(dataset) => break dataset,
            Err(DataError::Stopped) => stops += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(!Dataset::is_in(&out), "not before it is complete");
    };
    assert!(stops > 1, "{stops}");
    assert!(files(stopped.directory()) == expected);
    assert!(!out.join("unfinished").exists());
}

#[test]
fn documents_are_all_there_in_order_and_duplicates_are_not() {
    let temp = tempfile::tempdir().unwrap();
    let sources = temp.path().join("sources");
    fs::create_dir(&sources).unwrap();
    write_sources(&sources);
    let options = PrepareOptions::train_tokenizer(vec![sources.clone()], 400);
    let dataset = prepare(&temp.path().join("out"), &options, &NoProgress).unwrap();
    let info = dataset.info();
    assert_eq!(info.duplicates, 50);
    let documents = info.train.documents + info.validation.documents;
    assert_eq!(documents, 60 + 350 + 1);
    assert!(!info.split_within_documents);
    let tokenizer = dataset.tokenizer().unwrap();
    let encoder = Encoder::new(&tokenizer, "<eod>").unwrap();
    let mut found = 0;
    for file in [dataset.train().unwrap(), dataset.validation().unwrap()] {
        let texts = texts(&file, &tokenizer, encoder.eod());
        assert!(texts.is_sorted_by_key(|text| order(text)), "in the order of the sources");
        found += texts.len();
        for text in texts {
            let is_long = text.starts_with("long");
            // What was cut for reading was cut where tokens end anyway.
            let tokens = encoder.encode(&text).unwrap();
            assert_eq!(tokenizer.decode(&tokens, true).unwrap(), text);
            assert!(is_long || text.len() < 60_000);
        }
    }
    assert_eq!(found as u64, documents);

    let kept = PrepareOptions { drop_duplicates: false, ..options };
    let dataset = prepare(&temp.path().join("kept"), &kept, &NoProgress).unwrap();
    assert_eq!(dataset.info().train.documents + dataset.info().validation.documents, 461);
}

/// Files of words come first, then lines, then the long one.
fn order(text: &str) -> (u8, u32) {
    match text {
        text if text.starts_with("line ") => (1, text.split(' ').nth(1).unwrap().parse().unwrap()),
        text if text.starts_with("long") => (2, 0),
        _ => (0, 0),
    }
}

/// The texts of a file, checked to end with the end of a document.
fn texts(file: &TokenFile, tokenizer: &yuan_data::Tokenizer, eod: u32) -> Vec<String> {
    (0..file.num_documents())
        .map(|document| {
            let sequences = file.document(document).unwrap();
            assert_eq!(sequences.len(), 1);
            let range = file.sequence(sequences.start).unwrap();
            let tokens = file.read(range.start, (range.end - range.start) as usize).unwrap();
            let (last, text) = tokens.split_last().unwrap();
            assert_eq!(*last, eod);
            tokenizer.decode(text, true).unwrap()
        })
        .collect()
}

/// What Megatron wrote: several sequences a document, and no token that ends one.
#[test]
fn token_files_of_others_become_a_data_set() {
    let temp = tempfile::tempdir().unwrap();
    let sources = temp.path().join("sources");
    fs::create_dir(&sources).unwrap();
    write_sources(&sources);
    let options = PrepareOptions::train_tokenizer(vec![sources], 400);
    let prepared = prepare(&temp.path().join("text"), &options, &NoProgress).unwrap();
    let (tokenizer, eod) = (prepared.tokenizer().unwrap(), prepared.info().eod);
    let [mine, yours] = ["mine.v1", "yours"].map(|name| temp.path().join(name));
    let documents = texts(&prepared.train().unwrap(), &tokenizer, eod);
    for (name, ends) in [(&mine, false), (&yours, true)] {
        let mut writer = TokenWriter::create(name, TokenType::I32).unwrap();
        for text in &documents {
            let tokens = Encoder::new(&tokenizer, "<eod>").unwrap().encode(text).unwrap();
            let (first, second) = tokens.split_at(tokens.len() / 2);
            writer.push(first).unwrap();
            writer.end_sequence().unwrap();
            writer.push(second).unwrap();
            if ends {
                writer.push(&[eod]).unwrap();
            }
            writer.end_document().unwrap();
        }
        writer.finish().unwrap();
    }
    let import = |sources: &[&Path], out: &str| {
        let sources = sources.iter().map(|path| path.to_path_buf()).collect();
        let options = PrepareOptions::with_tokenizer(sources, temp.path().join("text"));
        prepare(&temp.path().join(out), &options, &NoProgress)
    };
    // By its name without an ending, as Megatron takes it, and the same documents once more.
    let dataset = import(&[&mine, &yours.with_extension("idx")], "both").unwrap();
    assert_eq!(dataset.info().duplicates, documents.len() as u64);
    let splits = [dataset.train().unwrap(), dataset.validation().unwrap()];
    let mut found: Vec<String> =
        splits.iter().flat_map(|file| texts(file, &tokenizer, eod)).collect();
    let mut expected = documents.clone();
    found.sort();
    expected.sort();
    assert!(found == expected);

    let error = import(&[&mine, &temp.path().join("sources")], "mixed").unwrap_err().to_string();
    assert!(error.starts_with("token files (.idx) and text cannot"), "{error}");
    let trained = PrepareOptions::train_tokenizer(vec![mine.clone()], 300);
    let error = prepare(&temp.path().join("none"), &trained, &NoProgress).unwrap_err().to_string();
    assert!(error.starts_with("token files need the tokenizer"), "{error}");
    let mut writer = TokenWriter::create(&temp.path().join("large"), TokenType::I32).unwrap();
    writer.push(&[70_000]).unwrap();
    writer.end_document().unwrap();
    writer.finish().unwrap();
    let error = import(&[&temp.path().join("large.bin")], "large-out").unwrap_err().to_string();
    assert!(error.contains("it holds the token 70000, but"), "{error}");
}

#[test]
fn one_document_is_split_within() {
    for name in ["input.txt", "a", "b", "c", "d"] {
        let temp = tempfile::tempdir().unwrap();
        let source = temp.path().join(name);
        let text: String = (0..4000).map(|i| format!("word{} ", i % 40)).collect();
        fs::write(&source, text).unwrap();
        let options = PrepareOptions::train_tokenizer(vec![source], 300);
        let dataset = prepare(&temp.path().join("out"), &options, &NoProgress).unwrap();
        let info = dataset.info();
        assert!(info.split_within_documents);
        let (train, validation) = (info.train.tokens as f64, info.validation.tokens as f64);
        assert!((validation / (train + validation) - 0.05).abs() < 0.01, "{train} {validation}");
        let last = dataset.validation().unwrap().read(info.validation.tokens - 1, 1).unwrap();
        assert_eq!(last, [info.eod]);
    }
}

#[test]
fn what_cannot_go_on_is_refused_in_a_sentence() {
    let temp = tempfile::tempdir().unwrap();
    let sources = temp.path().join("sources");
    fs::create_dir(&sources).unwrap();
    let out = temp.path().join("out");
    let options = PrepareOptions::train_tokenizer(vec![sources.clone()], 300);
    let options = PrepareOptions { threads: 1, ..options };
    let failed = |options: &PrepareOptions, out: &Path| {
        prepare(out, options, &NoProgress).unwrap_err().to_string()
    };
    let shown = sources.display();
    assert_eq!(failed(&options, &out), format!("{shown} holds no text: there is no file"));
    assert!(!out.exists());
    write_sources(&sources);
    let stopped = prepare(&out, &options, &Stopping(AtomicU32::new(0), 1));
    assert!(matches!(stopped, Err(DataError::Stopped)));
    // Other settings, other sources.
    let other = PrepareOptions::train_tokenizer(vec![sources.clone()], 301);
    let error = failed(&other, &out);
    let reason = "was begun with other sources or settings (the tokenizer differs): give the same, \
                  or remove it";
    assert!(error.ends_with(reason), "{error}");
    fs::write(sources.join("00.txt"), "other words, other words").unwrap();
    let error = failed(&options, &out);
    assert!(error.contains("(a file of the sources differs)"), "{error}");
    // A directory of something else, and one that is complete.
    let foreign = temp.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("notes"), "mine").unwrap();
    assert!(failed(&options, &foreign).contains("is not empty (it holds notes)"));
    let done = temp.path().join("done");
    prepare(&done, &options, &NoProgress).unwrap();
    assert!(failed(&options, &done).contains("holds a complete data set already"));
    // Damage is named when it is opened.
    let mut bytes = fs::read(done.join("train.bin")).unwrap();
    bytes[7] ^= 1;
    fs::write(done.join("train.bin"), &bytes).unwrap();
    let error = Dataset::open(&done).unwrap_err().to_string();
    assert!(
        error.ends_with("train.bin: it is damaged: its checksum is not the one it had"),
        "{error}"
    );
    fs::write(done.join("train.bin"), &bytes[1..]).unwrap();
    let error = Dataset::open(&done).unwrap_err().to_string();
    assert!(error.contains("train.bin: it has "), "{error}");
}
