//! What replicas must have in common.

use std::{
    collections::BTreeSet,
    fmt::{Debug, Write},
};

use burn::{
    module::{Module, Param},
    tensor::{Tensor, TensorData, backend::Backend},
};
use sha2::{Digest, Sha256};

use crate::{
    layer::LoraLayer,
    traverse::{Place, Visit, layers, visit},
};

/// A model as lines of text, for [`agree`](super::Replicas::agree): the rank and the scale of each adapter, and
/// of each float parameter its path, shape and type, whether it trains, and 16 hexadecimal digits that distinguish
/// its bits (the beginning of a SHA-256). Weights that are quantized have such digits, too.
///
/// Constants, such as the number of heads or the epsilon of a norm, are not in it: have replicas agree on the
/// configuration of the model, too. Neither are running statistics that move, which replicas need not
/// have in common; those of a frozen [`nn::BatchNorm`](crate::nn::BatchNorm) are in it.
///
/// All values are read once, which takes about a second for a gigabyte on a CPU.
pub fn fingerprint<B: Backend, M: Module<B>>(model: &M) -> String {
    let mut lines = String::new();
    for layer in layers(model, |path, layer: &dyn LoraLayer<B>| line(path, layer)) {
        lines += &layer;
    }
    let mut parameters = Parameters { lines, moving: BTreeSet::new() };
    visit(model, &mut parameters);
    parameters.lines
}

/// What no parameter tells of a layer.
fn line<B: Backend>(path: &str, layer: &dyn LoraLayer<B>) -> String {
    let adapter = layer.adapter().map(|adapter| {
        let (rank, scale, dropout) = (adapter.rank(), adapter.scale(), adapter.dropout.prob);
        format!("{path}: an adapter of rank {rank}, scale {scale} and dropout {dropout}\n")
    });
    let quantized = layer.quantized().map(|weight| {
        let [rows, columns] = weight.shape();
        let (tensors, form) = weight.to_data();
        let digits = digits(&tensors, form);
        format!("{path}: a quantized weight [{rows}, {columns}] {digits}\n")
    });
    adapter.into_iter().chain(quantized).collect()
}

/// 16 hexadecimal digits of the hash of some tensors, and of what else there is to them.
fn digits(tensors: &[TensorData], also: impl Debug) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{also:?}\n"));
    for data in tensors {
        hash.update(format!("{:?} {:?}\n", data.shape, data.dtype));
        hash.update(data.as_bytes());
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

struct Parameters {
    lines: String,
    /// The norms that train. A norm's factor comes before its statistics.
    moving: BTreeSet<String>,
}

impl<B: Backend> Visit<B> for Parameters {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
        if place.name() == "gamma" && param.is_require_grad() {
            self.moving.insert(place.module().to_owned());
        }
        let moves = place.is_shared_statistic() || self.moving.contains(place.module());
        if place.is_statistic() && moves {
            return;
        }
        let (path, dims, dtype) = (place.path(), param.dims(), param.dtype());
        let trains = if param.is_require_grad() { "trains" } else { "is frozen" };
        let digits = digits(&[param.val().into_data()], ());
        writeln!(self.lines, "{path}: {dims:?} of {dtype:?} {trains} {digits}").expect("memory");
    }
}
