//! From stored bytes to parameters and back: types, transposes and stacks, one tensor at a time.

use burn::tensor::{DType, Element, FloatDType, Shape, TensorData, bf16, f16};
use rayon::prelude::*;

use super::{ParameterSource, TensorLayout};
use crate::storage::{Dtype, TensorBytes, float_dtype, stored_dtype};

/// A floating-point type as it is stored: little-endian.
trait Float: Element + Copy + Default + Send + Sync + 'static {
    /// An array of its bytes.
    type Bytes: Copy + Default + Send + Sync;
    fn chunks(bytes: &[u8]) -> &[Self::Bytes];
    fn read(bytes: Self::Bytes) -> Self;
    fn bytes(self) -> Self::Bytes;
    fn flatten(values: Vec<Self::Bytes>) -> Vec<u8>;
    fn to(self) -> f32;
    fn of(value: f32) -> Self;
}

macro_rules! float {
    ($type:ty, $size:literal, $to:expr, $of:expr) => {
        impl Float for $type {
            type Bytes = [u8; $size];
            fn chunks(bytes: &[u8]) -> &[Self::Bytes] {
                bytes.as_chunks().0
            }
            #[inline(always)]
            fn read(bytes: Self::Bytes) -> Self {
                Self::from_le_bytes(bytes)
            }
            #[inline(always)]
            fn bytes(self) -> Self::Bytes {
                self.to_le_bytes()
            }
            fn flatten(values: Vec<Self::Bytes>) -> Vec<u8> {
                values.into_flattened()
            }
            #[inline(always)]
            fn to(self) -> f32 {
                $to(self)
            }
            #[inline(always)]
            fn of(value: f32) -> Self {
                $of(value)
            }
        }
    };
}

float!(f32, 4, |x: f32| x, |x: f32| x);
float!(f16, 2, f16::to_f32, f16::from_f32);
float!(bf16, 2, bf16::to_f32, bf16::from_f32);

/// One value in another type; exact where the type stays, which a detour over f32 would not promise
/// for NaNs.
#[inline(always)]
fn convert<S: Float, D: Float>(value: S) -> D {
    match (&value as &dyn std::any::Any).downcast_ref::<D>() {
        Some(same) => *same,
        None => D::of(value.to()),
    }
}

/// Calls a generic function with the Rust types of two dtypes.
macro_rules! with_types {
    ($from:expr, $to:expr, $function:ident($($argument:expr),*)) => {
        match ($from, $to) {
            (FloatDType::F32, FloatDType::F32) => $function::<f32, f32>($($argument),*),
            (FloatDType::F32, FloatDType::F16) => $function::<f32, f16>($($argument),*),
            (FloatDType::F32, FloatDType::BF16) => $function::<f32, bf16>($($argument),*),
            (FloatDType::F16, FloatDType::F32) => $function::<f16, f32>($($argument),*),
            (FloatDType::F16, FloatDType::F16) => $function::<f16, f16>($($argument),*),
            (FloatDType::F16, FloatDType::BF16) => $function::<f16, bf16>($($argument),*),
            (FloatDType::BF16, FloatDType::F32) => $function::<bf16, f32>($($argument),*),
            (FloatDType::BF16, FloatDType::F16) => $function::<bf16, f16>($($argument),*),
            (FloatDType::BF16, FloatDType::BF16) => $function::<bf16, bf16>($($argument),*),
            (from, to) => unreachable!("{from:?} to {to:?}: only F32, F16 and BF16 come here"),
        }
    };
}

/// Stored bytes of a tensor, and the type of its elements.
pub struct Piece<B> {
    /// F32, F16 or BF16.
    pub dtype: Dtype,
    /// Row-major, little-endian.
    pub bytes: B,
}

impl ParameterSource {
    /// Makes the parameter from its tensors, which `read` hands over by name, one at a time.
    ///
    /// Every tensor goes straight to its place, so that no more than the parameter and one tensor
    /// is in memory.
    ///
    /// # Errors
    ///
    /// What `read` returns.
    ///
    /// # Panics
    ///
    /// If a tensor has another size than [`shape`](Self::shape) or is not of a floating-point type
    /// above.
    pub fn assemble<B: AsRef<[u8]>, E>(
        &self,
        dtype: FloatDType,
        read: impl FnMut(&str) -> Result<Piece<B>, E>,
    ) -> Result<TensorData, E> {
        match dtype {
            FloatDType::F16 => assemble::<f16, B, E>(self, read),
            FloatDType::BF16 => assemble::<bf16, B, E>(self, read),
            _ => assemble::<f32, B, E>(self, read),
        }
    }

