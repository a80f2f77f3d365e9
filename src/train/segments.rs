//! Backward passes block by block, which need little memory.

use burn::{
    module::{AutodiffModule, Module},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{
        Int, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};

use super::Backward;
use crate::{
    model::Lora,
    ops::{Along, run},
    overlay::Overlay,
};

/// A model that computes block by block, for [`segments`]. Implement it for all backends. `I` is what a step
/// reads, such as a number of texts, and `D` the number of dimensions of what goes from block to block.
///
/// The loss of the model is
///
/// ```text
/// x = begin(context)
/// x = block(i, x, context)    for all blocks
/// sum of loss(part, x, context) over all parts
/// ```
pub trait Blocks<B: Backend, const D: usize, I: ?Sized> {
    /// What is computed once from the input, for all blocks: masks, positions, targets.
    type Context;

    /// The number of blocks.
    fn blocks(&self) -> usize;

    /// What the blocks read beside the output of the block before.
    fn context(&self, input: &I, device: &B::Device) -> Self::Context;

    /// What the first block reads, such as the embeddings of tokens.
    fn begin(&self, context: &Self::Context) -> Tensor<B, D>;

    /// One block: the output for the output of the block before.
    fn block(&self, index: usize, x: Tensor<B, D>, context: &Self::Context) -> Tensor<B, D>;

    /// In how many parts the loss is computed. A head with many outputs needs less memory in several.
    fn parts(&self, context: &Self::Context) -> usize {
        let _ = context;
        1
    }

    /// A part of the loss, `[1]`, from the output of the last block. The loss is the sum of its parts.
    fn loss(&self, part: usize, x: Tensor<B, D>, context: &Self::Context) -> Tensor<B, 1>;
}

impl<B, M, I, const D: usize> Blocks<B, D, I> for Lora<B, M>
where
    B: Backend,
    M: Module<B> + Blocks<B, D, I>,
    I: ?Sized,
{
    type Context = M::Context;

    fn blocks(&self) -> usize {
        (**self).blocks()
    }

    fn context(&self, input: &I, device: &B::Device) -> Self::Context {
        (**self).context(input, device)
    }

    fn begin(&self, context: &Self::Context) -> Tensor<B, D> {
        (**self).begin(context)
    }

    fn block(&self, index: usize, x: Tensor<B, D>, context: &Self::Context) -> Tensor<B, D> {
        (**self).block(index, x, context)
    }

    fn parts(&self, context: &Self::Context) -> usize {
        (**self).parts(context)
    }

    fn loss(&self, part: usize, x: Tensor<B, D>, context: &Self::Context) -> Tensor<B, 1> {
        (**self).loss(part, x, context)
    }
}

impl<B, M, I, const D: usize> Blocks<B, D, I> for Overlay<B, M>
where
    B: Backend,
    M: Module<B> + Blocks<B, D, I>,
    I: ?Sized,
{
    type Context = M::Context;

    fn blocks(&self) -> usize {
        self.model().blocks()
    }

    fn context(&self, input: &I, device: &B::Device) -> Self::Context {
        self.model().context(input, device)
    }

    fn begin(&self, context: &Self::Context) -> Tensor<B, D> {
        self.with_adapters(|model| model.begin(context))
    }

    fn block(&self, index: usize, x: Tensor<B, D>, context: &Self::Context) -> Tensor<B, D> {
        self.with_adapters(|model| model.block(index, x, context))
    }

    fn parts(&self, context: &Self::Context) -> usize {
        self.model().parts(context)
    }

    fn loss(&self, part: usize, x: Tensor<B, D>, context: &Self::Context) -> Tensor<B, 1> {
        self.with_adapters(|model| model.loss(part, x, context))
    }
}

/// The loss and the gradients of a model, for the memory of one block: the backward pass by segments, also
/// known as gradient checkpointing ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)).
///
/// The forward pass keeps only what each block reads. The backward pass computes each block once more, from
/// the last to the first. The gradients are those of a plain backward pass, for one more forward pass of time.
///
/// # Panics
///
/// If a block, or the begin, gives another output the second time, which would make the gradients wrong: it has
/// dropout, or batch norms that train. A frozen [`nn::BatchNorm`](crate::nn::BatchNorm) computes the same twice. Or
/// if the model has no parameters.
pub fn segments<B, M, I, const D: usize>(model: &M, input: &I) -> Backward
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + Blocks<B, D, I>,
    M::InnerModule: Blocks<B::InnerBackend, D, I>,
    I: ?Sized,
{
    let device = model.devices().first().expect("a model with parameters expected").clone();
    let context = model.context(input, &device);

    // Forward without a graph: what each block reads, and what the head reads.
    let mut read = {
        let plain = model.valid();
        let context = plain.context(input, &device);
        let mut read = vec![plain.begin(&context)];
        for index in 0..plain.blocks() {
            let x = read[index].clone();
            read.push(plain.block(index, x, &context));
        }
        read
    };
    let mut output = read.pop().expect("it begins with one");
    let mut sum = Sum { model, gradients: GradientsAccumulator::new() };

    // The head. All parts of the loss add to the gradient of what it reads.
    let leaf = |values| Tensor::<B, D>::from_inner(values).require_grad();
    let mut loss = 0.0;
    let mut gradient: Option<Tensor<B::InnerBackend, D>> = None;
    for part in 0..model.parts(&context) {
        let x = leaf(output.clone());
        let part = model.loss(part, x.clone(), &context);
        loss += part.clone().into_data().iter::<f64>().sum::<f64>();
        let new = sum.backward(part, &x);
        gradient = match (gradient, new) {
            (Some(others), Some(new)) => Some(others + new),
            (others, new) => others.or(new),
        };
    }

    // The blocks from the last to the first.
    for (index, values) in read.into_iter().enumerate().rev() {
        let Some(dy) = gradient else { break };
        let x = leaf(values.clone());
        let y = model.block(index, x.clone(), &context);
        check_same(&format!("block {index}"), &output, y.clone().inner());
        gradient = sum.backward(along(y, dy), &x);
        output = values;
    }
    if let Some(dy) = gradient {
        // Without parameters that train, there would be no graph.
        let zero = Tensor::zeros([1], &device).require_grad();
        let y = model.begin(&context);
        check_same("the begin", &output, y.clone().inner());
        sum.backward(along(y, dy) + zero.clone(), &zero);
    }
    Backward { loss, gradients: sum.gradients.grads() }
}

/// A number whose gradients are those of the loss, if `dy` is the loss's gradient with respect to `y`.
fn along<B: AutodiffBackend, const D: usize>(
    y: Tensor<B, D>,
    dy: Tensor<B::InnerBackend, D>,
) -> Tensor<B, 1> {
    let pair = [y, Tensor::from_inner(dy)];
    run::<Along<D>, B>(&pair).unwrap_or_else(|| {
        let [y, dy] = pair;
        (y * dy).sum()
    })
}

/// The gradients of all backward passes.
struct Sum<'a, M> {
    model: &'a M,
    gradients: GradientsAccumulator<M>,
}

