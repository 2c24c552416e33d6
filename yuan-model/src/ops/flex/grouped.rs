//! The experts' products: each group by itself, groups in parallel, operands as they lie and
//! results where they belong.

use burn::backend::TensorMetadata;
use rayon::prelude::*;

use super::{Float, empty, matrix::Matrix};

/// Splits `values` into the parts of the groups, `width` values a row.
fn parts<'a>(values: &'a mut [f32], rows: &[usize], width: usize) -> Vec<&'a mut [f32]> {
    let mut rest = values;
    let mut take = |rows: &usize| {
        let (part, left) = std::mem::take(&mut rest).split_at_mut(rows * width);
        rest = left;
        part
    };
    rows.iter().map(&mut take).collect()
}

fn starts(rows_per_group: &[usize]) -> Vec<usize> {
    let mut next = 0;
    let start = |rows: &usize| {
        next += rows;
        next - rows
    };
    rows_per_group.iter().map(start).collect()
}

pub(super) fn product(rows: &Float, weight: &Float, rows_per_group: &[usize]) -> Float {
    let (num_rows, [_, _, d_out]) = (rows.shape()[0], weight.shape().dims());
    let mut output = empty([num_rows, d_out]);
    let groups = parts(output.storage_mut(), rows_per_group, d_out);
    let groups = groups.into_par_iter().zip(starts(rows_per_group)).enumerate();
    groups.filter(|(_, (out, _))| !out.is_empty()).for_each(|(group, (out, start))| {
        let rows = Matrix::of(rows, []).rows(start..start + out.len() / d_out);
        rows.times(Matrix::of(weight, [group]), out);
    });
    output
}

pub(super) fn weight_gradient(rows: &Float, grad: &Float, rows_per_group: &[usize]) -> Float {
    let ([_, d_in], [_, d_out]) = (rows.shape().dims::<2>(), grad.shape().dims::<2>());
    let mut output = empty([rows_per_group.len(), d_in, d_out]);
    let groups = output.storage_mut::<f32>().par_chunks_mut((d_in * d_out).max(1));
    groups.zip(rows_per_group.par_iter().zip(starts(rows_per_group))).for_each(
        |(out, (&count, start))| {
            let [rows, grad] = [rows, grad].map(|x| Matrix::of(x, []).rows(start..start + count));
            if count == 0 {
                out.fill(0.0);
            } else {
                rows.transposed().times(grad, out);
            }
        },
    );
    output
}
