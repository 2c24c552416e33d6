//! Image files to pictures.

use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader, Cursor, Read, Seek},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use image::{
    DynamicImage, ImageDecoder, ImageError as Failure, ImageFormat, ImageReader, Limits,
    metadata::Orientation,
};

use super::Picture;

/// Why an image could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PictureError {
    /// The file, if it is one.
    pub path: Option<PathBuf>,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for PictureError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}: {}", path.display(), self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

impl std::error::Error for PictureError {}

/// Pixels of an image at most, as in Pillow: more are taken for an attempt to exhaust the memory.
const MOST_PIXELS: u64 = 178_956_970;
/// Pixels of a side at most, as in a JPEG file: what is resized has weights for each of them.
const MOST_OF_A_SIDE: u32 = 65_535;
/// Bytes of a file at most.
const MOST_FILE_BYTES: u64 = 1 << 30;
/// Memory that a decoder may take for itself.
const MOST_BYTES: u64 = 1 << 30;

impl Picture {
    /// Reads an image file: PNG, JPEG, WebP, GIF, BMP or TIFF, whatever its name says.
    ///
    /// The picture is what Pillow's `convert("RGB")` makes of the file: transparency is left out, of an
    /// animation the first picture is taken, and the orientation in a photograph's EXIF data is not
    /// looked at (that of a TIFF file is). Of 16 bits the upper eight are kept; Pillow would cut 16-bit grey
    /// off at 255.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, is no image, is damaged or cut off, has over 178,956,970 pixels or
    /// over 65,535 on a side, or takes over 1 GiB as it is decoded.
    pub fn open(path: &Path) -> Result<Self, PictureError> {
        let refuse = |reason: String| PictureError { path: Some(path.to_path_buf()), reason };
        Self::decode(&Self::read_file(path)?).map_err(|error| refuse(error.reason))
    }

    /// The bytes of an image file, for [`size_in`](Self::size_in) and [`decode`](Self::decode).
    ///
    /// # Errors
    ///
    /// If it cannot be read, is no file, or has over 1 GiB.
    pub fn read_file(path: &Path) -> Result<Vec<u8>, PictureError> {
        let mut bytes = Vec::new();
        // It may grow while it is read.
        let read = file(path)?.take(MOST_FILE_BYTES).read_to_end(&mut bytes);
        match read {
            Ok(_) => Ok(bytes),
            Err(error) => {
                let reason = format!("cannot read it: {error}");
                Err(PictureError { path: Some(path.to_path_buf()), reason })
            }
        }
    }

    /// The same of a file's bytes.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn decode(bytes: &[u8]) -> Result<Self, PictureError> {
        let decoded = read(Cursor::new(bytes), picture).and_then(|(picture, format)| {
            match format == ImageFormat::Jpeg && is_cut_off_jpeg(bytes) {
                true => Err("it is damaged or cut off: its end is missing".into()),
                false => Ok(picture),
            }
        });
        decoded.map_err(|reason| PictureError { path: None, reason })
    }

    /// Width and height of the picture in a file, of which little more than the header is read.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), but that a damage behind the header stays unnoticed.
    pub fn size_of(path: &Path) -> Result<[usize; 2], PictureError> {
        read(BufReader::new(file(path)?), size)
            .map_err(|reason| PictureError { path: Some(path.to_path_buf()), reason })
    }

    /// The same of a file's bytes.
    ///
    /// # Errors
    ///
    /// As [`size_of`](Self::size_of).
    pub fn size_in(bytes: &[u8]) -> Result<[usize; 2], PictureError> {
        read(Cursor::new(bytes), size).map_err(|reason| PictureError { path: None, reason })
    }
}

fn size(
    mut decoder: Box<dyn ImageDecoder + '_>,
    format: ImageFormat,
) -> Result<[usize; 2], Failure> {
    let orientation = orientation(&mut decoder, format)?;
    let (width, height) = decoder.dimensions();
    let [width, height] = [width, height].map(|side| side as usize);
    Ok(match is_turned(orientation) {
        true => [height, width],
        false => [width, height],
    })
}

fn file(path: &Path) -> Result<File, PictureError> {
    let refuse = |reason: String| PictureError { path: Some(path.to_path_buf()), reason };
    let metadata = path.metadata().map_err(|error| refuse(format!("cannot read it: {error}")))?;
    // Others may never end.
    if !metadata.is_file() {
        return Err(refuse("it is no file".into()));
    }
    if metadata.len() > MOST_FILE_BYTES {
        return Err(refuse(format!("it has over {MOST_FILE_BYTES} bytes: make it smaller")));
    }
    File::open(path).map_err(|error| refuse(format!("cannot read it: {error}")))
}

