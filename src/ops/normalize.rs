//! Layer, RMS and group norms as one operation, in one pass over memory each way.
//!
//! All three make the numbers of a row alike: minus their mean (not RMS norms), divided by their deviation. Then
//! each channel is scaled and moved. A row is a token's vector, or a group of channels of an image.

use std::{borrow::Cow, ops::Range};

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops},
        },
    },
    tensor::{DType, Tensor, backend::Backend},
};
use rayon::prelude::*;

use super::{
    autodiff::{inner, nothing, output, parents, register},
    backend::Cpu,
    operation::Operation,
    rows::{of_rows, own, own_rows, row_by_row, rows},
    simd::{sum_of, sum_of_pairs, widest},
};
use crate::tensors::{primitive, tensor};

/// What is normalized, and how.
#[derive(Clone, Debug)]
pub(crate) struct Norm<B: Backend, const D: usize> {
    /// Rows, one after the other.
    pub x: Tensor<B, D>,
    /// The factors of the channels: `[channels]`.
    pub gamma: Option<Tensor<B, 1>>,
    /// What is added to the channels: `[channels]`.
    pub beta: Option<Tensor<B, 1>>,
    /// The channels are shared out among so many rows, in turn.
    pub groups: usize,
    pub channels: usize,
    /// The numbers of a channel in a row.
    pub spread: usize,
    /// Whether the mean is subtracted.
    pub centered: bool,
    /// What is added to variances, or mean squares.
    pub epsilon: f64,
}

/// The normalized tensor, of the shape of x, where all is in `f32`. With autodiff, gradients reach x, gamma and
/// beta.
pub(crate) struct Normalize<const D: usize>;

impl<const D: usize> Operation for Normalize<D> {
    type Input<B: Backend> = Norm<B, D>;
    type Output<B: Backend> = Tensor<B, D>;

    fn forward<K: Cpu>(norm: &Norm<K, D>) -> Option<Tensor<K, D>> {
        norm.fits().then(|| norm.output().0)
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        norm: &Norm<Autodiff<K, C>, D>,
    ) -> Option<Tensor<Autodiff<K, C>, D>> {
        norm.fits().then(|| output_of(norm))
    }
}

impl<B: Backend, const D: usize> Norm<B, D> {
    /// The length of a row.
    fn width(&self) -> usize {
        self.channels / self.groups * self.spread
    }

    fn fits(&self) -> bool {
        let affine = [&self.gamma, &self.beta];
        let elements = self.x.shape().num_elements();
        self.x.dtype() == DType::F32
            && self.groups > 0
            && self.channels.is_multiple_of(self.groups)
            && elements > 0
            && elements.is_multiple_of(self.width() * self.groups)
            && affine
                .iter()
                .copied()
                .flatten()
                .all(|it| it.dtype() == DType::F32 && it.dims() == [self.channels])
    }

    /// The same with another tensor in the place of x, and without autodiff in the others.
    fn with<K: Backend>(
        &self,
        x: Tensor<K, D>,
        inner: impl Fn(&Tensor<B, 1>) -> Tensor<K, 1>,
    ) -> Norm<K, D> {
        let Self { groups, channels, spread, centered, epsilon, .. } = *self;
        let [gamma, beta] = [&self.gamma, &self.beta].map(|it| it.as_ref().map(&inner));
        Norm { x, gamma, beta, groups, channels, spread, centered, epsilon }
    }
}

/// The mean of a row, 0 if it is not subtracted, and 1 divided by its deviation.
type Statistics = [f32; 2];

/// How many numbers a thread takes at once, at least.
const BLOCK: usize = 1 << 13;

/// In how many parts the gradients of the channels are summed up, at most.
const PARTS: usize = 64;

/// The factors of all channels and what is added to them, also where there are none.
struct Affine<'a> {
    gamma: Cow<'a, [f32]>,
    beta: Cow<'a, [f32]>,
    /// The channels of a row.
    channels: usize,
    groups: usize,
    spread: usize,
}

