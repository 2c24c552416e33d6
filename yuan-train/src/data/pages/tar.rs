//! Archives in `WebDataset`'s layout: members of one name and different endings are a sample.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use tar::{Archive, EntryType};

use super::{
    image::ImagePlace,
    sample::{Found, Sample, question_of},
};
use crate::TrainError;

/// Endings of images.
const IMAGES: [&str; 8] = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"];
/// Larger members are left out.
const MOST_BYTES: u64 = 1 << 28;
/// An archive is a number of blocks, and one of zeros follows the last member.
const BLOCK: u64 = 512;

/// Whether a file's name says that it is an archive, compressed ones included.
pub(super) fn is_tar(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    [".tar", ".tar.gz", ".tgz", ".tar.zst"].iter().any(|ending| name.ends_with(ending))
}

/// The members of a sample, as far as they came.
#[derive(Default)]
struct Members {
    /// Their endings, `png` or `0.png` of several, in the order of the archive.
    images: Vec<(String, ImagePlace)>,
    json: Option<serde_json::Value>,
    problem: Option<String>,
}

/// Shows every sample of an archive; its members follow each other.
pub(super) fn for_each_sample(
    path: &Path,
    show: &mut impl FnMut(Found) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let failed = || TrainError::io("read", path);
    let damaged =
        |reason: &str| TrainError::Damaged { path: path.to_path_buf(), reason: reason.to_owned() };
    let mut file = File::open(path).map_err(failed())?;
    let metadata = file.metadata().map_err(failed())?;
    if !metadata.is_file() {
        return Err(damaged("it is no file"));
    }
    if is_compressed(&mut file).map_err(failed())? {
        return Err(damaged(
            "it is compressed, and images are read from the middle of an archive: unpack it to a .tar",
        ));
    }
    let mut tar = Archive::new(file.try_clone().map_err(failed())?);
    let mut open: Option<(String, Members)> = None;
    let mut end = 0;
    for member in tar.entries_with_seek().map_err(failed())? {
        let mut member = member.map_err(failed())?;
        let at = member.raw_file_position();
        // What is sparse takes less than its size in the archive.
        let size = match member.header().entry_type() {
            EntryType::GNUSparse => member.header().entry_size().map_err(failed())?,
            _ => member.size(),
        };
        end = at.saturating_add(size).div_ceil(BLOCK) * BLOCK;
        if at.saturating_add(size) > metadata.len() {
            return Err(damaged(CUT_OFF));
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
                show(found(key, members))?;
            }
            open = Some((key.to_owned(), Members::default()));
        }
        let Some((_, members)) = &mut open else { continue };
        if member.header().entry_type() != EntryType::Regular {
            members.problem = Some("members that are links or no files".into());
        } else if size > MOST_BYTES {
            members.problem = Some(format!("members of over {MOST_BYTES} bytes"));
        } else if kind == "json" {
            let mut bytes = Vec::new();
            member.read_to_end(&mut bytes).map_err(failed())?;
            match serde_json::from_slice(&bytes) {
                Ok(_) if members.json.is_some() => {
                    members.problem = Some("two .json of one name".into());
                }
                Ok(value) => members.json = Some(value),
                Err(_) => members.problem = Some("a .json that is none".into()),
            }
        } else if members.images.iter().any(|(other, _)| *other == ending) {
            members.problem = Some("two images of one name".into());
        } else {
            let member = Some((name.clone(), at, size));
            members.images.push((ending, ImagePlace { path: path.to_path_buf(), member }));
        }
    }
    if let Some((key, members)) = open {
        show(found(key, members))?;
    }
    match ends_at(&mut file, end).map_err(failed())? {
        true => Ok(()),
        false => Err(damaged(CUT_OFF)),
    }
}

const CUT_OFF: &str = "it is cut off: its end is missing; fetch it again";

fn is_compressed(file: &mut File) -> std::io::Result<bool> {
    let mut begin = Vec::new();
    file.take(4).read_to_end(&mut begin)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(begin.starts_with(&[0x1f, 0x8b]) || begin == [0x28, 0xb5, 0x2f, 0xfd])
}

/// Whether a block of zeros follows the last member.
fn ends_at(file: &mut File, end: u64) -> std::io::Result<bool> {
    let mut block = Vec::new();
    file.seek(SeekFrom::Start(end))?;
    file.take(BLOCK).read_to_end(&mut block)?;
    Ok(block.len() as u64 == BLOCK && block.iter().all(|&byte| byte == 0))
}

fn found(key: String, Members { images, json, problem }: Members) -> Found {
    let images: Vec<ImagePlace> = images.into_iter().map(|(_, image)| image).collect();
    let read = match (problem, json) {
        (Some(problem), _) => Err(problem),
        (None, None) => {
            Err("samples without a .json beside their images in the archive".to_owned())
        }
        (None, Some(_)) if images.is_empty() => {
            Err("samples without an image beside their .json in the archive".to_owned())
        }
        (None, Some(value)) => question_of(&value)
            .map(|(question, answer)| Sample { images, question, answer })
            .map_err(str::to_owned),
    };
    Found { place: key, read }
}
