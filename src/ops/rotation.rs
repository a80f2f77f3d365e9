//! Rotary embeddings in one pass over memory.

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

/// Pairs of numbers of each head, turned by an angle.
#[derive(Clone, Debug)]
pub(crate) struct Rotation<B: Backend> {
    /// `[batch, length, heads, size]`
    pub x: Tensor<B, 4>,
    /// Of the angle of each pair, i and i + pairs: `[batch or 1, length, pairs]`. What comes after the pairs stays.
    pub cos: Tensor<B, 3>,
    pub sin: Tensor<B, 3>,
}

/// The rotated tensor, where all is in `f32`. With autodiff, gradients reach x.
pub(crate) struct Rotate;

impl Operation for Rotate {
    type Input<B: Backend> = Rotation<B>;
    type Output<B: Backend> = Tensor<B, 4>;

    fn forward<K: Cpu>(input: &Rotation<K>) -> Option<Tensor<K, 4>> {
        input.fits().then(|| rotated(input.x.clone(), &input.cos, &input.sin, 1.0))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        input: &Rotation<Autodiff<K, C>>,
    ) -> Option<Tensor<Autodiff<K, C>, 4>> {
        if !input.fits() {
            return None;
        }
        let [cos, sin] = [&input.cos, &input.sin].map(inner);
        let y = rotated(inner(&input.x), &cos, &sin, 1.0);
        Some(output(RotationNode, [&primitive(input.x.clone())], y, |_| [cos, sin]))
    }
}

impl<B: Backend> Rotation<B> {
    fn fits(&self) -> bool {
        let ([batch, length, heads, size], [texts, places, pairs]) =
            (self.x.dims(), self.cos.dims());
        let in_f32 = [self.x.dtype(), self.cos.dtype(), self.sin.dtype()];
        in_f32.iter().all(|it| *it == DType::F32)
            && ![batch, length, heads, pairs].contains(&0)
            && [1, batch].contains(&texts)
            && places == length
            && 2 * pairs <= size
            && self.sin.dims() == self.cos.dims()
    }
}

/// The heads of a few tokens fit a core's cache.
const TOKENS: usize = 16;

/// The pairs turned by the angle, or against it if `direction` is -1.
fn rotated<K: Cpu>(
    x: Tensor<K, 4>,
    cos: &Tensor<K, 3>,
    sin: &Tensor<K, 3>,
    direction: f32,
) -> Tensor<K, 4> {
    let ([_, _, heads, size], [.., pairs]) = (x.dims(), cos.dims());
    let [cos, sin] = [cos, sin].map(|it| row_by_row(it.clone()));
    let [cos, sin] = [&cos, &sin].map(rows::<K>);
    let mut y = own(x);
    let places = cos.len() / pairs;
    let turned = |(block, tokens): (usize, &mut [f32])| {
        for (token, heads) in (block * TOKENS..).zip(tokens.chunks_exact_mut(heads * size)) {
            let angle = token % places * pairs;
            let [cos, sin] = [cos, sin].map(|it| &it[angle..angle + pairs]);
            turn(heads, size, cos, sin, direction);
        }
    };
    own_rows::<K>(&mut y).par_chunks_mut(TOKENS * heads * size).enumerate().for_each(turned);
    tensor(y)
}

/// The pairs of each head of a token turned by the angle, or against it if `direction` is -1.
pub(crate) fn turn(heads: &mut [f32], size: usize, cos: &[f32], sin: &[f32], direction: f32) {
    let pairs = cos.len();
    widest(
        #[inline(always)]
        || {
            for head in heads.chunks_exact_mut(size) {
                let (left, right) = head[..2 * pairs].split_at_mut(pairs);
                for (((a, b), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
                    let sin = sin * direction;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        },
    );
}

#[derive(Debug)]
struct RotationNode;

impl<K: Cpu> Backward<K, 1> for RotationNode {
    /// The cosines and sines.
    type State = [Tensor<K, 3>; 2];

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [cos, sin] = ops.state;
        unary::<K, _>(ops.parents, ops.node, grads, |dy| {
            primitive(rotated::<K>(tensor(dy), &cos, &sin, -1.0))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        let device = Default::default();
        let (x, cos) = (Tensor::ones([2, 3, 4, 8], &device), Tensor::ones([1, 3, 4], &device));
        run::<Rotate, B>(&Rotation { x, sin: cos.clone(), cos }).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
