//! Batches whose samples have different adapters.

use burn::{
    module::Module,
    tensor::{BasicOps, Tensor, backend::Backend},
};

use super::LoraAdapter;
use crate::{
    ops::{ForwardMixed, MixedLinear, Update, run, runs_on},
    quantized::Weight,
    tensors::add,
};

/// The adapters of one layer for the samples of a batch, which are sorted by adapter.
#[derive(Clone, Debug)]
pub(crate) struct Mixed<B: Backend> {
    groups: Vec<Group<B>>,
}

/// Samples that follow each other and have the same adapter, or none.
#[derive(Clone, Debug)]
struct Group<B: Backend> {
    samples: usize,
    /// Boxed, because most layers of most models have fewer adapters than groups.
    adapter: Option<Box<LoraAdapter<B>>>,
}

impl<B: Backend> Mixed<B> {
    /// The adapters of so many samples each.
    pub fn new(groups: impl IntoIterator<Item = (usize, Option<LoraAdapter<B>>)>) -> Self {
        let mut merged: Vec<Group<B>> = Vec::new();
        for (samples, adapter) in groups {
            match merged.last_mut() {
                Some(last) if last.adapter.is_none() && adapter.is_none() => {
                    last.samples += samples;
                }
                _ => merged.push(Group { samples, adapter: adapter.map(Box::new) }),
            }
        }
        Self { groups: merged }
    }

    /// The adapters.
    pub fn adapters(&self) -> impl Iterator<Item = &LoraAdapter<B>> {
        self.groups.iter().filter_map(|group| group.adapter.as_deref())
    }

    pub fn fork(self, device: &B::Device) -> Self {
        let moved = |group: Group<B>| Group {
            adapter: group.adapter.map(|it| Box::new(it.fork(device))),
            ..group
        };
        Self { groups: self.groups.into_iter().map(moved).collect() }
    }

    /// Panics unless `size`, the first dimension of a layer's input, is that of the batch, or as many times
    /// that for each sample.
    #[track_caller]
    pub fn check(&self, size: usize) {
        let samples = self.samples();
        assert!(
            size.is_multiple_of(samples),
            "a mixed batch of {samples} samples: the first dimension of each layer's input must be a multiple \
             of {samples}, the same for each sample, got {size}"
        );
    }

    /// The output of a linear layer with the update of each sample's adapter: `[rows, d_input]` to
    /// `[rows, d_output]`.
    pub fn forward_on(
        &self,
        x: Tensor<B, 2>,
        weight: Weight<B>,
        bias: Option<Tensor<B, 1>>,
    ) -> Tensor<B, 2> {
        if let Some(y) = self.in_one_operation(&x, &weight, &bias) {
            return y;
        }
        self.add_to(weight.forward(x.clone(), bias), &x, LoraAdapter::forward)
    }

    /// The same as one operation; `None` where Burn's operations are used.
    fn in_one_operation(
        &self,
        x: &Tensor<B, 2>,
        weight: &Weight<B>,
        bias: &Option<Tensor<B, 1>>,
    ) -> Option<Tensor<B, 2>> {
        if !runs_on::<B>() {
            return None;
        }
        let update = |adapter: &LoraAdapter<B>| {
            let ([a, b], scale) = (adapter.factors(), adapter.scale());
            Update { a, b, bias: adapter.bias_delta(), scale }
        };
        let groups = self.parts(x.dims()[0]).map(|(_, rows, adapter)| (rows, adapter.map(update)));
        let groups = groups.collect();
        let layer = MixedLinear { weight: weight.clone(), bias: bias.clone(), groups };
        run::<ForwardMixed, B>(&(x.clone(), layer))
    }

    /// The output of the base with the update of each sample's adapter added. The first dimension of both
    /// tensors is a [multiple](Self::check) of the batch.
    pub fn add_to<K: BasicOps<B>, const I: usize, const O: usize>(
        &self,
        base: Tensor<B, O>,
        input: &Tensor<B, I, K>,
        update: impl Fn(&LoraAdapter<B>, Tensor<B, I, K>) -> Tensor<B, O>,
    ) -> Tensor<B, O> {
        self.change(base, input, |base, adapter, input| add(base, update(adapter, input)))
    }

    /// The output of the base, with what `change` makes of it for the samples that have an adapter.
    pub fn change<K: BasicOps<B>, const I: usize, const O: usize>(
        &self,
        base: Tensor<B, O>,
        input: &Tensor<B, I, K>,
        change: impl Fn(Tensor<B, O>, &LoraAdapter<B>, Tensor<B, I, K>) -> Tensor<B, O>,
    ) -> Tensor<B, O> {
        let parts = self.parts(base.dims()[0]).map(|(start, rows, adapter)| {
            let y = base.clone().narrow(0, start, rows);
            match adapter {
                Some(adapter) => change(y, adapter, input.clone().narrow(0, start, rows)),
                None => y,
            }
        });
        Tensor::cat(parts.collect(), 0)
    }

    /// The outputs of a layer, which `forward` computes with one adapter at a time.
    pub fn each<const D: usize>(
        &self,
        input: &Tensor<B, D>,
        forward: impl Fn(Option<&LoraAdapter<B>>, Tensor<B, D>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let parts = self
            .parts(input.dims()[0])
            .map(|(start, rows, adapter)| forward(adapter, input.clone().narrow(0, start, rows)));
        Tensor::cat(parts.collect(), 0)
    }

    /// Of each group the first of its rows, their number, and the adapter; of so many rows in all.
    fn parts(&self, rows: usize) -> impl Iterator<Item = (usize, usize, Option<&LoraAdapter<B>>)> {
        self.check(rows);
        let each = rows / self.samples();
        self.groups.iter().scan(0, move |start, group| {
            let (first, count) = (*start, group.samples * each);
            *start += count;
            Some((first, count, group.adapter.as_deref()))
        })
    }

    fn samples(&self) -> usize {
        self.groups.iter().map(|group| group.samples).sum()
    }
}