/// Whether a JPEG file has no end: the decoder fills up what is missing and says nothing.
///
/// The mark of the end does not occur in the data of a scan. What stands before the first scan, such as
/// a preview with an end of its own, is passed over by the lengths of its segments.
fn is_cut_off_jpeg(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    let mut at = 2; // behind the mark of the beginning
    loop {
        match bytes.get(at..at + 4) {
            Some([0xff, START_OF_SCAN, ..]) => break,
            // A mark may be filled up in front.
            Some([0xff, 0xff, ..]) => at += 1,
            Some(&[0xff, _, high, low]) => at += 2 + usize::from(u16::from_be_bytes([high, low])),
            Some(_) => return false, // the decoder knows better
            None => return true,
        }
    }
    !bytes[at..].windows(2).any(|pair| pair == [0xff, 0xd9])
}

fn read<R: BufRead + Seek, T>(
    source: R,
    read_it: impl FnOnce(Box<dyn ImageDecoder + '_>, ImageFormat) -> Result<T, Failure>,
) -> Result<T, String> {
    let guess = ImageReader::new(source).with_guessed_format();
    let mut reader = guess.map_err(|error| format!("cannot read it: {error}"))?;
    let format = reader.format().ok_or_else(|| format!("it is no image: expected {FORMATS}"))?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MOST_BYTES);
    reader.limits(limits);
    // The decoders are no code of this library, and the files come from anywhere.
    let attempt = catch_unwind(AssertUnwindSafe(|| {
        let decoder = reader.into_decoder()?;
        let (width, height) = decoder.dimensions();
        if width == 0 || height == 0 {
            return Ok(Err("it has no pixels".into()));
        }
        let too_many = match u64::from(width) * u64::from(height) > MOST_PIXELS {
            true => Some(format!("more than {MOST_PIXELS}")),
            false if width.max(height) > MOST_OF_A_SIDE => {
                Some(format!("more than {MOST_OF_A_SIDE} on a side"))
            }
            false => None,
        };
        if let Some(too_many) = too_many {
            let reason = format!("it has {width} x {height} pixels, {too_many}: make it smaller");
            return Ok(Err(reason));
        }
        if decoder.total_bytes() > MOST_BYTES {
            return Ok(Err(TOO_LARGE.into()));
        }
        read_it(Box::new(decoder), format).map(Ok)
    }));
    match attempt {
        Ok(Ok(done)) => done,
        Ok(Err(error)) => Err(reason_of(&error)),
        Err(_) => Err("it is damaged".into()),
    }
}

const FORMATS: &str = "PNG, JPEG, WebP, GIF, BMP or TIFF";

const TOO_LARGE: &str = "it needs too much memory: make it smaller";

/// What a decoder says, in one line.
fn reason_of(error: &Failure) -> String {
    match error {
        Failure::Unsupported(_) => format!("it is no image that can be read: {error}"),
        Failure::Limits(_) => TOO_LARGE.into(),
        error => format!("it is damaged or cut off: {error}"),
    }
    .replace('\n', " ")
}

fn picture(
    mut decoder: Box<dyn ImageDecoder + '_>,
    format: ImageFormat,
) -> Result<(Picture, ImageFormat), Failure> {
    let orientation = orientation(&mut decoder, format)?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    let (width, height) = (image.width() as usize, image.height() as usize);
    let values = eight_bits(image);
    Ok((Picture::new(width, height, values).expect("three values for each pixel"), format))
}

/// Pillow turns the pictures of TIFF files when it opens them, and no others.
fn orientation(
    decoder: &mut Box<dyn ImageDecoder + '_>,
    format: ImageFormat,
) -> Result<Orientation, Failure> {
    match format {
        ImageFormat::Tiff => decoder.orientation(),
        _ => Ok(Orientation::NoTransforms),
    }
}

fn is_turned(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

/// Red, green and blue in eight bits each.
fn eight_bits(image: DynamicImage) -> Vec<u8> {
    let upper = |values: Vec<u16>| values.into_iter().map(|value| (value >> 8) as u8).collect();
    match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageLuma16(_)
        | DynamicImage::ImageLumaA16(_)
        | DynamicImage::ImageRgb16(_)
        | DynamicImage::ImageRgba16(_) => upper(image.into_rgb16().into_raw()),
        image => image.into_rgb8().into_raw(),
    }
}
