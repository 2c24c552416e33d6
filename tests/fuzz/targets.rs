//! What is read, and what must hold whatever is read: shared with `fuzz/`.

use std::{fs, path::Path};

use tempfile::TempDir;
use yuan::{
    data::{Place, Sources, TokenFile, TokenType, TokenWriter},
    laep::{
        ExpertLayout, LayerLoad, LayerPlan, LoadFile, LoadStatistics, PruneLimits, PrunePlan,
        WhatIf,
    },
    model::{
        YuanConfig,
        hf::{HfCheckpoint, Shards},
        storage::TensorFile,
        text::Tokenizer,
    },
    report::Report,
    train::{
        Checkpoint, Event, MetricsFile, RolloutMetrics, StepMetrics, TrainConfig, check_settings,
    },
};

/// Does something within so many bytes of memory.
pub type Within<'a> = &'a dyn Fn(usize, &mut dyn FnMut());

/// Memory that a reader may use: a fixed part, and so many times the files' size for names and JSON
/// values.
fn allowance(file_bytes: usize) -> usize {
    (1 << 20) + 150 * file_bytes
}

/// What an action that may use so much memory returns.
fn measured<T>(within: Within<'_>, allowed: usize, action: impl Fn() -> T) -> T {
    let mut result = None;
    within(allowed, &mut || result = Some(action()));
    result.expect("it was done")
}

/// Inputs to start from, beside those in files.
pub fn seeds(kind: &str) -> Vec<Vec<u8>> {
    let seed: Vec<u8> = match kind {
        "plan" => example_plan().to_json().into(),
        "loads" => br#"{"steps": 20, "layers": [[1, 40, 30, 29], [0, 0, 7, 18446744073709551615]],
            "model": {"parameters": 1000, "parameters_per_expert": 10, "top_k": 2}}"#
            .into(),
        "history" => example_history(),
        "settings" => serde_json::to_vec(&TrainConfig::default()).unwrap(),
        "state" => br#"{"layout": 1, "step": 120, "consumed_rows": 960, "optimizer_updates": 120,
            "callbacks": {"metrics_file": 63, "prune_experts": {"rounds": 1}},
            "settings": {"steps": "240"}}"#
            .into(),
        "index" => br#"{"ranks": 2, "parameters": {"a": {"shape": [2, 3], "moments": true, "pieces":
            [{"rank": 1, "start": 0, "end": 4}, {"rank": 0, "start": 4, "end": 6}]}}}"#
            .into(),
        "checksums" => br#"{"files": {"config.json": {"bytes": 2, "crc32": 2745614147},
            "model.safetensors": {"bytes": 18446744073709551615, "crc32": 0}}}"#
            .into(),
        "tokenizer" => br#"{"version": "1.0", "added_tokens": [{"id": 4, "content": "<eod>",
            "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false}], "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true}, "decoder": {"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": true}, "model": {"type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2, "aba": 3}, "merges": [["a", "b"], ["ab", "a"]]}}"#
            .into(),
        "indexed" => {
            let temp = TempDir::new().unwrap();
            let name = temp.path().join("tokens");
            let mut writer = TokenWriter::create(&name, TokenType::U16).unwrap();
            writer.push(&[1, 2, 3]).unwrap();
            writer.end_document().unwrap();
            writer.push(&[4]).unwrap();
            writer.end_sequence().unwrap();
            writer.push(&[5]).unwrap();
            writer.end_document().unwrap();
            writer.finish().unwrap();
            assert_eq!(fs::read(name.with_extension("bin")).unwrap(), TOKENS);
            fs::read(name.with_extension("idx")).unwrap()
        }
        "pages" => example_pages(),
        "template" => b"{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}\
            {%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}\
            {% else %}<{{ m['role'][0] }}>{{ m.content.split('-') | join('+') | tojson(indent=2) }}\
            {% endif %}{% endfor %}{% macro f(x, n=3) %}{{ x * n }}{% endmacro %}{{ f('a', n=4) }}\
            {{ range(9)[::-2] | list }}{{ -1 ** 2 }}{{ 'b' ~ 1.5 if tools is not none else none }}"
            .into(),
        _ => return Vec::new(),
    };
    vec![seed]
}

fn example_plan() -> PrunePlan {
    let loads = [LayerLoad::new(vec![1, 40, 30, 29]), LayerLoad::new(vec![5, 6, 7, 900])];
    let limits = PruneLimits { beta: 0.3.into(), multiple_of: 2, ..PruneLimits::default() };
    PrunePlan::new(&loads, &limits, ExpertLayout { top_k: 2, groups: 2 }).unwrap()
}

