//! Gradients as one buffer, and back.

use std::{collections::BTreeSet, mem};

use burn::{
    module::{AutodiffModule, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{
        DType, Tensor, TensorData,
        backend::{AutodiffBackend, Backend},
    },
};

use super::Replicas;
use crate::{tensors::cast, train::Backward};

impl Backward {
    /// The sum over all replicas of what each has computed, with the same bits for all of them. `model` is the
    /// one that it was computed with.
    ///
    /// As with [workers](crate::train::Workers), the loss of a replica should be its share of the batch's loss, and
    /// not the mean of its part. A replica without a part gives [`Backward::sum`] of nothing.
    ///
    /// All replicas must call it, with models of which the same parameters train: let them
    /// [agree](Replicas::agree) on that before.
    ///
    /// What is sent is one buffer of `f32`: the gradients in the order of the model's parameters, a zero or
    /// one for each parameter that says whether it has a gradient, and the loss.
    ///
    /// # Panics
    ///
    /// As [`Replicas::sum`].
    pub fn all_reduce<B: AutodiffBackend, M: AutodiffModule<B>>(
        self,
        model: &M,
        replicas: &(impl Replicas + ?Sized),
    ) -> Self {
        if replicas.count() == 1 {
            return self;
        }
        let Self { loss, gradients } = self;
        let mut writer =
            Writer { gradients, seen: BTreeSet::new(), parts: vec![], present: vec![] };
        model.visit(&mut writer);
        let Writer { parts, present, .. } = writer;
        let mut numbers = fetched(parts);
        let (length, parameters) = (numbers.len(), present.len());
        numbers.extend(present);
        numbers.push(loss as f32);
        replicas.sum(&mut numbers);
        let (values, rest) = numbers.split_at(length);
        let (present, loss) = rest.split_at(parameters);
        let present = present.iter().map(|count| *count > 0.0).collect();
        let mut reader = Reader { values, present, ..Reader::default() };
        model.visit(&mut reader);
        Self { loss: f64::from(loss[0]), gradients: reader.gradients }
    }
}

/// A parameter that is at several places in a model counts once.
fn is_new<B: AutodiffBackend, const D: usize>(
    seen: &mut BTreeSet<ParamId>,
    param: &Param<Tensor<B, D>>,
) -> bool {
    param.is_require_grad() && seen.insert(param.id)
}

/// The numbers of all tensors, one after the other. A GPU is waited for once, and not for each of them.
fn fetched<B: Backend>(parts: Vec<Tensor<B, 1>>) -> Vec<f32> {
    let Some(device) = parts.first().map(Tensor::device) else { return vec![] };
    let parts = parts.into_iter().map(|part| part.to_device(&device)).collect();
    Tensor::cat(parts, 0).into_data().into_vec().expect("numbers in f32")
}

struct Writer<B: Backend> {
    gradients: GradientsParams,
    seen: BTreeSet<ParamId>,
    /// The gradients in the order of the parameters, with zeros for those that have none.
    parts: Vec<Tensor<B, 1>>,
    /// A one for each parameter that has a gradient, and a zero for the others.
    present: Vec<f32>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Writer<B::InnerBackend> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if !is_new(&mut self.seen, param) {
            return;
        }
        match self.gradients.remove::<B::InnerBackend, D>(param.id) {
            Some(gradient) => {
                let size = gradient.shape().num_elements();
                self.parts.push(cast(gradient.reshape([size]), DType::F32));
                self.present.push(1.0);
            }
            None => {
                let size = [param.shape().num_elements()];
                self.parts.push(Tensor::zeros(size, (&param.device(), DType::F32)));
                self.present.push(0.0);
            }
        }
    }
}

#[derive(Default)]
struct Reader<'a> {
    gradients: GradientsParams,
    seen: BTreeSet<ParamId>,
    values: &'a [f32],
    present: Vec<bool>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Reader<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if !is_new(&mut self.seen, param) {
            return;
        }
        let (values, rest) = mem::take(&mut self.values).split_at(param.shape().num_elements());
        self.values = rest;
        if self.present[self.seen.len() - 1] {
            let data = TensorData::new(values.to_vec(), param.shape());
            let to = (&param.device(), param.dtype());
            let gradient = Tensor::<B::InnerBackend, D>::from_data(data, to);
            self.gradients.register(param.id, gradient);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::*;

    #[test]
    fn s18_all_tensors_are_fetched_as_one() {
        let device = Default::default();
        let part = |values: &[f32]| Tensor::<Flex, 1>::from_floats(values, &device);
        let parts = vec![part(&[1.0, 2.0]), part(&[]), part(&[3.0]), part(&[4.0, 5.0, 6.0])];
        assert_eq!(fetched(parts), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert!(fetched::<Flex>(vec![]).is_empty());
    }
}
