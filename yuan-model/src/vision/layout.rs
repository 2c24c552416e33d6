//! How images and text share a sequence of tokens.

use serde::{Deserialize, Serialize};

use super::{Picture, TileGrid};
use crate::{ModelError, YuanConfig, masks::ImageMarkers};

/// How images become tiles, tiles rows of a model, and rows places among the tokens of a text.
///
/// A question about images is written as upstream writes it: a begin marker, for each image a marker,
/// placeholders and another marker, then the question and a separator; the answer follows.
///
/// ```
/// use yuan_model::{YuanConfig, vision::{ImageConfig, ImageLayout}};
///
/// let config = YuanConfig { images: Some(ImageConfig::tiny(3)), ..YuanConfig::tiny(96) };
/// let ids = |token: &str| match token {
///     "<BOS>" => Some(1),
///     "<eod>" => Some(2),
///     "<|Assistant|>" => Some(4),
///     "<IMAGE>" => Some(5),
///     "</IMAGE>" => Some(6),
///     _ => None,
/// };
/// let layout = ImageLayout::of(&config, ids)?;
/// // One image of a single tile is four rows of this model.
/// let rows = layout.rows_of(&[[28, 28]]);
/// assert_eq!(rows, [4]);
/// assert_eq!(layout.question(&rows, &[40, 41]), [1, 5, 3, 3, 3, 3, 6, 40, 41, 4]);
/// # Ok::<(), yuan_model::ModelError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayout {
    /// Pixels of a tile's side.
    pub side: usize,
    /// Rows of the model that a tile becomes.
    pub rows_per_tile: usize,
    /// Tiles of a single image at most.
    pub max_tiles: usize,
    /// The tokens around images and texts.
    pub markers: ImageMarkers,
}

impl ImageLayout {
    /// Texts of the tokens that it needs: begin of a document, placeholder, separator before an answer,
    /// begin and end of an image.
    pub const TOKENS: [&'static str; 5] =
        ["<BOS>", "<pad>", "<|Assistant|>", "<IMAGE>", "</IMAGE>"];

    /// That of a model whose tokens have these ids.
    ///
    /// # Errors
    ///
    /// If the model sees no images, or the tokenizer lacks one of the tokens.
    pub fn of(config: &YuanConfig, id: impl Fn(&str) -> Option<u32>) -> Result<Self, ModelError> {
        let images = config.images.as_ref().ok_or(ModelError::SeesNoImages)?;
        let [begin, _, separator, image_start, image_end] = Self::TOKENS;
        let known = |known: Option<u32>, token: &'static str| {
            known.or_else(|| id(token)).ok_or(ModelError::NoToken(token))
        };
        let layout = Self {
            side: images.tower.image_size,
            rows_per_tile: images.tower.tokens_per_tile(),
            max_tiles: images.max_tiles,
            markers: ImageMarkers {
                // Published configurations name the end of a document as the begin of a sequence.
                bos: known(None, begin)?,
                eod: known(config.tokens.eod, "<eod>")?,
                pad: images.placeholder,
                sep: known(config.tokens.sep, separator)?,
                image_start: known(None, image_start)?,
                image_end: known(None, image_end)?,
            },
        };
        let markers = layout.markers();
        let twice = (1..markers.len()).find(|&at| markers[..at].contains(&markers[at]));
        match twice {
            Some(at) => Err(ModelError::MarkersAlike(markers[at])),
            None => Ok(layout),
        }
    }

    /// Tiles that each of so many images is cut into at most: upstream cuts one image finer than each
    /// of several.
    pub fn most_tiles(&self, images: usize) -> usize {
        const OF_SEVERAL: usize = 4;
        match images {
            0 | 1 => self.max_tiles,
            _ => self.max_tiles.min(OF_SEVERAL),
        }
    }

    /// The tiles of one of so many images of a text.
    pub fn tiles(&self, picture: &Picture, images: usize) -> Vec<Picture> {
        picture.tiles(self.side, self.most_tiles(images))
    }

    /// Rows that each of the images of one text becomes, by their widths and heights.
    pub fn rows_of(&self, sizes: &[[usize; 2]]) -> Vec<usize> {
        let most = self.most_tiles(sizes.len());
        let rows = |&[width, height]: &[usize; 2]| {
            TileGrid::of(width, height, self.side, most).tiles() * self.rows_per_tile
        };
        sizes.iter().map(rows).collect()
    }

    /// What stands before a question about images that become so many rows each.
    pub fn opening(&self, rows: &[usize]) -> Vec<u32> {
        let mut tokens = vec![self.markers.bos];
        rows.iter().for_each(|&rows| self.push_image(&mut tokens, rows));
        tokens
    }

