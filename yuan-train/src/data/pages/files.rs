//! The samples of a file, whatever its kind.

use std::path::Path;

use yuan_data::JsonLines;

use super::{
    image::ImagePlace,
    sample::{Found, Sample, image_paths, question_of},
    tar,
};
use crate::TrainError;

/// Samples that are shown together.
const AT_ONCE: usize = 256;

/// Shows the samples of a file, some at a time, in order.
pub(super) fn for_each(
    path: &Path,
    mut show: impl FnMut(Vec<Found>) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut some = Vec::new();
    let mut collect = |found| {
        some.push(found);
        match some.len() == AT_ONCE {
            true => show(std::mem::take(&mut some)),
            false => Ok(()),
        }
    };
    match tar::is_tar(path) {
        true => tar::for_each_sample(path, &mut collect)?,
        false => for_each_line(path, &mut collect)?,
    }
    show(some)
}

fn for_each_line(
    path: &Path,
    show: &mut impl FnMut(Found) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let above = path.parent().unwrap_or(Path::new(""));
    for line in JsonLines::open(path)? {
        let (number, value) = line?;
        let read = question_of(&value).map_err(str::to_owned).and_then(|(question, answer)| {
            let paths = image_paths(&value)?.into_iter();
            let images = paths.map(|path| ImagePlace::of_file(above.join(path))).collect();
            Ok(Sample { images, question, answer })
        });
        show(Found { place: format!("line {number}"), read })?;
    }
    Ok(())
}
