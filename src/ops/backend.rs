//! What an operation needs of a CPU backend.

use burn::tensor::{
    Tensor,
    backend::Backend,
    ops::{FloatTensor, IntTensor},
};

/// A backend that computes on the CPU and gives access to its tensors as slices.
pub(crate) trait Cpu: Backend {
    /// The elements of an `f32` tensor row by row; `None` if they are stored in another order.
    fn rows(tensor: &FloatTensor<Self>) -> Option<&[f32]>;

    /// The same, mutable; `None` also if the tensor is shared.
    fn rows_mut(tensor: &mut FloatTensor<Self>) -> Option<&mut [f32]>;

    /// The elements of an integer tensor of 32 bits row by row; `None` if they are stored otherwise.
    fn words(tensor: &IntTensor<Self>) -> Option<&[i32]>;

    /// The elements of an `f32` tensor row by row, in its own memory; `None` if the tensor is shared, or this would copy.
    fn into_rows(tensor: FloatTensor<Self>) -> Option<Vec<f32>> {
        drop(tensor);
        None
    }

    /// The product of two matrices in `f32`.
    fn product(left: Tensor<Self, 2>, right: Tensor<Self, 2>) -> Tensor<Self, 2> {
        left.matmul(right)
    }

    /// The product `x·thin`, for `x: [batch, columns]` and `thin: [columns, rank]`.
    fn times_thin(x: Tensor<Self, 2>, thin: Tensor<Self, 2>) -> Tensor<Self, 2> {
        Self::product(x, thin)
    }
}

#[cfg(feature = "flex")]
impl Cpu for burn_flex::Flex {
    fn rows(tensor: &FloatTensor<Self>) -> Option<&[f32]> {
        tensor.as_slice()
    }

    fn rows_mut(tensor: &mut FloatTensor<Self>) -> Option<&mut [f32]> {
        let whole = tensor.as_slice::<f32>()?.len() == tensor.storage::<f32>().len();
        tensor.try_storage_mut().filter(|_| whole)
    }

    fn words(tensor: &IntTensor<Self>) -> Option<&[i32]> {
        tensor.as_slice()
    }

    fn into_rows(mut tensor: FloatTensor<Self>) -> Option<Vec<f32>> {
        Self::rows_mut(&mut tensor)?;
        tensor.into_data().into_vec().ok()
    }

    /// Splits the rows of x into a batch of products, one for each thread. Flex computes a single product
    /// below `SHARED` multiplications on one thread, but uses several for a batch of products from 128³ on.
    fn times_thin(x: Tensor<Self, 2>, thin: Tensor<Self, 2>) -> Tensor<Self, 2> {
        use super::pool::SHARED;

        const BATCH_SHARED: usize = 128 * 128 * 128;
        /// With fewer rows per thread, starting the threads takes longer than the product.
        const ROWS: usize = 32;

        let ([batch, columns], [_, rank]) = (x.dims(), thin.dims());
        let threads = rayon::current_num_threads();
        let gains = (BATCH_SHARED..SHARED).contains(&(batch * columns * rank))
            && batch.is_multiple_of(threads)
            && batch / threads >= ROWS;
        let primitive = x.clone().into_primitive().tensor();
        // Flex would have to copy any other view before it can split it.
        let splits = Self::rows(&primitive).is_some() && primitive.layout().start_offset() == 0;
        if !gains || !splits {
            return x.matmul(thin);
        }
        let parts = x.reshape([threads, batch / threads, columns]);
        parts.matmul(thin.unsqueeze()).reshape([batch, rank])
    }
}

#[cfg(feature = "ndarray")]
impl Cpu for burn_ndarray::NdArray {
    fn words(tensor: &IntTensor<Self>) -> Option<&[i32]> {
        let burn_ndarray::NdArrayTensor::I32(storage) = tensor else { return None };
        storage.view().to_slice()
    }

    /// Multiplies without copies. The backend's own product copies both factors and the result.
    fn product(left: Tensor<Self, 2>, right: Tensor<Self, 2>) -> Tensor<Self, 2> {
        use burn_ndarray::NdArrayTensor;

        use crate::tensors::{primitive, tensor};

        let factors = [left, right].map(primitive);
        let [NdArrayTensor::F32(left), NdArrayTensor::F32(right)] = &factors else {
            unreachable!("both are in f32")
        };
        let [left, right] = [left, right]
            .map(|it| it.view().into_dimensionality::<ndarray::Ix2>().expect("it is a matrix"));
        tensor(NdArrayTensor::from(left.dot(&right).into_dyn().into_shared()))
    }

    fn rows(tensor: &FloatTensor<Self>) -> Option<&[f32]> {
        let burn_ndarray::NdArrayTensor::F32(storage) = tensor else { return None };
        storage.view().to_slice()
    }

    fn rows_mut(tensor: &mut FloatTensor<Self>) -> Option<&mut [f32]> {
        let burn_ndarray::NdArrayTensor::F32(storage) = tensor else { return None };
        if storage.is_unique() { storage.ensure_owned().as_slice_mut() } else { None }
    }
}