impl<M> Sum<'_, M> {
    /// Adds the gradients of `loss`, and returns that of `x`, if the loss depends on it.
    fn backward<B: AutodiffBackend, const D: usize>(
        &mut self,
        loss: Tensor<B, 1>,
        x: &Tensor<B, D>,
    ) -> Option<Tensor<B::InnerBackend, D>>
    where
        M: AutodiffModule<B>,
    {
        let mut gradients = loss.backward();
        let of_x = x.grad_remove(&mut gradients);
        let new = GradientsParams::from_grads(gradients, self.model);
        self.gradients.accumulate(self.model, new);
        of_x
    }
}

/// By how much of its largest value an output may change when it is computed again. Random numbers change it
/// by far more, and another order of additions by far less.
const ROUNDING: f64 = 1e-2;

/// About how many numbers are compared, from all over the output.
const COMPARED: usize = 1 << 12;

fn check_same<B: Backend, const D: usize>(part: &str, first: &Tensor<B, D>, second: Tensor<B, D>) {
    let count = first.shape().num_elements();
    if count == 0 {
        return;
    }
    // An odd step, so that the places are not all in the same columns.
    let places = (0..count).step_by((count / COMPARED) | 1).map(|it| it as i32);
    let places = Tensor::<B, 1, Int>::from_ints(&*places.collect::<Vec<_>>(), &first.device());
    let compared = |x: Tensor<B, D>| x.reshape([count]).select(0, places.clone());
    let [first, second] = [first.clone(), second].map(compared);
    let largest = |x: Tensor<B, 1>| x.abs().max().into_data().iter::<f64>().sum::<f64>();
    let changed = largest(first.clone() - second) > ROUNDING * largest(first);
    assert!(
        !changed,
        "a model that computes the same twice expected, but {part} gave another output the second \
         time: segments allow neither dropout nor batch norms that train",
    );
}
