//! Documents on their way into the directory of a run.

use std::{
    collections::HashMap,
    fs,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use serde::Serialize;
use tokenizers::Tokenizer;
use yuan_data::{DataError, Skipped, Split, TokenType, TokenWriter, tokenizer::Encoder};
use yuan_files::{Checksum, Summing, write_whole};
use yuan_model::vision::{ImageLayout, PictureError};

use super::{
    COUNTS, ImageSource, PageCounts, PageFiles, PageSettings, SETTINGS, files,
    image::ImagePlace,
    rows,
    sample::{Found, Sample},
    sizes_of,
};
use crate::{
    TrainError,
    data::{DataKind, DataSet, DataSets, WrittenFiles},
};

/// Which part of the data an image's questions are, by the image itself, whatever it is called.
fn split_of(image: Checksum, validation: f64) -> Split {
    Split::of(&format!("{:08x} {}", image.crc32, image.bytes), validation)
}

/// Does something with images in parallel, once with each.
fn of_each<T: Send>(
    images: impl Iterator<Item = ImagePlace>,
    what: impl Fn(&ImagePlace) -> T + Sync,
) -> HashMap<ImagePlace, T> {
    let mut images: Vec<ImagePlace> = images.collect();
    images.sort_unstable_by(|a, b| (&a.path, &a.member).cmp(&(&b.path, &b.member)));
    images.dedup();
    images.into_par_iter().map(|image| (image.clone(), what(&image))).collect()
}

/// The images of all samples.
fn images_of(found: &[Found]) -> impl Iterator<Item = ImagePlace> {
    found
        .iter()
        .filter_map(|found| found.read.as_ref().ok())
        .flat_map(|sample| sample.images.clone())
}

/// See [`PageFiles::texts`].
pub(super) fn texts(files: &PageFiles) -> Result<Vec<String>, TrainError> {
    let mut texts = Vec::new();
    for file in &files.files {
        files::for_each(file, |found| {
            let first = |found: &Found| found.read.as_ref().ok().map(|it| it.images[0].clone());
            let sums = of_each(found.iter().filter_map(first), ImagePlace::checksum);
            for Found { read, .. } in found {
                if let Ok(Sample { images, question, answer }) = read
                    && let Ok(image) = &sums[&images[0]]
                    && split_of(*image, files.validation) == Split::Train
                {
                    texts.push(format!("{question}\n{answer}"));
                }
            }
            Ok(())
        })?;
    }
    Ok(texts)
}

/// Writes the documents of files into a directory of a run.
///
/// # Errors
///
/// If a file cannot be read or written, or there is nothing to train on or to validate with.
pub(crate) fn write_pages(
    run_dir: &Path,
    files: &PageFiles,
    layout: ImageLayout,
    tokenizer: &Tokenizer,
    end_of_document: &str,
    row_len: usize,
) -> Result<DataSets, TrainError> {
    let directory = run_dir.join(DataSets::DIRECTORY);
    fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
    let encoder = Encoder::new(tokenizer, end_of_document)?;
    let kind = TokenType::for_vocabulary(encoder.vocab_size());
    let writer = |split| SplitWriter::create(&directory, split, kind);
    let mut documents = Documents {
        layout,
        encoder,
        row_len,
        validation: files.validation,
        writers: [writer("train")?, writer("validation")?],
        counts: PageCounts::default(),
    };
    for file in &files.files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        files::for_each(file, |found| documents.add_all(&name, found))?;
    }
    let Documents { writers, counts, .. } = documents;
    refuse_too_few(&counts)?;
    let mut written = WrittenFiles::default();
    for writer in writers {
        writer.finish(&mut written)?;
    }
    let settings = PageSettings { layout, positions: files.positions };
    for (name, text) in [(SETTINGS, as_text(&settings)), (COUNTS, as_text(&counts))] {
        write_whole(&directory.join(name), text.as_bytes())?;
        written.add(name, Checksum::of(text.as_bytes()));
    }
    let set = DataSet {
        name: "pages".into(),
        weight: 1.0,
        path: DataSets::DIRECTORY.into(),
        kind: DataKind::Pages,
        tokens: counts.tokens,
        checksum: written.of("train.bin"),
        files: written,
    };
    Ok(DataSets { sets: vec![set] })
}

fn as_text(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).expect("numbers and names are plain data")
}

fn refuse_too_few(counts: &PageCounts) -> Result<(), TrainError> {
    let [train, validation] = counts.documents;
    if train > 0 && validation > 0 {
        return Ok(());
    }
    let skipped = counts.skipped.summary().map_or_else(String::new, |text| format!("; {text}"));
    let long = match counts.longer_than_a_row {
        0 => String::new(),
        count => format!("; {count} are longer with their images than a row (--seq)"),
    };
    let reason = format!(
        "{train} questions about images to train on and {validation} to validate with are too few: \
         bring more, or keep a larger share to validate with (--validation){long}{skipped}"
    );
    Err(DataError::NoText(reason).into())
}