/// An archive with a sample of two images, whose bytes are none.
fn example_pages() -> Vec<u8> {
    let mut archive = Vec::new();
    let json = br#"{"prompt": "What is it?", "response": "Nothing.", "images": ["a.png"]}"#;
    for (name, bytes) in [("a/1.0.png", &b"no"[..]), ("a/1.1.jpg", b""), ("a/1.json", json)] {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", bytes.len()).as_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        archive.extend(header);
        archive.extend(bytes);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// A history with an event of every kind.
fn example_history() -> Vec<u8> {
    let plan = example_plan();
    let metrics = |step| StepMetrics {
        step,
        loss: 3.5,
        balance_loss: None,
        learning_rate: 1e-3,
        gradient_norm: 0.7,
        tokens: 512,
        seconds: 0.2,
        max_over_mean: vec![1.5, 2.0],
        device_max_over_mean: Vec::new(),
        measures: std::iter::once(("entropy".to_owned(), 0.5)).collect(),
        loads: Vec::new(),
        image_loads: Vec::new(),
    };
    let loads: Vec<LayerLoad> = plan.layers.iter().map(|layer| layer.load.clone()).collect();
    let statistics = loads.iter().map(LoadStatistics::of).collect();
    let events = [
        Event::Start { step: 0, steps: 4, parameters: 1000, experts_per_layer: vec![4, 4] },
        Event::Step(metrics(1)),
        Event::Rollout(RolloutMetrics {
            step: 1,
            held_out: true,
            prompts: 2,
            answers: 4,
            learnt: 1,
            right: 0.25,
            reward: -0.5,
            parts: std::iter::once(("accuracy".to_owned(), -0.5)).collect(),
            tokens: 3.5,
            cut_off: 0.0,
            seconds: 0.1,
            layers: loads.clone(),
        }),
        Event::Load { step: 1, window_steps: 1, layers: loads, statistics, stability: None },
        Event::Phase { step: 1, stable: true, layers: vec![true, true] },
        Event::Validation {
            step: 1,
            loss: 3.25,
            sets: [("web".into(), 3.0), ("code".into(), 4.0)].into(),
        },
        Event::Prune {
            step: 1,
            round: 1,
            experts_before: vec![4, 4],
            experts_after: plan.experts_per_layer(),
            parameters_before: 1000,
            parameters_after: 800,
            pruned_load: plan.pruned_load_fraction(),
            bytes_moved: 0,
            layers: plan.layers.iter().map(LayerPlan::summary).collect(),
            predicted_gain: Some(1.2),
            plan,
        },
        Event::Step(metrics(2)),
        Event::Rearrange {
            step: 2,
            groups_before: vec![1.5, 1.5],
            groups_after: vec![1.0, 1.1],
            order: vec![vec![1, 0], vec![0, 1]],
            bytes_moved: 7,
        },
        Event::Guard { step: 2, loss: Some(3.3), allowed_loss: 3.4, satisfied: true },
        Event::RollBack { step: 2, to_step: 1 },
        Event::HistoryLost { step: 2, lines: 3, kept_in: None },
        Event::Checkpoint { step: 2 },
    ];
    let lines = events.iter().map(|event| serde_json::to_string(event).unwrap() + "\n");
    lines.collect::<String>().into_bytes()
}

/// `config.json`: what is accepted can be used, and written and read again.
pub fn config(input: &[u8], within: Within<'_>) {
    let text = String::from_utf8_lossy(input);
    let read = || YuanConfig::from_json(&text);
    let Ok(config) = measured(within, allowance(text.len()), read) else { return };
    config.validate().unwrap();
    assert!(config.head_dim() > 0 && config.rotary_width() > 0);
    assert!(config.parameter_count().total() > 0);
    assert_eq!(YuanConfig::from_json(&config.to_json()).unwrap(), config);
}

/// A file of tensors: the format's own reader does not find fault with what is accepted.
pub fn safetensors(input: &[u8], within: Within<'_>) {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("input.safetensors");
    fs::write(&path, input).unwrap();
    let allowed = allowance(input.len());
    let Ok(file) = measured(within, allowed, || TensorFile::open(&path)) else { return };
    let theirs = safetensors::SafeTensors::deserialize(input).unwrap();
    assert_eq!(theirs.len(), file.tensors().len());
    for (name, tensor) in file.tensors() {
        let bytes = measured(within, allowed, || file.map(name)).unwrap();
        let expected = theirs.tensor(name).unwrap();
        assert_eq!((tensor.dtype, tensor.shape.as_slice()), (expected.dtype(), expected.shape()));
        assert_eq!(bytes.as_ref(), expected.data(), "every byte of the file, and none beyond");
    }
}

pub fn directory_config(input: &[u8], within: Within<'_>) {
    directory("config.json", input, within);
}

pub fn directory_index(input: &[u8], within: Within<'_>) {
    directory("model.safetensors.index.json", input, within);
}

pub fn directory_weights(input: &[u8], within: Within<'_>) {
    directory("model-00002-of-00002.safetensors", input, within);
}

/// A directory of published weights with one file replaced: what is accepted can be read.
fn directory(file: &str, input: &[u8], within: Within<'_>) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("yuan-model/tests/fixtures/ultra_tiny/sharded")
        .canonicalize()
        .or_else(|_| Path::new("yuan-model/tests/fixtures/ultra_tiny/sharded").canonicalize())
        .unwrap();
    let temp = TempDir::new().unwrap();
    let mut size = input.len();
    for entry in fs::read_dir(&fixtures).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        size += bytes.len();
        fs::write(temp.path().join(path.file_name().unwrap()), bytes).unwrap();
    }
    fs::write(temp.path().join(file), input).unwrap();
    drop(measured(within, allowance(size), || Shards::open_headers(temp.path())));
    let open = || HfCheckpoint::open(temp.path());
    let Ok(checkpoint) = measured(within, allowance(size), open) else { return };
    for source in checkpoint.config().parameter_sources() {
        let data = checkpoint.read(&source, None).unwrap();
        assert_eq!(data.shape()[..], source.parameter_shape());
    }
}

/// `plan.json`: what is accepted can be shown, and written and read again.
pub fn plan(input: &[u8], within: Within<'_>) {
    let text = String::from_utf8_lossy(input);
    let read = || PrunePlan::from_json(&text);
    let Ok(plan) = measured(within, allowance(text.len()), read) else { return };
    plan.check().unwrap();
    assert!(plan.pruned_load_fraction().is_finite());
    let table = format!("{plan}\n{}", WhatIf::table(&[WhatIf::of(&plan, None)]));
    assert!(!table.is_empty());
    assert_eq!(PrunePlan::from_json(&plan.to_json()).unwrap(), plan);
}

/// `loads.json`: what is accepted can be planned on, or is refused then.
pub fn loads(input: &[u8], within: Within<'_>) {
    let text = String::from_utf8_lossy(input);
    let read = || LoadFile::from_json(&text);
    let Ok(file) = measured(within, allowance(text.len()), read) else { return };
    for groups in [1, 2] {
        let limits = PruneLimits { multiple_of: groups, ..PruneLimits::default() };
        let layout = ExpertLayout { top_k: 1, groups };
        if let Ok(plan) = PrunePlan::new(&file.window.layers, &limits, layout) {
            plan.check().unwrap();
            assert!(!WhatIf::table(&[WhatIf::of(&plan, file.model)]).is_empty());
        }
    }
}

/// `metrics.jsonl`: it is drawn or refused.
pub fn history(input: &[u8], within: Within<'_>) {
    let temp = TempDir::new().unwrap();
    fs::write(temp.path().join(MetricsFile::NAME), input).unwrap();
    // Pictures are larger than what they show.
    let allowed = (16 << 20) + 1000 * input.len();
    drop(measured(within, allowed, || Report::of(temp.path())));
}

/// `run.json`: what is accepted has a schedule.
pub fn settings(input: &[u8], within: Within<'_>) {
    let model = YuanConfig { experts_per_layer: vec![16; 2], ..YuanConfig::tiny(300) };
    let read = || serde_json::from_slice::<TrainConfig>(input);
    let Ok(config) = measured(within, allowance(input.len()), read) else { return };
    if check_settings(&config, &model).is_ok() {
        assert!(config.learning_rate_at(0).is_finite());
        assert!(config.learning_rate_at(u64::MAX).is_finite());
    }
}

/// `state.json` of a checkpoint.
pub fn state(input: &[u8], within: Within<'_>) {
    let temp = TempDir::new().unwrap();
    let directory = temp.path().join("checkpoint-00000120");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("state.json"), input).unwrap();
    let checkpoint = Checkpoint { path: directory, step: 120 };
    if let Ok(state) = measured(within, allowance(input.len()), || checkpoint.state()) {
        assert_eq!(state.step, 120);
    }
    assert!(checkpoint.verify().is_err() || checkpoint.state().is_ok());
}