impl Affine<'_> {
    /// The channels of a row.
    fn of(&self, row: usize) -> Range<usize> {
        let start = row % self.groups * self.channels;
        start..start + self.channels
    }

    /// Calls `each` with every number of y, the one at its place in x, and its channel's factor and summand.
    #[inline(always)]
    fn each(&self, row: usize, y: &mut [f32], x: &[f32], each: impl Fn(&mut f32, f32, f32, f32)) {
        let channels = self.of(row);
        let (gamma, beta) = (&self.gamma[channels.clone()], &self.beta[channels]);
        if self.spread == 1 {
            for (((y, &x), &gamma), &beta) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
                each(y, x, gamma, beta);
            }
            return;
        }
        let parts = y.chunks_exact_mut(self.spread).zip(x.chunks_exact(self.spread));
        for (((y, x), &gamma), &beta) in parts.zip(gamma).zip(beta) {
            y.iter_mut().zip(x).for_each(|(y, &x)| each(y, x, gamma, beta));
        }
    }
}

impl<K: Cpu, const D: usize> Norm<K, D> {
    /// Calls `work` with the rows of x and the channels.
    fn with_rows<R>(&self, work: impl FnOnce(&[f32], &Affine) -> R) -> R {
        let [gamma, beta] =
            [&self.gamma, &self.beta].map(|it| it.as_ref().map(|it| row_by_row(it.clone())));
        let numbers = |given: &Option<_>, other: f32| match given {
            Some(given) => Cow::Owned(rows::<K>(given).to_vec()),
            None => Cow::Owned(vec![other; self.channels]),
        };
        let affine = Affine {
            gamma: numbers(&gamma, 1.0),
            beta: numbers(&beta, 0.0),
            channels: self.channels / self.groups,
            groups: self.groups,
            spread: self.spread,
        };
        let x = row_by_row(self.x.clone());
        work(rows::<K>(&x), &affine)
    }

    fn output(&self) -> (Tensor<K, D>, Vec<Statistics>) {
        let width = self.width();
        let (y, statistics) = self.with_rows(|x, affine| {
            let mut y = vec![0.0; x.len()];
            let mut statistics = vec![[0.0; 2]; x.len() / width];
            let count = BLOCK.div_ceil(width);
            let blocks = y.par_chunks_mut(count * width).zip(x.par_chunks(count * width));
            let blocks = blocks.zip(statistics.par_chunks_mut(count)).enumerate();
            blocks.for_each(|(block, ((y, x), statistics))| {
                let parts = y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(statistics);
                for (row, ((y, x), statistics)) in (block * count..).zip(parts) {
                    *statistics = widest(
                        #[inline(always)]
                        || self.statistics(x),
                    );
                    let [mean, factor] = *statistics;
                    widest(
                        #[inline(always)]
                        || {
                            affine.each(row, y, x, |y, x, gamma, beta| {
                                *y = (x - mean) * factor * gamma + beta;
                            });
                        },
                    );
                }
            });
            (y, statistics)
        });
        (of_rows(y, self.x.dims(), &self.x.device()), statistics)
    }

    #[inline(always)]
    fn statistics(&self, x: &[f32]) -> Statistics {
        let count = x.len() as f32;
        let mean = if self.centered { sum_of(x, |x| x) / count } else { 0.0 };
        let variance = sum_of(x, |x| (x - mean) * (x - mean)) / count;
        [mean, 1.0 / (variance + self.epsilon as f32).sqrt()]
    }

