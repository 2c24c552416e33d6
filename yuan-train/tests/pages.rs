//! Training on questions about images: rows by upstream's rule, and runs that see.
#![cfg(feature = "images")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Device;
use serde_json::{Value, json};
use tempfile::TempDir;
use yuan_model::{
    YuanConfig, YuanModel, named,
    ranks::{Ranks, on_threads},
    text::Tokenizer,
    vision::{ImageConfig, Picture},
};
use yuan_train::{
    Checkpoint, Freeze, LaepConfig, NewRun, Run, TrainConfig, Trainer, Trigger,
    data::{PageCounts, PageFiles, PageRows, RowSource, RowStream},
};

/// Burn has one random state per process and device: tests that draw from it take turns.
static RANDOM_STATE: Mutex<()> = Mutex::new(());

fn take_turns() -> MutexGuard<'static, ()> {
    RANDOM_STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A page that no other number has, of this size.
fn page(number: usize, width: u32, height: u32) -> image::RgbImage {
    image::RgbImage::from_fn(width, height, |x, y| {
        let value = |factor: usize| {
            ((number * 83 + x as usize * factor + y as usize * (7 + number % 5)) % 256) as u8
        };
        image::Rgb([value(3), value(11), value(29)])
    })
}

const SIZES: [[u32; 2]; 4] = [[28, 28], [60, 28], [40, 90], [20, 17]];

/// Question and answer about the pages of a document.
fn texts(number: usize) -> (String, String) {
    let words = ["one", "two", "three", "four", "five"];
    let word = |at: usize| words[at % words.len()];
    (format!("Which number has page {}?", word(number)), format!("It is {}.", word(number * 3)))
}

/// Pages of a document: one, or two for every third.
fn pages_of(number: usize) -> Vec<(String, [u32; 2])> {
    let count = if number.is_multiple_of(3) { 2 } else { 1 };
    let size = |at: usize| SIZES[(number + at) % SIZES.len()];
    (0..count).map(|at| (format!("pages/{number}-{at}.png"), size(at))).collect()
}

/// Documents as lines, and the same ones as an archive.
fn write(directory: &Path, count: usize) -> [PathBuf; 2] {
    fs::create_dir_all(directory.join("pages")).unwrap();
    let [lines, archive] = ["pages.jsonl", "pages.tar"].map(|name| directory.join(name));
    let mut tar = tar::Builder::new(fs::File::create(&archive).unwrap());
    let mut text = String::new();
    for number in 0..count {
        let (prompt, response) = texts(number);
        let mut paths = Vec::new();
        for (at, (path, [width, height])) in pages_of(number).into_iter().enumerate() {
            let file = directory.join(&path);
            page(number + at, width, height).save(&file).unwrap();
            tar.append_path_with_name(&file, format!("set/{number:04}.{at}.png")).unwrap();
            paths.push(path);
        }
        let mut line = json!({"prompt": prompt, "response": response, "images": paths});
        if number % 4 == 1 {
            // The same in other words.
            let user = json!({"role": "user", "content": prompt});
            let messages = [user, json!({"role": "assistant", "content": response})];
            line = json!({"messages": messages, "images": paths});
        }
        text += &format!("{line}\n");
        let bytes = line.to_string().into_bytes();
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, format!("set/{number:04}.json"), &bytes[..]).unwrap();
    }
    fs::write(&lines, text).unwrap();
    tar.finish().unwrap();
    [lines, archive]
}

fn model() -> YuanConfig {
    YuanConfig { images: Some(ImageConfig::tiny(3)), ..YuanConfig::tiny(300) }
}

fn config() -> TrainConfig {
    TrainConfig {
        steps: 6,
        batch_size: 2,
        seq_len: 96,
        learning_rate: 3e-3,
        warmup_steps: 0,
        validation_batches: 1,
        validate_every: Some(3),
        checkpoint_every: Some(2),
        keep_checkpoints: 9,
        laep: LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() },
        ..TrainConfig::default()
    }
}

fn files(path: &Path) -> PageFiles {
    PageFiles::new(vec![path.to_path_buf()], 0.2)
}

fn create(directory: &Path, data: &Path, config: TrainConfig) -> Run {
    Run::create(directory, NewRun::new(config, model(), files(data))).unwrap()
}

