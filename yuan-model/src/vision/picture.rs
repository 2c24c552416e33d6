//! Pictures as the tower wants them: resized as Pillow does it, cut into tiles, normalised.

use super::{TileGrid, cubic::cubic};

/// A picture of red, green and blue values, row by row.
///
/// ```
/// use yuan_model::vision::Picture;
///
/// let grey = Picture::new(6, 4, vec![128; 6 * 4 * 3]).expect("three values a pixel");
/// let smaller = grey.resized(3, 2);
/// assert_eq!((smaller.width(), smaller.height()), (3, 2));
/// assert!(smaller.values().iter().all(|&value| value == 128));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    values: Vec<u8>,
}

/// Mean and deviation of the values of each channel, scaled to [0, 1], that the tower was trained with.
pub const NORMALISATION: [[f32; 3]; 2] = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]];

impl Picture {
    /// A picture of `3 · width · height` values; none if there are others, or no pixel.
    pub fn new(width: usize, height: usize, values: Vec<u8>) -> Option<Self> {
        let expected = width.checked_mul(height)?.checked_mul(3)?;
        (expected > 0 && values.len() == expected).then_some(Self { width, height, values })
    }

    /// Pixels of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Values, `[height, width, 3]`.
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// The picture in another size, by Pillow's bicubic filter (a = −0.5, as wide as what becomes one
    /// pixel), in its fixed-point arithmetic: the same values.
    ///
    /// # Panics
    ///
    /// If a side is to be zero.
    #[must_use]
    pub fn resized(&self, width: usize, height: usize) -> Self {
        assert!(width > 0 && height > 0, "{width} x {height} pixels are no picture");
        // The values between the two passes are rounded, so their order matters. This is the order of
        // Pillow 13, found by comparing its results for thousands of sizes with both orders.
        let lost_columns = self.width.saturating_sub(width);
        let rows_first = self.height.saturating_sub(height) > 2 * lost_columns;
        if rows_first {
            self.with_height(height).with_width(width)
        } else {
            self.with_width(width).with_height(height)
        }
    }

    fn with_width(&self, width: usize) -> Self {
        if width == self.width {
            return self.clone();
        }
        let filter = Filter::new(self.width, width);
        let mut values = vec![0; 3 * width * self.height];
        let rows = values.chunks_exact_mut(3 * width).zip(self.values.chunks_exact(3 * self.width));
        rows.for_each(|(new, row)| filter.within_row(row, new));
        Self { width, height: self.height, values }
    }

    fn with_height(&self, height: usize) -> Self {
        if height == self.height {
            return self.clone();
        }
        let values = Filter::new(self.height, height).over_rows(&self.values, 3 * self.width);
        Self { width: self.width, height, values }
    }

    /// A part of it.
    fn part(&self, left: usize, top: usize, width: usize, height: usize) -> Self {
        let rows = (top..top + height).flat_map(|row| {
            let start = (row * self.width + left) * 3;
            self.values[start..start + width * 3].iter().copied()
        });
        Self { width, height, values: rows.collect() }
    }

    /// Its tiles of `side` × `side` pixels, at most `most` of them: row by row, and, if there are
    /// several, the whole picture once more.
    #[must_use]
    pub fn tiles(&self, side: usize, most: usize) -> Vec<Self> {
        let grid = TileGrid::of(self.width, self.height, side, most);
        let resized = self.resized(side * grid.columns, side * grid.rows);
        let places =
            (0..grid.rows).flat_map(|row| (0..grid.columns).map(move |column| (column, row)));
        let mut tiles: Vec<Self> = places
            .map(|(column, row)| resized.part(column * side, row * side, side, side))
            .collect();
        if tiles.len() > 1 {
            tiles.push(self.resized(side, side));
        }
        tiles
    }

    /// Values scaled to [0, 1] and [normalised](NORMALISATION), `[3, height, width]`.
    pub fn normalised(&self) -> Vec<f32> {
        let [mean, deviation] = NORMALISATION;
        let (pixels, _) = self.values.as_chunks::<3>();
        let mut normalised = Vec::with_capacity(self.values.len());
        for channel in 0..3 {
            let normal =
                |value: u8| (f32::from(value) / 255.0 - mean[channel]) / deviation[channel];
            let table: [f32; 256] = std::array::from_fn(|value| normal(value as u8));
            normalised.extend(pixels.iter().map(|pixel| table[usize::from(pixel[channel])]));
        }
        normalised
    }
}

/// What every new value is made from: neighbouring old ones and their weights.
struct Filter {
    /// First old value and weights in fixed point, for each new value. They and their products with
    /// values fit 32 bits, as in Pillow.
    parts: Vec<(usize, Vec<i32>)>,
}

/// Bits behind the point of Pillow's weights for 8-bit values.
const PRECISION: u32 = 22;

impl Filter {
    fn new(from: usize, to: usize) -> Self {
        /// Pillow's parameter of the kernel, and how far the kernel reaches.
        const A: f64 = -0.5;
        const SUPPORT: f64 = 2.0;
        let scale = from as f64 / to as f64;
        let width = scale.max(1.0);
        let support = SUPPORT * width;
        let part = |place: usize| {
            let center = (place as f64 + 0.5) * scale;
            // Towards zero, as C cuts numbers off.
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let mut weights: Vec<f64> =
                (first..end).map(|index| cubic(A, (index as f64 - center + 0.5) / width)).collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            let fixed = |weight: f64| {
                let scaled = weight * f64::from(1 << PRECISION);
                (if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
            };
            (first, weights.into_iter().map(fixed).collect())
        };
        Self { parts: (0..to).map(part).collect() }
    }

    /// The pixels of a row from those of another one.
    fn within_row(&self, old: &[u8], new: &mut [u8]) {
        let (old, _) = old.as_chunks::<3>();
        let (new, _) = new.as_chunks_mut::<3>();
        for (pixel, (first, weights)) in new.iter_mut().zip(&self.parts) {
            let mut sums = [HALF; 3];
            for (old, weight) in old[*first..].iter().zip(weights) {
                for channel in 0..3 {
                    sums[channel] += i32::from(old[channel]) * weight;
                }
            }
            *pixel = sums.map(rounded);
        }
    }

    /// Rows of `width` values from other rows, all columns at once.
    fn over_rows(&self, old: &[u8], width: usize) -> Vec<u8> {
        let mut new = Vec::with_capacity(self.parts.len() * width);
        let mut sums = vec![0; width];
        for (first, weights) in &self.parts {
            sums.fill(HALF);
            for (row, weight) in old[first * width..].chunks_exact(width).zip(weights) {
                for (sum, &value) in sums.iter_mut().zip(row) {
                    *sum += i32::from(value) * weight;
                }
            }
            new.extend(sums.iter().copied().map(rounded));
        }
        new
    }
}

/// One half in fixed point, with which sums begin in order to be rounded.
const HALF: i32 = 1 << (PRECISION - 1);

fn rounded(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}