/// Why a sample is left out, and which of its images is to blame.
struct Refused {
    what: Option<String>,
    reason: String,
}

impl Refused {
    fn whole(reason: String) -> Self {
        Self { what: None, reason }
    }
}

/// Samples to documents.
struct Documents {
    layout: ImageLayout,
    encoder: Encoder,
    row_len: usize,
    validation: f64,
    writers: [SplitWriter; 2],
    counts: PageCounts,
}

impl Documents {
    fn add_all(&mut self, file: &str, found: Vec<Found>) -> Result<(), TrainError> {
        // Damaged images are found now, and not in the middle of a run.
        let looks = of_each(images_of(&found), ImagePlace::look);
        for Found { place, read } in found {
            let document =
                read.map_err(Refused::whole).and_then(|sample| self.document(sample, &looks));
            match document {
                Ok(Some((split, tokens, images))) => self.writers[split].add(&tokens, &images)?,
                Ok(None) => self.counts.longer_than_a_row += 1,
                Err(Refused { what, reason }) => {
                    let place = what.map_or(place.clone(), |what| format!("{place}, {what}"));
                    let skipped = Skipped::record(file.to_owned(), reason, place);
                    self.counts.skipped.add(skipped, 1);
                }
            }
        }
        Ok(())
    }

    /// Split, tokens of the text and images of a document; none if it is longer than a row.
    fn document(
        &mut self,
        sample: Sample,
        looks: &HashMap<ImagePlace, Result<ImageSource, PictureError>>,
    ) -> Result<Option<(usize, Vec<u32>, Vec<ImageSource>)>, Refused> {
        let look = |image: &ImagePlace| {
            looks[image].clone().map_err(|PictureError { reason, .. }| Refused {
                what: Some(image.path.display().to_string()),
                reason,
            })
        };
        let images: Vec<ImageSource> = sample.images.iter().map(look).collect::<Result<_, _>>()?;
        let markers = self.layout.markers;
        let mut tokens = self.encode(&sample.question)?;
        tokens.push(markers.sep);
        let answer = self.encode(&sample.answer)?;
        if answer.is_empty() {
            return Err(Refused::whole("no answer to learn".into()));
        }
        tokens.extend(answer);
        tokens.push(markers.eod);
        let opening = self.layout.opening(&self.layout.rows_of(&sizes_of(&images))).len();
        let length = opening + tokens.len();
        if length > self.row_len {
            return Ok(None);
        }
        let is_validation = split_of(images[0].checksum, self.validation) == Split::Validation;
        let split = usize::from(is_validation);
        self.counts.documents[split] += 1;
        self.counts.images[split] += images.len() as u64;
        self.counts.tokens[split] += length as u64;
        Ok(Some((split, tokens, images)))
    }

    /// Tokens of a text, which must not hold what marks images, questions and answers.
    fn encode(&self, text: &str) -> Result<Vec<u32>, Refused> {
        let tokens = self.encoder.encode(text);
        let mut tokens = tokens.map_err(|error| Refused::whole(error.to_string()))?;
        tokens.retain(|&token| !self.layout.is_marker(token));
        Ok(tokens)
    }
}

/// Texts and images of one split on their way to disk.
struct SplitWriter {
    split: &'static str,
    tokens: TokenWriter,
    path: PathBuf,
    images: Summing<BufWriter<fs::File>>,
}

impl SplitWriter {
    fn create(directory: &Path, split: &'static str, kind: TokenType) -> Result<Self, TrainError> {
        let path = rows::images_of(directory, split);
        let file = fs::File::create(&path).map_err(TrainError::io("write", &path))?;
        let tokens = TokenWriter::create(&directory.join(split), kind)?;
        Ok(Self { split, tokens, path, images: Summing::new(BufWriter::new(file)) })
    }

    fn add(&mut self, tokens: &[u32], images: &[ImageSource]) -> Result<(), TrainError> {
        self.tokens.push(tokens)?;
        self.tokens.end_document()?;
        let line = serde_json::to_string(images).expect("paths and numbers are plain data");
        writeln!(self.images, "{line}").map_err(TrainError::io("write", &self.path))
    }

    fn finish(self, written: &mut WrittenFiles) -> Result<(), TrainError> {
        let failed = TrainError::io("write", &self.path);
        let (checksum, images) = self.images.finish();
        let file = images.into_inner().map_err(std::io::IntoInnerError::into_error);
        file.and_then(|file| file.sync_all()).map_err(failed)?;
        written.add_tokens(self.split, self.tokens.finish()?);
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        written.add(&name, checksum);
        Ok(())
    }
}
