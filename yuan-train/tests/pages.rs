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
    // Which of them validate follows the images themselves.
    assert_eq!(in_lines.len(), in_archive.len());
    assert!(in_lines.iter().all(|document| in_archive.contains(document)));
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
fn what_is_no_document_is_counted_with_its_place_and_its_reason() {
    let temp = TempDir::new().unwrap();
    let [lines, _] = write(temp.path(), 40);
    let mut text = fs::read_to_string(&lines).unwrap();
    fs::write(temp.path().join("pages/text.png"), "no picture").unwrap();
    // Its header is whole, and what follows is not.
    let whole = fs::read(temp.path().join("pages/2-0.png")).unwrap();
    fs::write(temp.path().join("pages/cut.png"), &whole[..whole.len() - 30]).unwrap();
    for line in [
        json!({"prompt": "a", "response": "b"}),
        json!({"prompt": "a", "response": "b", "images": []}),
        json!({"prompt": "a", "response": "b", "image": "pages/absent.png"}),
        json!({"prompt": "a", "response": "b", "image": "pages/text.png"}),
        json!({"prompt": "a", "response": "b", "image": "pages/cut.png"}),
        json!({"prompt": "a", "response": "", "image": "pages/1-0.png"}),
        json!({"messages": [{"role": "user", "content": "a"}], "image": "pages/1-0.png"}),
        json!({"prompt": "a", "response": "b", "image": "pages/1-0.png", "images": ["x"]}),
    ] {
        text += &format!("{line}\n");
    }
    let lines = temp.path().join("co:lon.jsonl");
    fs::write(&lines, text).unwrap();
    let run = create(&temp.path().join("run"), &lines, config());
    let counts = PageCounts::load(run.directory()).unwrap();
    assert_eq!(counts.documents.iter().sum::<u64>(), 40);
    let summary = counts.skipped.summary().unwrap();
    for part in [
        "left out 8 records: co:lon.jsonl (lines without `image`, a path, or `images`, a list of paths; \
         the first is line 41)",
        "(cannot read it: No such file or directory (os error 2); the first is line 43, ",
        "pages/absent.png)",
        "(it is no image: expected PNG, JPEG, WebP, GIF, BMP or TIFF; the first is line 44, ",
        "(no answer to learn; the first is line 46)",
    ] {
        assert!(summary.contains(part), "{part}: {summary}");
    }
}

#[test]
fn an_image_that_is_gone_or_another_one_is_named() {
    let _turn = take_turns();
    let temp = TempDir::new().unwrap();
    for (name, expected) in [
        ("gone", "it is gone, and the run learns from it: restore it"),
        ("other", "it is not the image that it was when the run was made; restore the file"),
    ] {
        let [lines, archive] = write(temp.path(), 40);
        for data in [lines, archive] {
            let kind = data.extension().unwrap().to_str().unwrap();
            let run = create(&temp.path().join(format!("{name}-{kind}")), &data, config());
            let change = |file: PathBuf, bytes: Vec<u8>| match name {
                "gone" => fs::remove_file(&file).unwrap(),
                _ => fs::write(&file, bytes).unwrap(),
            };
            // Other images of the same size, and of the same number of bytes in the archive.
            match kind {
                "tar" => {
                    let mut bytes = fs::read(&data).unwrap();
                    let marks: Vec<usize> =
                        (0..bytes.len() - 4).filter(|&at| &bytes[at..at + 4] == b"IEND").collect();
                    marks.into_iter().for_each(|at| bytes[at + 5] ^= 1);
                    change(data.clone(), bytes);
                }
                _ => (0..40).for_each(|number| {
                    let [w, h] = pages_of(number)[0].1;
                    let file = temp.path().join(format!("pages/{number}-0.png"));
                    let mut bytes = std::io::Cursor::new(Vec::new());
                    page(number + 50, w, h).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
                    change(file, bytes.into_inner());
                }),
            }
            let trained = run.trainer(&Device::flex().autodiff()).and_then(|mut it| it.run());
            let error = trained.unwrap_err().to_string();
            let file = if kind == "tar" { "pages.tar: " } else { "-0.png: " };
            assert!(error.contains(file) && error.contains(expected), "{error}");
        }
    }
}

#[test]
fn what_a_run_wrote_for_its_images_is_not_read_when_it_is_damaged() {
    let temp = TempDir::new().unwrap();
    let [lines, _] = write(temp.path(), 40);
    let _turn = take_turns();
    let run = create(&temp.path().join("run"), &lines, TrainConfig { steps: 1, ..config() });
    train(&run);
    let data = run.directory().join("data");
    let device = Device::flex().autodiff();
    for name in ["train.images.jsonl", "validation.images.jsonl", "pages.json", "train.idx"] {
        let path = data.join(name);
        let whole = fs::read(&path).unwrap();
        let mut other = whole.clone();
        // As many bytes, and still what the file is for.
        match name {
            "pages.json" => {
                let text = String::from_utf8(whole.clone()).unwrap();
                other = text.replace("\"side\": 28", "\"side\": 00").into_bytes();
            }
            _ => *other.last_mut().unwrap() ^= 1,
        }
        for damaged in [other, b"[]\n".repeat(40)] {
            fs::write(&path, damaged).unwrap();
            let error = run.trainer(&device).map(drop).unwrap_err().to_string();
            let expected = "it is not what was written when the run was made";
            assert!(error.contains(name) && error.contains(expected), "{error}");
            let problems = yuan_train::Inventory::of(run.directory()).unwrap().problems;
            assert!(problems.iter().any(|problem| problem.what.contains(name)), "{problems:?}");
        }
        fs::write(&path, whole).unwrap();
    }
    run.trainer(&device).unwrap();
}