fn train(run: &Run) -> Trainer<YuanModel> {
    let mut trainer = run.trainer(&Device::flex().autodiff()).unwrap();
    trainer.run().unwrap();
    trainer
}

fn parameters(model: &YuanModel) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let read = |path: &str, data: burn::tensor::TensorData| {
        found.insert(path.to_owned(), data.as_bytes().to_vec());
        Ok::<_, ()>(())
    };
    named::read_parameters(model, read).unwrap();
    found
}

#[test]
fn rows_are_upstreams_and_lines_and_archives_hold_the_same() {
    let temp = TempDir::new().unwrap();
    let data = write(temp.path(), 40);
    let rows = ["lines", "archive"].map(|name| temp.path().join(name));
    let rows: Vec<PageRows> = rows
        .iter()
        .zip(&data)
        .map(|(directory, data)| {
            let run = create(directory, data, config());
            let counts = PageCounts::load(run.directory()).unwrap();
            assert_eq!(counts.documents.iter().sum::<u64>(), 40);
            assert_eq!(counts.images.iter().sum::<u64>(), 54);
            assert!(PageFiles::is_one(data));
            PageRows::open(directory, "train", 300, 96, None).unwrap()
        })
        .collect();
    let config: Value =
        serde_json::from_slice(&fs::read(temp.path().join("lines/config.json")).unwrap()).unwrap();
    let [bos, eod, sep] = ["bos_token_id", "eod_token", "sep_token"]
        .map(|key| config["llm_config"][key].as_u64().unwrap() as u32);
    let pad = config["img_context_token_id"].as_u64().unwrap() as u32;
    let mut documents = 0;
    for place in 0..rows[0].num_rows() {
        let row = rows[0].row(place).unwrap();
        assert_eq!([row.input_ids.len(), row.labels.len(), row.position_ids.len()], [96; 3]);
        assert_eq!(row.labels[..95], row.input_ids[1..]);
        assert_eq!(row.labels[95], pad);
        // Four rows a tile, each with a place.
        assert_eq!(row.image_places.len(), 4 * row.tiles.len());
        assert!(row.image_places.iter().all(|&place| row.input_ids[place] == pad));
        assert!(row.tiles.iter().all(|tile| [tile.width(), tile.height()] == [28, 28]));
        let learnt = row.learnt.as_ref().unwrap();
        for document in row.input_ids[..row.padding_from].split_inclusive(|&id| id == eod) {
            let start = document.as_ptr() as usize - row.input_ids.as_ptr() as usize;
            let start = start / size_of::<u32>();
            assert_eq!((document[0], document.last()), (bos, Some(&eod)));
            let separator = document.iter().position(|&id| id == sep).unwrap();
            let last_image = document.iter().rposition(|&id| id == pad).unwrap() + 1;
            for at in 0..document.len() {
                // An answer is learnt from its separator on, up to the token that predicts its end.
                assert_eq!(learnt[start + at], at >= separator && at + 1 < document.len());
                let position = at.saturating_sub(last_image) as u32;
                assert_eq!(row.position_ids[start + at], position, "token {at}");
            }
            documents += 1;
        }
        assert!(!learnt[row.padding_from..].contains(&true));
    }
    assert!(documents > 20);
    // The archive holds the same documents, text for text and tile for tile, whatever rows they are in
    // and whatever tokens their texts are.
    let documents_of = |rows: &PageRows, name: &str| -> Vec<(String, Vec<Picture>)> {
        let tokenizer = Tokenizer::load(&temp.path().join(name)).unwrap();
        let mut found = Vec::new();
        for place in 0..rows.num_rows() {
            let row = rows.row(place).unwrap();
            let mut tiles = row.tiles.iter();
            for document in row.input_ids[..row.padding_from].split_inclusive(|&id| id == eod) {
                let count = document.iter().filter(|&&id| id == pad).count() / 4;
                let text = tokenizer.decode(document).unwrap();
                found.push((text, tiles.by_ref().take(count).cloned().collect()));
            }
            assert!(tiles.next().is_none());
        }
        found
    };
    let in_lines = documents_of(&rows[0], "lines");
    let in_archive = documents_of(&rows[1], "archive");
    // Which of them validate follows their names, which differ.
    let common = in_lines.iter().filter(|document| in_archive.contains(document)).count();
    assert!(common > 15, "{common} documents");
    // One document, token by token.
    let first = &rows[0].row(0).unwrap();
    let tiles = |number: usize| -> Vec<Picture> {
        let pages = pages_of(number).into_iter().enumerate();
        let picture = |(at, (_, [w, h])): (usize, (String, [u32; 2]))| {
            let values = page(number + at, w, h).into_raw();
            Picture::new(w as usize, h as usize, values).unwrap()
        };
        let pictures: Vec<Picture> = pages.map(picture).collect();
        let most = if pictures.len() > 1 { 4 } else { 9 };
        pictures.iter().flat_map(|picture| picture.tiles(28, most)).collect()
    };
    let is_of = |number: usize| first.tiles.starts_with(&tiles(number));
    assert!((0..40).any(is_of), "the first document's tiles are those of its pages");
}