    /// Bytes of one tensor as it is stored, from the parameter or, of a stack, from one slice of
    /// it.
    ///
    /// # Panics
    ///
    /// If the data is not the parameter's, or the source takes only some [`rows`](Self::rows).
    pub fn disassemble(&self, data: TensorData, dtype: FloatDType) -> TensorBytes {
        assert!(self.rows.is_none(), "{}: stored as a whole", self.path);
        assert_eq!(
            data.num_elements(),
            self.shape.iter().product::<usize>(),
            "{}: elements",
            self.path
        );
        let from = stored_float(data.dtype())
            .unwrap_or_else(|| panic!("{} is {:?}", self.path, data.dtype()));
        let part = data.as_bytes();
        TensorBytes::Owned(match self.layout {
            TensorLayout::Same if from == dtype => return TensorBytes::Data(data),
            TensorLayout::Same => convert_bytes(part, from, dtype),
            TensorLayout::Transposed | TensorLayout::StackedTransposed => {
                with_types!(from, dtype, transposed_bytes(part, self.columns(), self.shape[0]))
            }
            TensorLayout::Taps => {
                with_types!(from, dtype, taps_bytes(part, self.shape[0], self.shape[1]))
            }
        })
    }
}

/// Whether a finite value becomes infinite in another type.
pub(super) fn overflows(bytes: &[u8], from: FloatDType, to: FloatDType) -> bool {
    // The smallest number that is rounded to infinity: half a step above the largest.
    let limit = match to {
        FloatDType::F16 => 65520.0,
        FloatDType::BF16 => f32::from_bits(0x7f7f_8000),
        _ => return false,
    };
    fn any<S: Float>(bytes: &[u8], limit: f32) -> bool {
        S::chunks(bytes).par_chunks(1 << 16).any(|values| {
            let is_too_large = |value: f32| value.is_finite() && value.abs() >= limit;
            values.iter().any(|&value| is_too_large(S::read(value).to()))
        })
    }
    match from {
        FloatDType::F16 => false,
        FloatDType::BF16 => to == FloatDType::F16 && any::<bf16>(bytes, limit),
        _ => any::<f32>(bytes, limit),
    }
}

/// The type of a parameter as one that is stored.
pub(crate) fn stored_float(dtype: DType) -> Option<FloatDType> {
    stored_dtype(dtype).and_then(float_dtype)
}

fn assemble<D: Float, B: AsRef<[u8]>, E>(
    source: &ParameterSource,
    mut read: impl FnMut(&str) -> Result<Piece<B>, E>,
) -> Result<TensorData, E> {
    let shape = source.parameter_shape();
    let elements: usize = shape.iter().product();
    let mut values = vec![D::default(); elements];
    let per_tensor = elements / source.names.len().max(1);
    for (name, out) in source.names.iter().zip(values.chunks_mut(per_tensor.max(1))) {
        let Piece { dtype: stored, bytes } = read(name)?;
        let from = float_dtype(stored).unwrap_or_else(|| panic!("`{name}` is {stored:?}"));
        let (bytes, expected) =
            (bytes.as_ref(), source.shape.iter().product::<usize>() * DType::from(from).size());
        assert_eq!(bytes.len(), expected, "`{name}`: bytes");
        let selected;
        let (bytes, rows) = match &source.rows {
            None => (bytes, source.shape[0]),
            Some(rows) => {
                selected = select_rows(bytes, expected / source.shape[0].max(1), rows);
                (selected.as_slice(), rows.len())
            }
        };
        let columns = source.columns();
        match from {
            FloatDType::F16 => place::<f16, D>(source.layout, bytes, rows, columns, out),
            FloatDType::BF16 => place::<bf16, D>(source.layout, bytes, rows, columns, out),
            _ => place::<f32, D>(source.layout, bytes, rows, columns, out),
        }
    }
    Ok(TensorData::new(values, Shape::from(shape)))
}

/// The listed rows of a row-major matrix, whose rows have `width` bytes.
pub(super) fn select_rows(bytes: &[u8], width: usize, rows: &[usize]) -> Vec<u8> {
    rows.iter().map(|row| &bytes[row * width..(row + 1) * width]).collect::<Vec<_>>().concat()
}

