//! The experts' products: each group by itself, groups in parallel.

use burn::backend::{Flex, TensorMetadata, ops::FloatTensorOps};
use burn::tensor::{Shape, Slice};
use rayon::prelude::*;

use super::{Float, copy_into, tensor};

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
    let (num_rows, [_, d_in, d_out]) = (rows.shape()[0], weight.shape().dims());
    let mut output = vec![0.0; num_rows * d_out];
    let groups =
        parts(&mut output, rows_per_group, d_out).into_par_iter().zip(starts(rows_per_group)).enumerate();
    groups.filter(|(_, (out, _))| !out.is_empty()).for_each(|(group, (out, start))| {
        let range = [Slice::from(start..start + out.len() / d_out), Slice::full()];
        let weight = weight.narrow(0, group, 1);
        let weight = Flex::float_reshape(weight, Shape::from([d_in, d_out]));
        copy_into(out, &Flex::float_matmul(Flex::float_slice(rows.clone(), &range), weight));
    });
    tensor(output, [num_rows, d_out])
}

pub(super) fn weight_gradient(rows: &Float, grad: &Float, rows_per_group: &[usize]) -> Float {
    let ([_, d_in], [_, d_out]) = (rows.shape().dims::<2>(), grad.shape().dims::<2>());
    let mut output = vec![0.0; rows_per_group.len() * d_in * d_out];
    let counts = rows_per_group.par_iter().zip(starts(rows_per_group));
    output.par_chunks_mut((d_in * d_out).max(1)).zip(counts).filter(|(_, (count, _))| **count > 0).for_each(
        |(out, (count, start))| {
            let range = [Slice::from(start..start + count), Slice::full()];
            let rows = Flex::float_transpose(Flex::float_slice(rows.clone(), &range));
            copy_into(out, &Flex::float_matmul(rows, Flex::float_slice(grad.clone(), &range)));
        },
    );
    tensor(output, [rows_per_group.len(), d_in, d_out])
}
