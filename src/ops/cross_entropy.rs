//! The cross-entropy of a linear layer's outputs, which are computed for a few rows at a time and forgotten.
//!
//! The head of a language model has an output for each token that it knows. For a text of 4,096 tokens these are
//! 800 MB, and with Burn's operations there are several tensors of that size. Here the gradient of what the head
//! reads is computed in the forward pass, when the outputs of the rows are there.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, unary},
        },
    },
    tensor::{DType, Int, Tensor, backend::Backend},
};
use rayon::prelude::*;

use super::{
    autodiff::{inner, output},
    backend::Cpu,
    operation::Operation,
    pool::in_pool,
    rows::{of_rows, row_by_row, rows},
    simd::{exp_of_negative, largest, sum_of, tanh, widest},
    weight::plain,
};
use crate::{
    quantized::{Matrix, Weight},
    tensors::{primitive, tensor},
};

/// What the targets are the cross-entropy of.
#[derive(Clone, Debug)]
pub(crate) struct Scored<B: Backend> {
    /// `[rows, d_input]`
    pub x: Tensor<B, 2>,
    /// A constant. Full, it is `[d_input, classes]`.
    pub weight: Weight<B>,
    /// The right class of each row: `[rows]`.
    pub targets: Tensor<B, 1, Int>,
    /// Caps the scores: s becomes `cap·tanh(s/cap)`.
    pub soft_cap: Option<f32>,
}

/// The sum of minus the logarithms of the probabilities of all targets, `[1]`, where all is in `f32`. With autodiff,
/// gradients reach x.
pub(crate) struct CrossEntropy;

impl Operation for CrossEntropy {
    type Input<B: Backend> = Scored<B>;
    type Output<B: Backend> = Tensor<B, 1>;

    fn forward<K: Cpu>(scored: &Scored<K>) -> Option<Tensor<K, 1>> {
        Some(scored.loss(&scored.classes()?, false).0)
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        scored: &Scored<Autodiff<K, C>>,
    ) -> Option<Tensor<Autodiff<K, C>, 1>> {
        if let Matrix::Full(weight) = &scored.weight.matrix
            && primitive(weight.clone()).is_tracked()
        {
            return None;
        }
        let weight = plain(&scored.weight);
        let x = primitive(scored.x.clone());
        let targets = Tensor::new(scored.targets.clone().into_primitive());
        let values = Scored { x: inner(&scored.x), weight, targets, soft_cap: scored.soft_cap };
        let (loss, dx) = values.loss(&values.classes()?, x.is_tracked());
        Some(output(CrossEntropyNode, [&x], loss, |_| dx.expect("x is tracked")))
    }
}

/// About how many scores are there at once.
const SCORES: usize = 1 << 24;

impl<K: Cpu> Scored<K> {
    /// The targets; `None` if something does not fit.
    fn classes(&self) -> Option<Vec<usize>> {
        let ([count, d_input], [expected, classes]) = (self.x.dims(), self.weight.dims());
        let fits = self.weight.is_in_f32()
            && self.x.dtype() == DType::F32
            && count > 0
            && classes > 0
            && d_input == expected
            && self.targets.dims() == [count];
        let known = |class: i64| usize::try_from(class).ok().filter(|it| *it < classes);
        fits.then(|| self.targets.to_data().iter::<i64>().map(known).collect()).flatten()
    }

