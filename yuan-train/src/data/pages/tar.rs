//! Archives in `WebDataset`'s layout: members of one name and different endings are a sample.

use std::{fs::File, io::Read, path::Path};

use tar::{Archive, EntryType};

use super::{Found, ImageSource, Look, Sample, question_of};
use crate::TrainError;

/// Endings of images.
const IMAGES: [&str; 8] = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"];
/// Larger members are passed over.
const MOST_BYTES: u64 = 1 << 28;

pub(super) fn is_tar(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "tar")
}

/// The members of a sample, as far as they came.
#[derive(Default)]
struct Members {
    /// Their endings, `png` or `0.png` of several, in the order of the archive.
    images: Vec<(String, ImageSource)>,
    json: Option<serde_json::Value>,
    problem: Option<String>,
}

/// Shows every sample of an archive; its members follow each other.
pub(super) fn for_each_sample(
    path: &Path,
    look: Look,
    mut show: impl FnMut(Found) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let archive = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let failed = || TrainError::io("read", path);
    let file = File::open(path).map_err(failed())?;
    let bytes_of_file = file.metadata().map_err(failed())?.len();
    let mut tar = Archive::new(file);
    let mut open: Option<(String, Members)> = None;
    for member in tar.entries_with_seek().map_err(failed())? {
        let mut member = member.map_err(failed())?;
        if member.raw_file_position().saturating_add(member.size()) > bytes_of_file {
            let reason = "it is cut off: fetch it again".into();
            return Err(TrainError::Damaged { path: path.to_path_buf(), reason });
        }
        if member.header().entry_type() != EntryType::Regular {
            continue;
        }
        let name = member.path().map_err(failed())?.to_string_lossy().into_owned();
        // The key goes to the first dot of the last part.
        let start = name.rfind('/').map_or(0, |slash| slash + 1);
        // Names that begin with a dot are what an operating system left behind.
        let Some(dot) = name[start..].find('.').filter(|&dot| dot > 0) else { continue };
        let (key, ending) = (&name[..start + dot], name[start + dot + 1..].to_lowercase());
        let kind = ending.rsplit('.').next().unwrap_or_default();
        if !IMAGES.contains(&kind) && kind != "json" {
            continue;
        }
        if open.as_ref().is_none_or(|(open, _)| open != key) {
            if let Some((key, members)) = open.take() {
                show(found(&archive, &key, look, members))?;
            }
            open = Some((key.to_owned(), Members::default()));
        }
        let Some((_, members)) = &mut open else { continue };
        if look == Look::AtTexts && kind != "json" {
            continue;
        }
        let (at, size) = (member.raw_file_position(), member.size());
        if size > MOST_BYTES {
            members.problem = Some(format!("members of over {MOST_BYTES} bytes"));
            continue;
        }
        let mut bytes = Vec::new();
        member.read_to_end(&mut bytes).map_err(failed())?;
        if kind == "json" {
            match serde_json::from_slice(&bytes) {
                Ok(value) => members.json = Some(value),
                Err(_) => members.problem = Some("a .json that is none".into()),
            }
        } else {
            match ImageSource::in_archive(path, at, &bytes) {
                Ok(_) if members.images.iter().any(|(other, _)| *other == ending) => {
                    members.problem = Some("two images of one name".into());
                }
                Ok(image) => members.images.push((ending, image)),
                Err(reason) => members.problem = Some(reason),
            }
        }
    }
    match open {
        Some((key, members)) => show(found(&archive, &key, look, members)),
        None => Ok(()),
    }
}

fn found(
    archive: &str,
    key: &str,
    look: Look,
    Members { images, json, problem }: Members,
) -> Found {
    let images: Vec<ImageSource> = images.into_iter().map(|(_, image)| image).collect();
    let read = match (problem, json) {
        (Some(problem), _) => Err(problem),
        (None, None) => Err("samples without a .json".to_owned()),
        (None, Some(_)) if images.is_empty() && look == Look::AtImages => {
            Err("samples without an image".to_owned())
        }
        (None, Some(value)) => question_of(&value)
            .map(|(question, answer)| Sample { images, question, answer })
            .map_err(str::to_owned),
    };
    Found { name: format!("{archive}:{key}"), read }
}
