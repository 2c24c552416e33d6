//! Image files that a text is about.

use std::path::PathBuf;

use yuan::model::vision::{ImageLayout, Picture, PictureError};

/// The tiles of images, and how many rows each image becomes.
pub struct Images {
    pub tiles: Vec<Picture>,
    pub rows: Vec<usize>,
}

impl Images {
    /// Reads and cuts the images of one text.
    pub fn open(files: &[PathBuf], layout: &ImageLayout) -> Result<Self, PictureError> {
        let (mut tiles, mut sizes) = (Vec::new(), Vec::new());
        for path in files {
            let picture = Picture::open(path)?;
            sizes.push([picture.width(), picture.height()]);
            tiles.extend(layout.tiles(&picture, files.len()));
        }
        Ok(Self { tiles, rows: layout.rows_of(&sizes) })
    }
}