    /// The loss and, if it is wanted, its gradient with respect to x.
    fn loss(&self, targets: &[usize], wanted: bool) -> (Tensor<K, 1>, Option<Tensor<K, 2>>) {
        let ([count, d_input], [_, classes]) = (self.x.dims(), self.weight.dims());
        let (mut loss, mut dx) = (0.0, Vec::new());
        let blocks = (count * classes).div_ceil(SCORES);
        let block = count.div_ceil(blocks);
        for start in (0..count).step_by(block) {
            let targets = &targets[start..count.min(start + block)];
            let x = self.x.clone().narrow(0, start, targets.len());
            in_pool(targets.len(), [d_input, classes], || {
                let mut scores = row_by_row(self.weight.times(x));
                let rows_of_scores = K::rows_mut(&mut scores).expect("they were just computed");
                let rows_of_scores = rows_of_scores.par_chunks_mut(classes).zip(targets);
                let losses: Vec<f64> = rows_of_scores
                    .map_init(Vec::new, |shares, (scores, &target)| {
                        widest(
                            #[inline(always)]
                            || match self.soft_cap {
                                Some(cap) => {
                                    let shares = wanted.then_some(shares);
                                    capped_loss_of_row(scores, target, shares, cap)
                                }
                                None => loss_of_row(scores, target, wanted),
                            },
                        )
                    })
                    .collect();
                loss += losses.iter().sum::<f64>();
                if wanted {
                    let d_scores = tensor(scores);
                    let part = row_by_row(match &self.weight.matrix {
                        Matrix::Full(weight) if !self.weight.in_bf16(targets.len()) => {
                            K::product(d_scores, weight.clone().transpose())
                        }
                        _ => self.weight.times_transposed(d_scores),
                    });
                    dx.extend_from_slice(rows::<K>(&part));
                }
            });
        }
        let device = self.x.device();
        let dx = wanted.then(|| of_rows(dx, [count, d_input], &device));
        (of_rows(vec![loss as f32], [1], &device), dx)
    }
}

/// Minus the logarithm of the target's probability. The scores become its gradient, if that is wanted.
#[inline(always)]
fn loss_of_row(scores: &mut [f32], target: usize, wanted: bool) -> f64 {
    let (top, right) = (largest(scores), scores[target]);
    let mut sum = 0.0;
    // In parts that stay in the cache between their two uses.
    for scores in scores.chunks_mut(1 << 11) {
        scores.iter_mut().for_each(|it| *it = exp_of_negative(*it - top));
        sum += f64::from(sum_of(scores, |it| it));
    }
    if wanted {
        let factor = (1.0 / sum) as f32;
        scores.iter_mut().for_each(|it| *it *= factor);
        scores[target] -= 1.0;
    }
    f64::from(top - right) + sum.ln()
}

/// The same of capped scores. Where a cap is near, scores change less: by `1 - tanh²(s/cap)`. For the gradient there is
/// room for the hyperbolic tangents.
#[inline(always)]
fn capped_loss_of_row(
    scores: &mut [f32],
    target: usize,
    mut shares: Option<&mut Vec<f32>>,
    cap: f32,
) -> f64 {
    let factor = 1.0 / cap;
    scores.iter_mut().for_each(|it| *it = tanh(*it * factor));
    if let Some(shares) = &mut shares {
        shares.clear();
        shares.extend_from_slice(scores);
    }
    scores.iter_mut().for_each(|it| *it *= cap);
    let loss = loss_of_row(scores, target, shares.is_some());
    for (it, share) in scores.iter_mut().zip(shares.into_iter().flatten()) {
        *it *= 1.0 - *share * *share;
    }
    loss
}

#[derive(Debug)]
struct CrossEntropyNode;

impl<K: Cpu> Backward<K, 1> for CrossEntropyNode {
    /// The gradient with respect to x.
    type State = Tensor<K, 2>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dx = ops.state;
        unary::<K, _>(ops.parents, ops.node, grads, |d_loss| {
            let d_loss: Tensor<K, 1> = tensor(d_loss);
            primitive(dx * d_loss.unsqueeze())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{run, testing::test_on_each_backend},
        precision::Precision,
    };

    fn is_one_operation<B: Backend>() -> bool {
        let device = Default::default();
        let x = Tensor::ones([2, 3], &device);
        let weight = Weight::full(Tensor::ones([3, 5], &device), Precision::F32);
        let targets = Tensor::from_data([4_i32, 0], &device);
        run::<CrossEntropy, B>(&Scored { x, weight, targets, soft_cap: None }).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