#[test]
fn a_run_on_images_resumes_to_the_last_bit_and_prunes() {
    let _turn = take_turns();
    let temp = TempDir::new().unwrap();
    let [lines, _] = write(temp.path(), 40);
    let laep =
        LaepConfig { trigger: Trigger::Steps(vec![3]), window_steps: 1, ..LaepConfig::default() };
    let config = TrainConfig { laep, ..config() };
    let whole = create(&temp.path().join("whole"), &lines, config.clone());
    let trainer = train(&whole);
    assert!(trainer.model().config().experts_per_layer.iter().sum::<usize>() < 16);
    let expected = parameters(trainer.model());
    assert!(expected.keys().any(|path| path.starts_with("images.tower.")));

    // Go on from the middle: before the prune, with the same rows.
    let half = create(&temp.path().join("half"), &lines, config.clone());
    train(&half);
    for step in [4, 6] {
        fs::remove_dir_all(half.directory().join(format!("checkpoint-{step:08}"))).unwrap();
    }
    let resumed = train(&Run::open(half.directory()).unwrap());
    assert!(parameters(resumed.model()) == expected);

    // The run is a model that anything reads, and its copy in upstream's layout is another one.
    let directory = yuan_train::ModelDirectory::open(whole.directory()).unwrap();
    let model = directory.load(&Device::flex(), None).unwrap();
    assert!(parameters(&model) == expected);
    let exported = temp.path().join("exported");
    let options = yuan_model::hf::SaveOptions::default();
    Checkpoint::latest(whole.directory()).unwrap().unwrap().save_hf(&exported, &options).unwrap();
    let exported = yuan_train::ModelDirectory::open(&exported).unwrap();
    assert!(parameters(&exported.load(&Device::flex(), None).unwrap()) == expected);
    let inventory = yuan_train::Inventory::of(whole.directory()).unwrap();
    assert!(inventory.problems.is_empty(), "{:?}", inventory.problems);
}

#[test]
fn computing_the_tower_again_changes_nothing_and_frozen_parts_stay() {
    let _turn = take_turns();
    let temp = TempDir::new().unwrap();
    let [lines, _] = write(temp.path(), 40);
    let after = |name: &str, config: TrainConfig| {
        let run = create(&temp.path().join(name), &lines, config);
        parameters(train(&run).model())
    };
    let plain = after("plain", config());
    assert!(after("again", TrainConfig { recompute: true, ..config() }) == plain);
    let device = Device::flex().autodiff();
    let start = create(&temp.path().join("start"), &lines, config());
    let start = parameters(start.trainer(&device).unwrap().model());
    for (freeze, recompute) in [("vision,language", false), ("language", true), ("vision", false)] {
        let freeze: Freeze = freeze.parse().unwrap();
        let end = after(&freeze.to_string(), TrainConfig { freeze, recompute, ..config() });
        for (path, values) in &end {
            let stays = freeze.includes(path);
            assert_eq!(*values == start[path], stays, "{freeze}: {path}");
        }
    }
}