/// `index.json` of a checkpoint that several ranks wrote: what is read or refused is said briefly.
pub fn index(input: &[u8], within: Within<'_>) {
    refused_checkpoint("index.json", input, within);
}

/// An archive of questions about images, and the same bytes as lines of them.
#[cfg(feature = "images")]
pub fn pages(input: &[u8], within: Within<'_>) {
    let temp = TempDir::new().unwrap();
    for name in ["pages.tar", "pages.jsonl"] {
        let path = temp.path().join(name);
        fs::write(&path, input).unwrap();
        let files = yuan::train::data::PageFiles::new(vec![path], 0.5);
        let texts = measured(within, allowance(input.len()), || files.texts());
        let text: usize = texts.map_or(0, |texts| texts.iter().map(String::len).sum());
        assert!(text <= 4 * input.len());
    }
}

/// An image file: whatever picture it is has tiles.
#[cfg(feature = "images")]
pub fn picture(input: &[u8], within: Within<'_>) {
    // The largest picture that is allowed, and what its decoder needs beside it.
    const MOST: usize = 3 << 30;
    let picture = measured(within, MOST, || yuan::model::vision::Picture::decode(input));
    match picture {
        Ok(picture) if picture.width() * picture.height() < 1 << 20 => {
            let tiles = picture.tiles(28, 9);
            assert!(tiles.iter().all(|tile| [tile.width(), tile.height()] == [28; 2]));
        }
        Ok(_) => {}
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
}

/// `checksums.json` of a checkpoint: no file of another directory is read.
pub fn checksums(input: &[u8], within: Within<'_>) {
    refused_checkpoint("checksums.json", input, within);
}

/// A checkpoint without tensors, whose file of this name is the input, is refused with a sentence.
fn refused_checkpoint(name: &str, input: &[u8], within: Within<'_>) {
    let temp = TempDir::new().unwrap();
    let state = &seeds("state")[0];
    for (name, contents) in
        [("state.json", &state[..]), ("config.json", b"{}"), ("checksums.json", b"{\"files\": {}}")]
    {
        fs::write(temp.path().join(name), contents).unwrap();
    }
    fs::write(temp.path().join(name), input).unwrap();
    let checkpoint = Checkpoint { path: temp.path().to_owned(), step: 120 };
    // Files are read in pieces of a megabyte.
    let allowed = allowance(input.len()) + (2 << 20);
    let refused = measured(within, allowed, || checkpoint.verify()).unwrap_err().to_string();
    assert!(refused.len() < 10_000 + 200 * input.len(), "{} bytes: {refused}", refused.len());
}

/// An index of tokens: every sequence of what is accepted can be read or is refused.
pub fn indexed(input: &[u8], within: Within<'_>) {
    let temp = TempDir::new().unwrap();
    let name = temp.path().join("tokens");
    fs::write(name.with_extension("bin"), TOKENS).unwrap();
    fs::write(name.with_extension("idx"), input).unwrap();
    let open = || TokenFile::open(&name);
    let Ok(file) = measured(within, allowance(input.len()), open) else { return };
    for document in 0..file.num_documents() {
        let Ok(sequences) = file.document(document) else { continue };
        for sequence in sequences {
            let Ok(range) = file.sequence(sequence) else { continue };
            drop(file.read(range.start, (range.end - range.start) as usize));
        }
    }
    drop(file.read(0, file.num_tokens() as usize));
}

/// The tokens that such an index is beside.
const TOKENS: [u8; 10] = [1, 0, 2, 0, 3, 0, 4, 0, 5, 0];

/// A table of texts: its rows are read, or it is left out.
pub fn table(input: &[u8], within: Within<'_>) {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("table.parquet");
    fs::write(&path, input).unwrap();
    let read = || {
        let sources = Sources::find(std::slice::from_ref(&path), "text").unwrap();
        sources.read_from(Place::default()).count()
    };
    // A page may say that it is large when it is decompressed.
    measured(within, (512 << 20) + allowance(input.len()), read);
}

/// `tokenizer.json`: what is accepted tokenizes or refuses, and decodes.
pub fn tokenizer(input: &[u8], within: Within<'_>) {
    let temp = TempDir::new().unwrap();
    fs::write(temp.path().join("tokenizer.json"), input).unwrap();
    // The library compiles regular expressions, of a fixed size at most.
    let allowed = (64 << 20) + allowance(input.len());
    let Ok(tokenizer) = measured(within, allowed, || Tokenizer::load(temp.path())) else { return };
    if let Ok(tokens) = tokenizer.encode("abab aba<eod>", true) {
        drop(tokenizer.decode_after(&tokens[..tokens.len() / 2], &tokens));
    }
}

/// A chat template: it renders within its limits or is refused.
#[cfg(feature = "chat")]
pub fn template(input: &[u8], within: Within<'_>) {
    use yuan::model::text::{ChatTemplate, Message};

    let messages = [Message::new("user", "a-b"), Message::new("assistant", " Yes. ")];
    let template = ChatTemplate::new(String::from_utf8_lossy(input));
    let variables = serde_json::json!({"eos_token": "<eod>"});
    let render = || template.render(&messages, &variables, true);
    drop(measured(within, 128 << 20, render));
}
