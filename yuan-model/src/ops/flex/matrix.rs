//! Products of matrices that lie anywhere in memory, written where they belong: nothing is copied.

#![allow(unsafe_code, reason = "the products take pointers")]

use std::ops::Range;

use super::Float;

/// A matrix somewhere in a tensor's memory.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Values from one row to the next, and from one column to the next.
    strides: [isize; 2],
}

impl<'a> Matrix<'a> {
    /// The last two dimensions of a tensor at these indices of the ones before.
    pub(super) fn of<const N: usize>(tensor: &'a Float, outer: [usize; N]) -> Self {
        let (layout, values) = (tensor.layout(), tensor.storage::<f32>());
        let (shape, strides) = (layout.shape(), layout.strides());
        assert_eq!(shape.num_dims(), N + 2, "an index for every outer dimension");
        let offset: isize =
            outer.iter().zip(strides).map(|(&index, stride)| index as isize * stride).sum();
        let start = layout.start_offset() as isize + offset;
        Self {
            values: &values[usize::try_from(start).expect("offsets are positive")..],
            rows: shape[N],
            columns: shape[N + 1],
            strides: [strides[N], strides[N + 1]],
        }
    }

    /// Rows that follow each other, `width` values each.
    pub(super) fn dense(values: &'a [f32], width: usize) -> Self {
        Self {
            values,
            rows: values.len() / width.max(1),
            columns: width,
            strides: [width as isize, 1],
        }
    }

    /// Rows of `columns` values that begin `pitch` values apart.
    pub(super) fn strided(values: &'a [f32], rows: usize, columns: usize, pitch: usize) -> Self {
        Self { values, rows, columns, strides: [pitch as isize, 1] }
    }

    /// Some neighbouring rows.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        let from = rows.start * usize::try_from(self.strides[0]).expect("strides are positive");
        Self { values: &self.values[from.min(self.values.len())..], rows: rows.len(), ..self }
    }

    /// The values of a row, where they follow each other.
    pub(super) fn row(&self, row: usize) -> Option<&'a [f32]> {
        let start = row * usize::try_from(self.strides[0]).expect("strides are positive");
        (self.strides[1] == 1 || self.columns == 1)
            .then(|| &self.values[start..start + self.columns])
    }

    pub(super) fn transposed(self) -> Self {
        let [row, column] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [column, row], ..self }
    }

    /// `self · right`, row by row.
    pub(super) fn product(self, right: Matrix) -> Vec<f32> {
        let count = self.rows * right.columns;
        if self.columns == 0 {
            return vec![0.0; count];
        }
        let mut out = Vec::with_capacity(count);
        // SAFETY: the product writes all these elements, for which there is room, and reads none.
        unsafe {
            multiply_to(out.as_mut_ptr(), count, self, right, false);
            out.set_len(count);
        }
        out
    }

    /// `out = self · right`, row by row.
    pub(super) fn times(self, right: Matrix, out: &mut [f32]) {
        multiply(out, self, right, false);
    }

    /// `out += self · right`, row by row.
    pub(super) fn add_times(self, right: Matrix, out: &mut [f32]) {
        multiply(out, self, right, true);
    }

    /// Values up to the last one, if the strides are as they should be.
    fn extent(&self) -> usize {
        let [row, column] =
            self.strides.map(|stride| usize::try_from(stride).expect("strides are positive"));
        match (self.rows, self.columns) {
            (0, _) | (_, 0) => 0,
            (rows, columns) => (rows - 1) * row + (columns - 1) * column + 1,
        }
    }
}

/// Products of so many multiplications use all cores by themselves.
const PARALLEL: usize = 192 * 192 * 192;

fn multiply(out: &mut [f32], left: Matrix, right: Matrix, add: bool) {
    // SAFETY: the elements are those of a slice.
    unsafe { multiply_to(out.as_mut_ptr(), out.len(), left, right, add) }
}

/// Writes a product, or adds it to what is there.
///
/// # Safety
///
/// `out` must have room for `count` elements, and hold them if the product is added.
unsafe fn multiply_to(out: *mut f32, count: usize, left: Matrix, right: Matrix, add: bool) {
    let (m, k, n) = (left.rows, left.columns, right.columns);
    assert!(k == right.rows && count == m * n, "shapes of a product");
    assert!(
        left.extent() <= left.values.len() && right.extent() <= right.values.len(),
        "operands in memory"
    );
    let parallelism =
        if m * n * k >= PARALLEL { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    let ([left_row, left_column], [right_row, right_column]) = (left.strides, right.strides);
    // SAFETY: both operands lie within their slices, as checked above, and the caller vouches for the
    // result.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            n as isize,
            add,
            left.values.as_ptr(),
            left_column,
            left_row,
            right.values.as_ptr(),
            right_column,
            right_row,
            f32::from(u8::from(add)),
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_strided_matrices_are_those_of_the_definition() {
        let values: Vec<f32> = (0..120).map(|i| (i * 7 % 13) as f32 - 6.0).collect();
        let at = |x: &Matrix, row: usize, column: usize| {
            x.values[row * x.strides[0] as usize + column * x.strides[1] as usize]
        };
        let wide = Matrix::dense(&values, 12);
        for (left, right) in [
            (wide.rows(1..4), wide.transposed()),
            (wide.transposed(), wide.rows(0..10)),
            (wide.rows(2..2), wide.transposed()),
            (wide.rows(3..5).transposed(), wide.rows(7..9)),
        ] {
            let mut out = vec![0.5; left.rows * right.columns];
            let mut expected = Vec::new();
            for row in 0..left.rows {
                for column in 0..right.columns {
                    expected.push(
                        (0..left.columns)
                            .map(|k| at(&left, row, k) * at(&right, k, column))
                            .sum::<f32>(),
                    );
                }
            }
            left.add_times(right, &mut out);
            assert!(out.iter().zip(&expected).all(|(out, expected)| *out == expected + 0.5));
            left.times(right, &mut out);
            assert_eq!(out, expected);
        }
    }

    #[test]
    #[should_panic(expected = "operands in memory")]
    fn an_operand_that_ends_too_early_is_refused() {
        let values = vec![1.0; 10];
        let short = Matrix { rows: 3, ..Matrix::dense(&values, 5) };
        short.times(Matrix::dense(&values, 2), &mut [0.0; 6]);
    }
}
