//! Pre-train a toy Yuan3.0 model with LAEP on real text, end to end.
//!
//!     cargo run --release --example pretrain
//!
//! The text is the source code of the crates that this library was built from. When the loads of
//! all layers are stable, the trainer prunes on its own and goes on. The program `yuan pretrain`
//! has every setting as an option.

use std::{error::Error, path::Path};

use yuan::{
    prelude::*,
    toy,
    train::{Claim, Display},
};

/// Every step allocates and frees the same large tensors, which the system's allocator returns to
/// the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn Error>> {
    // What to learn: documents. Any directory of text will do (`RunData::Text`).
    let documents = toy::corpus()?;
    println!("{} documents; training a tokenizer on them", documents.len());

    // What a run is: settings, a model, and text. It lives in a directory of its own.
    let device = yuan::device("flex")?.autodiff();
    let mut config = toy::train_config();
    config.laep.predict_speed = true;
    let new = NewRun::new(config, toy::model(), documents);
    let run = Run::create_in(Claim::first_free(Path::new("runs/pretrain"))?, new)?;

    // The trainer does what the settings say: validations, checkpoints, LAEP. Callbacks add to it.
    run.trainer(&device)?.with_callback(Display::new(10))?.run()?;

    // What came of it: a table, pictures, and a page with every number.
    let report = Report::of(run.directory())?;
    report.save()?;
    println!("\n{}", report.table());
    match report.history().prunes().next() {
        Some((step, plan)) => println!("Pruned after step {step}:\n{plan}"),
        None => println!("Nothing was pruned: the loads of all layers were never stable."),
    }
    println!("The report is {}", report.page().display());
    Ok(())
}
