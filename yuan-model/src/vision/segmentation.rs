//! How an image is cut into tiles: as many, and in such a grid, as its shape and size ask for.

/// Columns and rows of tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileGrid {
    /// Tiles beside each other.
    pub columns: usize,
    /// Tiles above each other.
    pub rows: usize,
}

impl TileGrid {
    /// The grid of an image of `width` × `height` pixels in tiles of `tile` × `tile`, at most `most`
    /// of them: the one of the closest shape that is not more than twice as large, and of two that
    /// are equally close the larger one, if the image has more than half of its pixels.
    ///
    /// The rules are upstream's with their quirks: the growth of the larger one is not looked at.
    ///
    /// ```
    /// use yuan_model::vision::TileGrid;
    ///
    /// let page = TileGrid::of(1240, 1754, 448, 9);
    /// assert_eq!((page.columns, page.rows), (2, 3));
    /// assert_eq!(page.tiles(), 7); // and the whole page once more
    /// ```
    pub fn of(width: usize, height: usize, tile: usize, most: usize) -> Self {
        let mut candidates: Vec<Self> = (1..=most)
            .flat_map(|columns| (1..=most / columns).map(move |rows| Self { columns, rows }))
            .collect();
        candidates.sort_by_key(|grid| grid.columns * grid.rows);
        let (w, h, t) = (width as f64, height as f64, tile as f64);
        let (mut best, mut closest) = (Self { columns: 1, rows: 1 }, f64::INFINITY);
        for grid in candidates {
            let (c, r) = (grid.columns as f64, grid.rows as f64);
            let difference = (w / h - c / r).abs();
            let growth = (t * (c + r) - (w + h)).abs() / (w + h);
            if difference < closest && growth <= 1.0 {
                (best, closest) = (grid, difference);
            } else if difference == closest && w * h > 0.5 * t * t * c * r {
                best = grid;
            }
        }
        best
    }

    /// Tiles, with the whole image as the last one if there are several.
    pub fn tiles(&self) -> usize {
        match self.columns * self.rows {
            1 => 1,
            tiles => tiles + 1,
        }
    }
}
