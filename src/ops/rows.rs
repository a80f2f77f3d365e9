//! Operations on matrices stored by row, in parallel, in blocks that fit a core's cache.

use burn::tensor::{Shape, Tensor, TensorData, ops::FloatTensor};
use nalgebra::{DMatrixView, DMatrixViewMut};
use rayon::prelude::*;

use super::backend::Cpu;
use crate::tensors::{primitive, tensor};

/// How many rows of a matrix are processed at once. They stay in a core's cache between two uses.
const ROWS: usize = 64;

/// From this number of multiplications on, several threads are faster than one.
const WORTH_THREADS: usize = 1 << 20;

/// From this number of moved elements on, several threads are faster than one.
pub(super) const WORTH_THREADS_MOVED: usize = 1 << 17;

/// `y + bias + left·right`, for `y: [batch, columns]`, `bias: [columns]`, `left: [batch, rank]` and
/// `right: [rank, columns]`. The sum is formed in place, so y must not be shared.
pub(super) fn add_product<K: Cpu>(
    y: Tensor<K, 2>,
    bias: Option<Tensor<K, 1>>,
    left: Tensor<K, 2>,
    right: Tensor<K, 2>,
) -> Tensor<K, 2> {
    let ([_, columns], [_, rank]) = (y.dims(), left.dims());
    let [left, right] = [left, right].map(row_by_row);
    let bias = bias.map(row_by_row);
    let mut y = row_by_row(y);

    // nalgebra stores matrices by column, so each one is passed as its transpose.
    let right = DMatrixView::from_slice(rows::<K>(&right), columns, rank);
    let bias = bias.as_ref().map(rows::<K>);
    let left = rows::<K>(&left);
    let y_rows = K::rows_mut(&mut y).expect("y was just computed and is not shared");
    if y_rows.len() * rank < WORTH_THREADS {
        add_rows(y_rows, bias, left, right);
    } else {
        y_rows
            .par_chunks_mut(ROWS * columns)
            .zip(left.par_chunks(ROWS * rank))
            .for_each(|(y, left)| add_rows(y, bias, left, right));
    }
    tensor(y)
}

pub(super) fn add_rows(y: &mut [f32], bias: Option<&[f32]>, left: &[f32], right: DMatrixView<f32>) {
    let (columns, rank) = right.shape();
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(columns) {
            row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    }
    let count = left.len() / rank;
    let left = DMatrixView::from_slice(left, rank, count);
    DMatrixViewMut::from_slice(y, columns, count).gemm(1.0, &right, &left, 1.0);
}

/// The transpose, stored by row.
pub(super) fn transposed<K: Cpu>(matrix: Tensor<K, 2>) -> Tensor<K, 2> {
    let ([height, width], device) = (matrix.dims(), matrix.device());
    let matrix = row_by_row(matrix);
    let matrix = rows::<K>(&matrix);
    let mut transpose = vec![0.0; matrix.len()];
    if transpose.len() < WORTH_THREADS_MOVED {
        transpose_columns(matrix, width, height, &mut transpose);
    } else {
        transpose.par_chunks_mut(ROWS * height).enumerate().for_each(|(index, chunk)| {
            transpose_columns(&matrix[index * ROWS..], width, height, chunk);
        });
    }
    of_rows(transpose, [width, height], &device)
}

/// The side of the square tiles that are transposed at once. 16 elements fill one cache line.
const TILE: usize = 16;

/// Writes the first columns of a matrix into `rows`, as rows of `height` elements.
fn transpose_columns(matrix: &[f32], width: usize, height: usize, rows: &mut [f32]) {
    for (left, rows) in (0..).step_by(TILE).zip(rows.chunks_mut(TILE * height)) {
        let columns = rows.len() / height;
        for top in (0..height).step_by(TILE) {
            let lines = TILE.min(height - top);
            let mut tile = [[0.0; TILE]; TILE];
            let numbers = matrix[top * width..].chunks(width).take(lines);
            for (line, numbers) in numbers.enumerate() {
                for (column, &value) in numbers[left..left + columns].iter().enumerate() {
                    tile[column][line] = value;
                }
            }
            for (row, column) in rows.chunks_exact_mut(height).zip(&tile) {
                row[top..top + lines].copy_from_slice(&column[..lines]);
            }
        }
    }
}

/// The tensor with its elements stored by row. It is copied if they are stored in another order.
pub(super) fn row_by_row<K: Cpu, const D: usize>(tensor: Tensor<K, D>) -> FloatTensor<K> {
    let shape: Shape = tensor.shape();
    let primitive = primitive(tensor);
    match K::rows(&primitive) {
        Some(_) => primitive,
        None => {
            let flat = K::float_reshape(primitive, Shape::new([shape.num_elements()]));
            K::float_reshape(flat, shape)
        }
    }
}

/// The tensor, row by row, with its elements for itself: they can be changed by [`Cpu::rows_mut`].
pub(super) fn own<K: Cpu, const D: usize>(tensor: Tensor<K, D>) -> FloatTensor<K> {
    let (shape, device) = (tensor.dims(), tensor.device());
    let mut own = row_by_row(tensor);
    match K::rows_mut(&mut own) {
        Some(_) => own,
        None => primitive(of_rows::<K, D>(rows::<K>(&own).to_vec(), shape, &device)),
    }
}

/// The elements of a tensor that is [its own](own).
pub(super) fn own_rows<K: Cpu>(tensor: &mut FloatTensor<K>) -> &mut [f32] {
    K::rows_mut(tensor).expect("it is not shared")
}

/// Runs `work` on blocks of both slices, which have so many numbers each, on several threads if the slices are
/// long.
pub(super) fn in_blocks(
    output: &mut [f32],
    input: &[f32],
    block: usize,
    work: impl Fn(&mut [f32], &[f32]) + Sync,
) {
    if output.len() < WORTH_THREADS_MOVED {
        return work(output, input);
    }
    let blocks = output.par_chunks_mut(block).zip(input.par_chunks(block));
    blocks.for_each(|(output, input)| work(output, input));
}

/// The tensor with these elements, row by row. It is in `f32`, whatever the device's default type is.
pub(super) fn of_rows<K: Cpu, const D: usize>(
    elements: Vec<f32>,
    shape: [usize; D],
    device: &K::Device,
) -> Tensor<K, D> {
    let data = TensorData::new(elements, shape);
    tensor(K::float_from_data(data, device))
}

pub(super) fn rows<K: Cpu>(tensor: &FloatTensor<K>) -> &[f32] {
    K::rows(tensor).expect("it was laid out row by row")
}
