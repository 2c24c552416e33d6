//! Documents with images packed into rows by upstream's rule.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use yuan_data::{DataError, TokenFile};
use yuan_model::{
    masks::{document_position_ids, image_row_mask, image_row_position_ids},
    vision::{ImageLayout, ImagePositions, Picture},
};

use super::{ImageSource, PageSettings, sizes_of};
use crate::{
    TrainError,
    data::{
        DataSets, Row, RowSource,
        packed::{best_fit, range_of},
        rows::place_in_epoch,
    },
};

/// Rows of questions about images, packed by best fit: none is cut, and what is left of a row is
/// padding. Masks are those of upstream's multimodal training ([`image_row_mask`]): only answers are
/// learnt. So are positions ([`image_row_position_ids`]), unless the run was made with others: all tokens
/// up to the last image of a document are at position 0.
#[derive(Debug)]
pub struct PageRows {
    tokens: TokenFile,
    images: Vec<Vec<ImageSource>>,
    layout: ImageLayout,
    positions: ImagePositions,
    row_len: usize,
    seed: Option<u64>,
    /// The documents of every row.
    rows: Vec<Vec<u32>>,
}

/// The file with the images of a split's documents, a line for each.
pub(super) fn images_of(directory: &Path, split: &str) -> PathBuf {
    directory.join(format!("{split}.images.jsonl"))
}

impl PageRows {
    /// Packs the documents of a split of a run, for a model of `vocab_size` tokens.
    ///
    /// # Errors
    ///
    /// If the files do not fit each other or the model, or no document fits into a row.
    pub fn open(
        run_dir: &Path,
        split: &str,
        vocab_size: usize,
        row_len: usize,
        seed: Option<u64>,
    ) -> Result<Self, TrainError> {
        let PageSettings { layout, positions } = PageSettings::load(run_dir)?;
        let directory = &run_dir.join(DataSets::DIRECTORY);
        if layout.markers().into_iter().any(|marker| marker as usize >= vocab_size) {
            let (path, reason) =
                (directory.to_path_buf(), "its markers are no tokens of the model");
            return Err(TrainError::Damaged { path, reason: reason.into() });
        }
        let tokens = TokenFile::open(&directory.join(split))?.with_vocabulary(vocab_size);
        let path = images_of(directory, split);
        let images = read_images(&path)?;
        let count = tokens.num_documents();
        if images.len() != count {
            let reason =
                format!("it has the images of {} documents, expected {count}", images.len());
            return Err(TrainError::Damaged { path, reason });
        }
        refuse_lost_images(&images)?;
        let mut lengths = Vec::with_capacity(count);
        for (document, images) in images.iter().enumerate() {
            let text = range_of(&tokens, document)?;
            let opening = layout.opening(&layout.rows_of(&sizes_of(images))).len();
            lengths.push(opening + (text.end - text.start) as usize);
        }
        let (rows, _) = best_fit(&lengths, row_len);
        if rows.is_empty() {
            let longest = lengths.iter().max().copied().unwrap_or(0);
            let reason = format!(
                "no question with its images fits into a row of {row_len} tokens (--seq); the longest \
                 has {longest}"
            );
            return Err(DataError::NoText(reason).into());
        }
        Ok(Self { tokens, images, layout, positions, row_len, seed, rows })
    }

    /// Rows of one epoch.
    pub fn num_rows(&self) -> u64 {
        self.rows.len() as u64
    }

    /// The tiles of all images of some documents.
    fn tiles(&self, documents: &[u32]) -> Result<Vec<Picture>, TrainError> {
        let images: Vec<(&ImageSource, usize)> = documents
            .iter()
            .flat_map(|&document| {
                let images = &self.images[document as usize];
                images.iter().map(move |image| (image, images.len()))
            })
            .collect();
        let tiles = |&(image, of): &(&ImageSource, usize)| {
            image.read(|picture| self.layout.tiles(picture, of)).map_err(TrainError::Picture)
        };
        let tiles: Result<Vec<Vec<Picture>>, TrainError> = images.par_iter().map(tiles).collect();
        Ok(tiles?.concat())
    }
}

/// What is gone is said before the first step, and not when its row comes.
fn refuse_lost_images(documents: &[Vec<ImageSource>]) -> Result<(), TrainError> {
    let files: HashSet<&Path> =
        documents.iter().flatten().map(|image| image.place.path.as_path()).collect();
    match files.into_par_iter().find_any(|path| !path.is_file()) {
        Some(path) => {
            let reason = "it is gone, and the run learns from it: restore it".into();
            Err(TrainError::Damaged { path: path.to_path_buf(), reason })
        }
        None => Ok(()),
    }
}

fn read_images(path: &Path) -> Result<Vec<Vec<ImageSource>>, TrainError> {
    let file = File::open(path).map_err(TrainError::io("read", path))?;
    let mut images = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(TrainError::io("read", path))?;
        let damaged = |error: serde_json::Error| TrainError::Damaged {
            path: path.to_path_buf(),
            reason: format!("line {}: {error}", number + 1),
        };
        images.push(serde_json::from_str(&line).map_err(damaged)?);
    }
    Ok(images)
}

impl RowSource for PageRows {
    fn row_len(&self) -> usize {
        self.row_len
    }

    fn row(&self, place: u64) -> Result<Row, TrainError> {
        let number = place_in_epoch(place, self.num_rows(), self.seed) as usize;
        let (documents, markers) = (&self.rows[number], self.layout.markers);
        let mut tokens = Vec::with_capacity(self.row_len + 1);
        let mut image_places = Vec::new();
        for &document in documents {
            let rows = self.layout.rows_of(&sizes_of(&self.images[document as usize]));
            let opening = self.layout.opening(&rows);
            let start = tokens.len();
            let of_images = opening.iter().enumerate().filter(|(_, token)| **token == markers.pad);
            image_places.extend(of_images.map(|(place, _)| start + place));
            tokens.extend(opening);
            let text = range_of(&self.tokens, document as usize)?;
            tokens.extend(self.tokens.read(text.start, (text.end - text.start) as usize)?);
        }
        let padding_from = tokens.len();
        tokens.resize(self.row_len + 1, markers.pad);
        let input_ids = tokens[..self.row_len].to_vec();
        Ok(Row {
            set: 0,
            labels: tokens[1..].to_vec(),
            position_ids: match self.positions {
                ImagePositions::Together => image_row_position_ids(&input_ids, &markers),
                ImagePositions::Increasing => document_position_ids(&input_ids, markers.eod),
            },
            learnt: Some(image_row_mask(&input_ids, &markers)),
            padding_from,
            tiles: self.tiles(documents)?,
            signals: Vec::new(),
            image_places,
            input_ids,
        })
    }
}
