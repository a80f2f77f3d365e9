//! Channels times a factor plus a summand, in one pass over memory.
//!
//! For Burn's CPU backends a factor for each channel, `[1, channels, 1, 1]`, is not the same for a row of numbers, and
//! they multiply one number at a time.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, unary},
        },
    },
    tensor::{DType, Tensor, backend::Backend},
};
use rayon::prelude::*;

use super::{
    autodiff::{inner, output},
    backend::Cpu,
    operation::Operation,
    rows::{own, own_rows, row_by_row, rows},
    simd::widest,
};
use crate::tensors::{primitive, tensor};

/// A tensor `[batch, channels, ...]`, and constants for its channels: `[channels]`.
#[derive(Clone, Debug)]
pub(crate) struct Channels<B: Backend, const D: usize> {
    pub x: Tensor<B, D>,
    pub factor: Tensor<B, 1>,
    pub summand: Tensor<B, 1>,
}

/// `x·factor + summand`, where all is in `f32`. With autodiff, gradients reach x.
pub(crate) struct ScaleChannels<const D: usize>;

impl<const D: usize> Operation for ScaleChannels<D> {
    type Input<B: Backend> = Channels<B, D>;
    type Output<B: Backend> = Tensor<B, D>;

    fn forward<K: Cpu>(input: &Channels<K, D>) -> Option<Tensor<K, D>> {
        let Channels { x, factor, summand } = input;
        input.fits().then(|| scaled(x.clone(), factor, Some(summand)))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        input: &Channels<Autodiff<K, C>, D>,
    ) -> Option<Tensor<Autodiff<K, C>, D>> {
        let constants = [&input.factor, &input.summand];
        if !input.fits() || constants.iter().any(|it| primitive((*it).clone()).is_tracked()) {
            return None;
        }
        let [factor, summand] = constants.map(inner);
        let y = scaled(inner(&input.x), &factor, Some(&summand));
        Some(output(ChannelsNode::<D>, [&primitive(input.x.clone())], y, |_| factor))
    }
}

impl<B: Backend, const D: usize> Channels<B, D> {
    fn fits(&self) -> bool {
        let constants = [&self.factor, &self.summand];
        let in_f32 = constants.iter().all(|it| it.dtype() == DType::F32);
        in_f32
            && self.x.dtype() == DType::F32
            && D > 1
            && self.x.shape().num_elements() > 0
            && constants.iter().all(|it| it.dims() == [self.x.dims()[1]])
    }
}

/// How many numbers a thread takes at once, at least.
const BLOCK: usize = 1 << 13;

fn scaled<K: Cpu, const D: usize>(
    x: Tensor<K, D>,
    factor: &Tensor<K, 1>,
    summand: Option<&Tensor<K, 1>>,
) -> Tensor<K, D> {
    let shape = x.dims();
    let (channels, spread) = (shape[1], shape[2..].iter().product::<usize>());
    let factor = row_by_row(factor.clone());
    let factor = rows::<K>(&factor);
    let summand = summand.map(|it| row_by_row(it.clone()));
    let summand = summand.as_ref().map(rows::<K>);
    let nothing = summand.is_none_or(|it| it.iter().all(|it| *it == 0.0));
    if nothing && factor.iter().all(|it| *it == 1.0) {
        return x;
    }
    let mut y = own(x);
    let count = BLOCK.div_ceil(spread);
    own_rows::<K>(&mut y).par_chunks_mut(count * spread).enumerate().for_each(|(block, y)| {
        for (row, y) in (block * count..).zip(y.chunks_exact_mut(spread)) {
            let channel = row % channels;
            let (factor, summand) = (factor[channel], summand.map_or(0.0, |it| it[channel]));
            widest(
                #[inline(always)]
                || y.iter_mut().for_each(|y| *y = *y * factor + summand),
            );
        }
    });
    tensor(y)
}

#[derive(Debug)]
struct ChannelsNode<const D: usize>;

impl<K: Cpu, const D: usize> Backward<K, 1> for ChannelsNode<D> {
    /// The factors.
    type State = Tensor<K, 1>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let factor = ops.state;
        unary::<K, _>(ops.parents, ops.node, grads, |dy| {
            primitive(scaled::<K, D>(tensor(dy), &factor, None))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        let device = Default::default();
        let (x, factor) = (Tensor::ones([2, 3, 4, 5], &device), Tensor::ones([3], &device));
        run::<ScaleChannels<4>, B>(&Channels { x, summand: factor.clone(), factor }).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