/// Ranks hold copies of tower and projector, and add their gradients up.
#[test]
fn a_run_on_images_over_ranks_is_the_run_on_one_device() {
    let _turn = take_turns();
    let temp = TempDir::new().unwrap();
    let [lines, _] = write(temp.path(), 40);
    let config = TrainConfig { steps: 3, ..config() };
    let one = create(&temp.path().join("one"), &lines, config.clone());
    train(&one);
    let streams = || -> [RowStream; 2] {
        [("train", Some(config.seed)), ("validation", None)].map(|(split, seed)| {
            RowStream::of(std::sync::Arc::new(
                PageRows::open(one.directory(), split, 300, 96, seed).unwrap(),
            ))
        })
    };
    let model = YuanConfig::load(&one.directory().join("config.json")).unwrap();
    let fresh = yuan_train::fresh_model(&model, config.seed, &Device::flex()).unwrap();
    for shape in [[1, 2], [2, 1]] {
        let run_dir = temp.path().join(format!("{}x{}", shape[0], shape[1]));
        let losses = on_threads(2, |world| {
            let ranks = Ranks::new(world, shape[0])?;
            let device = Device::flex().autodiff();
            let part = YuanModel::part_of(&fresh, &ranks, &device)?;
            let mut trainer = Trainer::new(config.clone(), &run_dir, &device, part, streams())?;
            trainer.run()?;
            trainer.validate()
        });
        let on_one = Run::open(one.directory()).unwrap();
        let on_one = on_one.trainer(&Device::flex().autodiff()).unwrap().validate().unwrap();
        for loss in losses {
            let apart = (loss.unwrap() - on_one).abs();
            assert!(apart <= 1e-5, "{shape:?}: {apart:e}");
        }
    }
}

#[test]
fn what_is_no_document_is_counted_and_a_lost_image_is_named() {
    let _turn = take_turns();
    let temp = TempDir::new().unwrap();
    let [lines, _] = write(temp.path(), 40);
    let mut text = fs::read_to_string(&lines).unwrap();
    fs::write(temp.path().join("pages/text.png"), "no picture").unwrap();
    for line in [
        json!({"prompt": "a", "response": "b"}),
        json!({"prompt": "a", "response": "b", "images": []}),
        json!({"prompt": "a", "response": "b", "image": "pages/absent.png"}),
        json!({"prompt": "a", "response": "b", "image": "pages/text.png"}),
        json!({"prompt": "a", "response": "", "image": "pages/1-0.png"}),
        json!({"messages": [{"role": "user", "content": "a"}], "image": "pages/1-0.png"}),
    ] {
        text += &format!("{line}\n");
    }
    fs::write(&lines, text).unwrap();
    let run = create(&temp.path().join("run"), &lines, config());
    let counts = PageCounts::load(run.directory()).unwrap();
    assert_eq!(counts.documents.iter().sum::<u64>(), 40);
    let summary = counts.skipped.summary().unwrap();
    assert!(summary.starts_with("left out 6 records: pages.jsonl (lines without"), "{summary}");

    // An image that goes away, or becomes another one, ends the run with its name.
    for damage in [true, false] {
        let directory = temp.path().join(format!("run-{damage}"));
        let run = create(&directory, &lines, config());
        for number in 0..40 {
            let file = temp.path().join(format!("pages/{number}-0.png"));
            match damage {
                true => page(number, 31, 31).save(&file).unwrap(),
                false => fs::remove_file(&file).unwrap(),
            }
        }
        let mut trainer = run.trainer(&Device::flex().autodiff()).unwrap();
        let error = trainer.run().unwrap_err().to_string();
        let expected = if damage { "it has 31 x 31 pixels, but had" } else { "cannot read it" };
        assert!(error.contains("-0.png: ") && error.contains(expected), "{error}");
        drop(trainer);
        write(temp.path(), 40);
    }
    let none = NewRun::new(config(), YuanConfig::tiny(300), files(&lines));
    let error = Run::create(&temp.path().join("blind"), none).unwrap_err().to_string();
    assert_eq!(error, "the model sees no images: it has no image tower");
    let apart = NewRun::new(config(), model(), files(&lines)).with_isolated_documents();
    let error = Run::create(&temp.path().join("apart"), apart).unwrap_err().to_string();
    assert!(error.contains("leave --isolate out"), "{error}");
    let long = TrainConfig { seq_len: 8, ..config() };
    let long = NewRun::new(long, model(), files(&lines));
    let error = Run::create(&temp.path().join("long"), long).unwrap_err().to_string();
    assert!(error.contains("no question with its images fits into a row of 8 tokens"), "{error}");
}
