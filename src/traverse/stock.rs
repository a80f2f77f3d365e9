//! Weights of stock modules that an adapter fits.

use std::collections::BTreeSet;

use burn::{
    module::{Module, Param},
    tensor::{Tensor, backend::Backend},
};

use super::walk::{self, Place, Visit};
use crate::adapter::WeightLayout;

/// A weight that an adapter fits.
#[derive(Clone, Debug)]
pub(crate) struct StockWeight {
    /// The path of the layer, or of the weight itself in a module that is not Burn's.
    pub path: String,
    /// The path of the weight.
    pub weight: String,
    /// The path of the bias that goes with it, if there is one that an adapter's can be added to.
    pub bias: Option<String>,
    pub layout: WeightLayout,
    /// The shape of the weight.
    pub dims: Vec<usize>,
}

/// The weights in a module that an adapter fits, without those of its LoRA layers.
pub(crate) fn stock_weights<B: Backend, M: Module<B>>(module: &M) -> Vec<StockWeight> {
    let taken = walk::layer_paths::<B, M>(module).into_iter().collect();
    let mut finder = Finder { taken, weights: Vec::new(), vectors: Vec::new() };
    walk::visit(module, &mut finder);
    let Finder { mut weights, vectors, .. } = finder;
    for found in &mut weights {
        let [_, d_output] = found.layout.matrix_shape(&found.dims);
        let own = match found.path.as_str() {
            "" => "bias".to_owned(),
            path => format!("{path}.bias"),
        };
        let bias = vectors.iter().find(|(path, size)| *path == own && *size == d_output);
        found.bias = bias.map(|(path, _)| path.clone());
    }
    weights
}

struct Finder {
    /// The paths of the LoRA layers.
    taken: BTreeSet<String>,
    weights: Vec<StockWeight>,
    /// Paths and sizes.
    vectors: Vec<(String, usize)>,
}

impl<B: Backend> Visit<B> for Finder {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
        if place.adapted_layer().is_some() {
            return;
        }
        let (weight, dims) = (place.path().to_owned(), param.shape().to_vec());
        if D < 2 {
            self.vectors.push((weight, dims.iter().product()));
            return;
        }
        let layout = match place.container() {
            "Struct:Embedding" => WeightLayout::Embedding,
            "Struct:Conv1d" | "Struct:Conv2d" | "Struct:Conv3d" | "Struct:DeformConv2d" => {
                WeightLayout::Conv { kernel: dims[2..].to_vec(), groups: 1 }
            }
            "Struct:ConvTranspose1d" | "Struct:ConvTranspose2d" | "Struct:ConvTranspose3d" => {
                WeightLayout::ConvTranspose { kernel: dims[2..].to_vec() }
            }
            _ => WeightLayout::Matrix,
        };
        // Adapters go by the layer's name, and so most layers, and all of Burn's, call its weight.
        let path = if place.name() == "weight" { place.module() } else { place.path() };
        if !self.taken.contains(path) {
            let path = path.to_owned();
            self.weights.push(StockWeight { path, weight, bias: None, layout, dims });
        }
    }
}
