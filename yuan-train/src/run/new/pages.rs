//! A run on questions about images.

use std::path::Path;

use tokenizers::Tokenizer;
use yuan_data::{DataError, tokenizer, tokenizer::END_OF_DOCUMENT};
use yuan_model::{YuanConfig, vision::ImageLayout};

use super::{OfModel, PreparedData};
use crate::{
    TrainError,
    data::{DataSets, PageFiles, write_pages},
    names::TOKENIZER,
};

/// Tells a fresh model the ids of the tokens that texts with images need.
pub(super) fn set_tokens(model: &mut YuanConfig, tokenizer: &Tokenizer) {
    let [begin, placeholder, separator, ..] =
        ImageLayout::TOKENS.map(|token| tokenizer.token_to_id(token));
    model.tokens.bos = begin.or(model.tokens.bos);
    model.tokens.pad = placeholder.or(model.tokens.pad);
    model.tokens.sep = separator.or(model.tokens.sep);
    if let (Some(images), Some(placeholder)) = (&mut model.images, placeholder) {
        images.placeholder = placeholder;
    }
}

/// Makes documents of the files with the model's tokenizer, or with one that is trained on them.
pub(super) fn prepare(
    run_dir: &Path,
    files: &PageFiles,
    model: &YuanConfig,
    isolates: bool,
    of_model: Option<OfModel>,
    seq_len: usize,
) -> Result<PreparedData, TrainError> {
    if isolates {
        let reason = "questions about images cannot be kept apart in a row, where all tokens up to an \
                      image have one position: leave --isolate out";
        return Err(DataError::Setting(reason.into()).into());
    }
    let mut model = model.clone();
    let (tokenizer, tokenizer_file, end) = match of_model {
        Some(OfModel { path, tokenizer, eod }) => (tokenizer, path, eod),
        None => {
            let texts = files.texts()?.into_iter();
            let special = &ImageLayout::TOKENS;
            let tokenizer = tokenizer::train_with(special, texts, model.vocab_size, false)?;
            set_tokens(&mut model, &tokenizer);
            let directory = run_dir.join(DataSets::DIRECTORY);
            std::fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
            let path = directory.join(TOKENIZER);
            let saved = tokenizer.save(&path, true);
            saved.map_err(|error| DataError::Tokenizer(error.to_string()))?;
            (tokenizer, path, END_OF_DOCUMENT.to_owned())
        }
    };
    let eod = tokenizer::Encoder::new(&tokenizer, &end)?.eod();
    model.tokens.eod = Some(eod);
    let layout = ImageLayout::of(&model, |token| tokenizer.token_to_id(token))?;
    let sets = write_pages(run_dir, files, layout, &tokenizer, &end, seq_len)?;
    Ok(PreparedData { sets, tokenizer, tokenizer_file, eod })
}