/// Which documents validate is decided by the image, whatever its path says.
#[test]
fn no_image_is_trained_on_and_validated_with() {
    let temp = TempDir::new().unwrap();
    write(temp.path(), 40);
    let line = |path: String| {
        format!("{}\n", json!({"prompt": "Which?", "response": "This.", "image": path}))
    };
    let direct = (0..40).map(|number| line(format!("pages/{number}-0.png")));
    let around = (0..40).map(|number| line(format!("./pages/../pages/{number}-0.png")));
    let files = [("one.jsonl", direct.collect::<String>()), ("two.jsonl", around.collect())];
    let files = files.map(|(name, text)| {
        let file = temp.path().join(name);
        fs::write(&file, text).unwrap();
        file
    });
    let new = NewRun::new(config(), model(), PageFiles::new(files.to_vec(), 0.3));
    let run = Run::create(&temp.path().join("run"), new).unwrap();
    let images = |split: &str| -> Vec<String> {
        let path = run.directory().join(format!("data/{split}.images.jsonl"));
        let name = |line: &str| {
            let images: Value = serde_json::from_str(line).unwrap();
            let path = images[0]["path"].as_str().unwrap();
            Path::new(path).file_name().unwrap().to_str().unwrap().to_owned()
        };
        fs::read_to_string(path).unwrap().lines().map(name).collect()
    };
    let [train, validation] = [images("train"), images("validation")];
    assert_eq!(train.len() + validation.len(), 80);
    assert!(validation.iter().all(|image| !train.contains(image)), "{validation:?}");
}

#[test]
fn archives_that_cannot_be_read_are_refused_and_members_are_named() {
    let temp = TempDir::new().unwrap();
    let [_, archive] = write(temp.path(), 40);
    let bytes = fs::read(&archive).unwrap();
    let refused = |name: &str, bytes: &[u8]| {
        let file = temp.path().join(name);
        fs::write(&file, bytes).unwrap();
        let new = NewRun::new(config(), model(), files(&file));
        Run::create(&temp.path().join(format!("run-{name}")), new).unwrap_err().to_string()
    };
    // Cut within a member, and between two.
    let member = (bytes.len() / 2..).find(|&at| bytes[at..].starts_with(b"set/")).unwrap();
    for length in [member + 512 + 10, member] {
        let error = refused("cut.tar", &bytes[..length]);
        assert!(
            error.ends_with("cut.tar: it is cut off: its end is missing; fetch it again"),
            "{error}"
        );
    }
    for name in ["zipped.tar", "zipped.tar.gz", "zipped.tgz"] {
        let error = refused(name, &[&[0x1f, 0x8b, 8, 0][..], &bytes].concat());
        assert!(error.contains(name) && error.ends_with("unpack it to a .tar"), "{error}");
    }
    // A link in place of an image, and two texts of one name.
    let file = temp.path().join("odd.tar");
    fs::write(&file, &bytes).unwrap();
    let size = bytes.iter().rposition(|&byte| byte != 0).unwrap().div_ceil(512) * 512;
    let mut odd = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    odd.append_link(&mut header, "set/link.png", "0001.0.png").unwrap();
    let text = br#"{"prompt": "a", "response": "b"}"#;
    for name in ["set/link.json", "set/twice.json", "set/twice.json"] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        odd.append_data(&mut header, name, &text[..]).unwrap();
    }
    let odd = [&bytes[..size], &odd.into_inner().unwrap()].concat();
    fs::write(&file, odd).unwrap();
    let run = create(&temp.path().join("odd"), &file, config());
    let summary = PageCounts::load(run.directory()).unwrap().skipped.summary().unwrap();
    let expected = "left out 2 records: odd.tar (members that are links or no files; the first is \
                    set/link), odd.tar (two .json of one name; the first is set/twice)";
    assert_eq!(summary, expected);
}

#[test]
fn settings_that_do_not_fit_images_are_refused() {
    let temp = TempDir::new().unwrap();
    let [lines, _] = write(temp.path(), 40);
    let refused = |new: NewRun| Run::create(&temp.path().join("run"), new).unwrap_err().to_string();
    let error = refused(NewRun::new(config(), YuanConfig::tiny(300), files(&lines)));
    assert_eq!(error, "the model sees no images: it has no image tower");
    let apart = NewRun::new(config(), model(), files(&lines)).with_isolated_documents();
    assert!(refused(apart).contains("leave --isolate out"));
    let long = TrainConfig { seq_len: 8, ..config() };
    let error = refused(NewRun::new(long, model(), files(&lines)));
    assert!(error.contains("40 are longer with their images than a row (--seq)"), "{error}");
}