    /// The gradient of x and, if they are wanted, those of the factors and summands of the channels. With
    /// `u = (x - mean)·factor` and `g = dy·gamma`:
    ///
    /// ```text
    /// dx = factor·(g - mean(g) - u·mean(g·u))    d_gamma = Σ dy·u    d_beta = Σ dy
    /// ```
    ///
    /// where `mean(g)` is left out if x was not centered.
    fn gradients(
        &self,
        statistics: &[Statistics],
        dy: Tensor<K, D>,
        wanted: bool,
    ) -> (Tensor<K, D>, Option<[Tensor<K, 1>; 2]>) {
        let (width, device) = (self.width(), self.x.device());
        // The gradient of x takes the place of dy.
        let mut d = own(dy);
        let sums: Vec<Vec<[f32; 2]>> = self.with_rows(|x, affine| {
            let d = own_rows::<K>(&mut d);
            let count = BLOCK.div_ceil(width).max(statistics.len().div_ceil(PARTS));
            let blocks = d.par_chunks_mut(count * width).zip(x.par_chunks(count * width));
            blocks
                .enumerate()
                .map(|(block, (d, x))| {
                    let mut sums = vec![[0.0; 2]; if wanted { self.channels } else { 0 }];
                    let parts = d.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for (row, (d, x)) in (block * count..).zip(parts) {
                        let [mean, factor] = statistics[row];
                        let about = |x: f32| (x - mean) * factor;
                        if wanted {
                            let channels = x.chunks_exact(self.spread);
                            let channels = channels.zip(d.chunks_exact(self.spread));
                            for ((x, dy), sums) in channels.zip(&mut sums[affine.of(row)]) {
                                sums[0] += sum_of_pairs(x, dy, |x, dy| about(x) * dy);
                                sums[1] += sum_of(dy, |dy| dy);
                            }
                        }
                        widest(
                            #[inline(always)]
                            || {
                                affine.each(row, d, x, |d, _, gamma, _| *d *= gamma);
                                let mean_g = if self.centered {
                                    sum_of(d, |g| g) / width as f32
                                } else {
                                    0.0
                                };
                                let along = sum_of_pairs(d, x, |g, x| g * about(x)) / width as f32;
                                d.iter_mut().zip(x).for_each(|(d, &x)| {
                                    *d = factor * (*d - mean_g - about(x) * along);
                                });
                            },
                        );
                    }
                    sums
                })
                .collect()
        });
        let sums = wanted.then(|| {
            [0, 1].map(|which| {
                let sum =
                    |channel: usize| sums.iter().map(|part| part[channel][which]).sum::<f32>();
                of_rows((0..self.channels).map(sum).collect(), [self.channels], &device)
            })
        });
        (tensor(d), sums)
    }
}

#[derive(Debug)]
struct NormNode<const D: usize>;

/// What the gradients are computed from: the node of x, whose tensor the checkpointer keeps, the statistics of its
/// rows, and all else with nothing in the place of x.
#[derive(Clone, Debug)]
struct State<K: Cpu, const D: usize> {
    x: NodeId,
    statistics: Vec<Statistics>,
    norm: Norm<K, D>,
}

/// The parents are x, gamma and beta.
impl<K: Cpu, const D: usize> Backward<K, 3> for NormNode<D> {
    type State = State<K, D>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let parents = parents(&ops);
        let State { x, statistics, norm } = ops.state;
        let norm = norm.with(tensor(checkpointer.retrieve_node_output(x)), Tensor::clone);
        let dy = tensor(grads.consume::<K>(&ops.node));
        let wanted = parents[1].is_some() || parents[2].is_some();
        let (dx, sums) = norm.gradients(&statistics, dy, wanted);
        let [d_gamma, d_beta] = sums.map_or([None, None], |it| it.map(|it| Some(primitive(it))));
        register::<K, 3>(grads, parents, [Some(primitive(dx)), d_gamma, d_beta]);
    }
}

fn output_of<K: Cpu, C: CheckpointStrategy, const D: usize>(
    norm: &Norm<Autodiff<K, C>, D>,
) -> Tensor<Autodiff<K, C>, D> {
    let plain = norm.with(inner(&norm.x), inner);
    let (y, statistics) = plain.output();
    let x = primitive(norm.x.clone());
    let [gamma, beta] = [&norm.gamma, &norm.beta].map(|it| it.clone().map(primitive));
    let none = nothing::<K, C>();
    let [gamma, beta] = [&gamma, &beta].map(|it| it.as_ref().unwrap_or(&none));
    output(NormNode::<D>, [&x, gamma, beta], y, |prep| {
        let blank = Tensor::zeros([1; D], &plain.x.device());
        State { x: prep.checkpoint(&x), statistics, norm: plain.with(blank, Tensor::clone) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        let x = Tensor::ones([2, 4, 3, 3], &Default::default());
        let gamma = Some(Tensor::ones([4], &Default::default()));
        let norm = Norm {
            x,
            gamma,
            beta: None,
            groups: 2,
            channels: 4,
            spread: 9,
            centered: true,
            epsilon: 1e-5,
        };
        run::<Normalize<4>, B>(&norm).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
