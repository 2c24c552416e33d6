//! Train a small multimodal model to read pages, from random weights and with LAEP.
//!
//!     cargo run --release --example read_pages
//!
//! The program draws the pages itself: lists of three prices. The model is asked for one of them, and
//! sees nothing but the picture. At the end it reads pages that it never saw, and the report shows
//! three of them with its answers.

use std::{env, error::Error, fs, ops::ControlFlow, path::Path};

use page::{Page, SIDE};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;
use yuan::{
    model::{
        BalanceLosses, GenerationOptions,
        generate::Prompt,
        text::Tokenizer,
        vision::{ImageConfig, ImageLayout, ImagePositions, Picture, VisionConfig},
    },
    prelude::*,
    report::Answer,
    train::{Claim, Display, ModelDirectory, data::PageFiles},
};

mod page;

/// Every step allocates and frees the same large tensors, which the system's allocator returns to
/// the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Where the pages go.
const PAGES: &str = "runs/pages";

fn main() -> Result<(), Box<dyn Error>> {
    let steps = env::args().nth(1).map_or(Ok(2000), |steps| steps.parse())?;
    let pages = draw_pages(Path::new(PAGES), 6000)?;
    println!("drew 6000 pages into {PAGES}");

    let config = TrainConfig {
        steps,
        batch_size: 8,
        seq_len: 128,
        learning_rate: 1e-3,
        min_learning_rate: 1e-4,
        warmup_steps: steps / 20,
        validate_every: Some((steps / 12).max(1)),
        checkpoint_every: None,
        balance: BalanceLosses { auxiliary: 0.01, ..BalanceLosses::default() },
        ..yuan::toy::train_config()
    };
    let new = NewRun::new(config, model(), pages);
    let run = Run::create_in(Claim::first_free(Path::new("runs/read_pages"))?, new)?;
    let device = yuan::device("flex")?;
    run.trainer(&device.clone().autodiff())?.with_callback(Display::new(20))?.run()?;

    let read = read_unseen(run.directory(), 100)?;
    let report = Report::of(run.directory())?;
    report.save()?;
    println!("\n{}", report.table());
    println!("It read {read} of 100 pages that it never saw.");
    println!("The report is {}", report.page().display());
    Ok(())
}

/// A tower of 0.8 M parameters before a language model of two layers of 16 experts.
fn model() -> YuanConfig {
    let tower = VisionConfig {
        hidden_size: 128,
        intermediate_size: 512,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        image_size: SIDE as usize,
        patch_size: 8,
        initializer_factor: 1.0,
        ..VisionConfig::intern_vit_300m()
    };
    let images = ImageConfig { tower, placeholder: 2, max_tiles: 1, positions: None };
    YuanConfig {
        hidden_size: 128,
        attention_projection_size: 256,
        expert_hidden_size: 128,
        experts_per_layer: vec![16; 2],
        images: Some(images),
        ..YuanConfig::toy(300)
    }
}

/// Pages as files, with a line for each that says what is asked.
fn draw_pages(directory: &Path, count: usize) -> Result<PageFiles, Box<dyn Error>> {
    fs::create_dir_all(directory)?;
    let mut rng = StdRng::seed_from_u64(0);
    let mut lines = String::new();
    for number in 0..count {
        let Page { picture, list, question, answer } = Page::draw(&mut rng);
        let name = format!("{number:05}.png");
        picture.save(directory.join(&name))?;
        // Every page is read aloud as well, which teaches more than the answers alone.
        for (prompt, response) in [("What is written here?", &list), (&question[..], &answer)] {
            let line = json!({"image": name, "prompt": prompt, "response": response});
            lines += &format!("{line}\n");
        }
    }
    let file = directory.join("pages.jsonl");
    fs::write(&file, lines)?;
    Ok(PageFiles::new(vec![file], 0.05))
}

/// Asks the model of a run about new pages; how many answers are right.
fn read_unseen(run: &Path, count: usize) -> Result<usize, Box<dyn Error>> {
    let (directory, tokenizer) = (ModelDirectory::open(run)?, Tokenizer::load(run)?);
    let model = directory.load(&yuan::device("flex")?, None)?;
    let layout = ImageLayout::of(model.config(), |token| tokenizer.token_id(token))?;
    let mut rng = StdRng::seed_from_u64(1);
    let (mut pages, mut prompts) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let page = Page::draw(&mut rng);
        let values = page.picture.pixels().flat_map(|pixel| [pixel.0[0]; 3]).collect();
        let side = SIDE as usize;
        let picture = Picture::new(side, side, values).ok_or("a page has pixels")?;
        let rows = model.see(&layout.tiles(&picture, 1))?;
        let question = tokenizer.encode(&page.question, false)?;
        let tokens = layout.question(&[rows.len()], &question);
        prompts.push(Prompt::with_images(tokens, rows));
        pages.push(page);
    }
    let options = GenerationOptions {
        max_new_tokens: 8,
        stop_tokens: tokenizer.stop_tokens(model.config()),
        // As the rows of its training had it.
        image_positions: ImagePositions::Together,
        ..GenerationOptions::default()
    };
    let answers = model.generate(&prompts, &options, |_| ControlFlow::Continue(()))?;
    fs::create_dir_all(run.join("answers"))?;
    let mut shown = Vec::new();
    let mut read = 0;
    for (number, (page, answer)) in pages.iter().zip(&answers).enumerate() {
        let answer = tokenizer.decode(&answer.tokens)?.trim().to_owned();
        read += usize::from(answer == page.answer);
        if number < 3 {
            let image = format!("answers/{number}.png");
            page.picture.save(run.join(&image))?;
            let (question, expected) = (page.question.clone(), Some(page.answer.clone()));
            shown.push(Answer { image, question, answer, expected });
        }
    }
    // The report shows these.
    Answer::save_all(&shown, run)?;
    Ok(read)
}