    /// A whole question, ready for the answer; a marker in its text is left out.
    pub fn question(&self, rows: &[usize], text: &[u32]) -> Vec<u32> {
        let mut tokens = self.opening(rows);
        tokens.extend(text.iter().filter(|&&token| !self.is_marker(token)));
        tokens.push(self.markers.sep);
        tokens
    }

    /// Whether a token is one of the markers, which a text must not have.
    pub fn is_marker(&self, token: u32) -> bool {
        self.markers().contains(&token)
    }

    /// All markers.
    pub fn markers(&self) -> [u32; 6] {
        let ImageMarkers { bos, eod, pad, sep, image_start, image_end } = self.markers;
        [bos, eod, pad, sep, image_start, image_end]
    }

    /// Makes room for the rows of images in tokens where images are only marked, as a chat template
    /// writes them: by the two markers with nothing or any placeholders between them, or by
    /// placeholders alone.
    ///
    /// # Errors
    ///
    /// If there are not as many marks as images.
    pub fn with_room(&self, tokens: &[u32], rows: &[usize]) -> Result<Vec<u32>, ModelError> {
        let ImageMarkers { pad, image_start, image_end, .. } = self.markers;
        let (mut out, mut marks, mut at) = (Vec::with_capacity(tokens.len()), 0, 0);
        while let Some(&token) = tokens.get(at) {
            if token != image_start && token != pad {
                out.push(token);
                at += 1;
                continue;
            }
            at += usize::from(token == image_start);
            at += tokens[at..].iter().take_while(|&&token| token == pad).count();
            at += usize::from(token == image_start && tokens.get(at) == Some(&image_end));
            if let Some(&rows) = rows.get(marks) {
                self.push_image(&mut out, rows);
            }
            marks += 1;
        }
        match marks == rows.len() {
            true => Ok(out),
            false => Err(ModelError::ImageMarks { marks, images: rows.len() }),
        }
    }

    fn push_image(&self, tokens: &mut Vec<u32>, rows: usize) {
        tokens.push(self.markers.image_start);
        tokens.extend(std::iter::repeat_n(self.markers.pad, rows));
        tokens.push(self.markers.image_end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::ImageConfig;

    fn layout() -> ImageLayout {
        let config = YuanConfig { images: Some(ImageConfig::tiny(3)), ..YuanConfig::tiny(96) };
        let names = ["<eod>", "<BOS>", "-", "<pad>", "<|Assistant|>", "<IMAGE>", "</IMAGE>"];
        let id = |token: &str| names.iter().position(|name| *name == token).map(|id| id as u32);
        ImageLayout::of(&config, id).unwrap()
    }

    #[test]
    fn room_is_made_wherever_a_template_marks_an_image() {
        let layout = layout();
        let image = |rows: usize| [vec![5], vec![3; rows], vec![6]].concat();
        let expected = [vec![1], image(4), vec![50], image(8), vec![51, 4]].concat();
        for marked in [
            &[1, 5, 6, 50, 5, 6, 51, 4][..],
            &[1, 5, 3, 6, 50, 5, 3, 3, 6, 51, 4],
            &[1, 3, 50, 3, 3, 51, 4],
        ] {
            assert_eq!(layout.with_room(marked, &[4, 8]).unwrap(), expected);
        }
        let error = layout.with_room(&[1, 50, 4], &[4]).unwrap_err().to_string();
        assert_eq!(error, "the text marks 0 images, but 1 are given");
        assert!(layout.with_room(&[5, 6, 5, 6], &[4]).is_err());
    }

    #[test]
    fn one_token_does_not_mark_two_things() {
        let config = YuanConfig { images: Some(ImageConfig::tiny(5)), ..YuanConfig::tiny(96) };
        let names = ["<eod>", "<BOS>", "-", "<pad>", "<|Assistant|>", "<IMAGE>", "</IMAGE>"];
        let id = |token: &str| names.iter().position(|name| *name == token).map(|id| id as u32);
        let error = ImageLayout::of(&config, id).unwrap_err().to_string();
        assert!(error.starts_with("token 5 has two meanings in texts with images"), "{error}");
    }

    #[test]
    fn several_images_have_fewer_tiles_each() {
        let layout = layout();
        assert_eq!(layout.rows_of(&[[84, 84]]), [40]);
        assert_eq!(layout.rows_of(&[[84, 84], [28, 28]]), [20, 4]);
    }

    #[test]
    fn a_missing_token_is_named() {
        let config = YuanConfig { images: Some(ImageConfig::tiny(3)), ..YuanConfig::tiny(96) };
        let error = ImageLayout::of(&config, |_| None).unwrap_err().to_string();
        assert_eq!(error, "the tokenizer has no <BOS> token, which texts with images need");
    }
}