/// Puts one stored tensor, whose elements are of type `S`, where it belongs.
fn place<S: Float, D: Float>(
    layout: TensorLayout,
    bytes: &[u8],
    rows: usize,
    columns: usize,
    out: &mut [D],
) {
    let source = S::chunks(bytes);
    let read = |i: usize| convert::<S, D>(S::read(source[i]));
    match layout {
        TensorLayout::Same => copy::<S, D>(bytes, out),
        TensorLayout::Transposed | TensorLayout::StackedTransposed => {
            transpose(source, rows, columns, out, |bytes| convert::<S, D>(S::read(bytes)));
        }
        TensorLayout::Taps => {
            out.par_chunks_mut((2 * rows).max(1)).enumerate().for_each(|(i, out)| {
                for (column, value) in out.iter_mut().enumerate() {
                    *value = read(((column % rows) * columns + i) * 2 + column / rows);
                }
            });
        }
    }
}

/// `[rows, columns]` → `[columns, rows]`.
///
/// Through square tiles in the first cache: every line of memory is read and written once, also
/// where rows lie a power of two apart and would push each other out of the cache.
pub(super) fn transpose<A: Copy + Sync, T: Copy + Default + Send>(
    source: &[A],
    rows: usize,
    columns: usize,
    out: &mut [T],
    convert: impl Fn(A) -> T + Sync,
) {
    const TILE: usize = 16;
    out.par_chunks_mut((TILE * rows).max(1)).enumerate().for_each(|(strip, out)| {
        let (first, wide) = (strip * TILE, out.len() / rows.max(1));
        let mut tile = [[T::default(); TILE]; TILE];
        for top in (0..rows).step_by(TILE) {
            let high = TILE.min(rows - top);
            for (line, row) in tile[..high].iter_mut().zip(top..) {
                let source = &source[row * columns + first..][..wide];
                match source.first_chunk::<TILE>() {
                    Some(whole) => *line = whole.map(&convert),
                    None => line
                        .iter_mut()
                        .zip(source)
                        .for_each(|(value, &source)| *value = convert(source)),
                }
            }
            for column in 0..wide {
                let line = &mut out[column * rows + top..][..high];
                match line.first_chunk_mut::<TILE>() {
                    Some(whole) => (0..TILE).for_each(|row| whole[row] = tile[row][column]),
                    None => {
                        line.iter_mut().zip(&tile).for_each(|(value, row)| *value = row[column]);
                    }
                }
            }
        }
    });
}

fn copy<S: Float, D: Float>(bytes: &[u8], out: &mut [D]) {
    const RUN: usize = 1 << 14;
    out.par_chunks_mut(RUN).zip(S::chunks(bytes).par_chunks(RUN)).for_each(|(out, bytes)| {
        out.iter_mut().zip(bytes).for_each(|(value, &bytes)| *value = convert(S::read(bytes)));
    });
}

/// Stored elements in another type.
pub(super) fn convert_bytes(bytes: &[u8], from: FloatDType, to: FloatDType) -> Vec<u8> {
    fn typed<S: Float, D: Float>(bytes: &[u8]) -> Vec<u8> {
        let source = S::chunks(bytes);
        let mut out = vec![D::Bytes::default(); source.len()];
        out.par_chunks_mut(1 << 14).zip(source.par_chunks(1 << 14)).for_each(|(out, bytes)| {
            out.iter_mut()
                .zip(bytes)
                .for_each(|(out, &bytes)| *out = convert::<S, D>(S::read(bytes)).bytes());
        });
        D::flatten(out)
    }
    if from == to { bytes.to_vec() } else { with_types!(from, to, typed(bytes)) }
}

/// A `[rows, columns]` matrix as the bytes of its transpose.
fn transposed_bytes<S: Float, D: Float>(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let mut out = vec![D::Bytes::default(); rows * columns];
    transpose(S::chunks(bytes), rows, columns, &mut out, |bytes| {
        convert::<S, D>(S::read(bytes)).bytes()
    });
    D::flatten(out)
}

/// `[in, 2 · out]` as the bytes of `[out, in, 2, 1]`.
fn taps_bytes<S: Float, D: Float>(bytes: &[u8], out: usize, d_in: usize) -> Vec<u8> {
    let source = S::chunks(bytes);
    let read = |i: usize| convert::<S, D>(S::read(source[i])).bytes();
    let mut values = vec![D::Bytes::default(); 2 * out * d_in];
    values.par_chunks_mut((2 * d_in).max(1)).enumerate().for_each(|(row, values)| {
        for (i, pair) in values.chunks_exact_mut(2).enumerate() {
            pair[0] = read(i * 2 * out + row);
            pair[1] = read(i * 2 * out + out + row);
        }
    });
    D::flatten(values)
}
