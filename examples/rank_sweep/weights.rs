//! How far a model is from its base.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Tensor, backend::Backend},
};

/// The weights with two dimensions, by their layers' paths.
pub type Matrices<B> = BTreeMap<String, Tensor<B, 2>>;

/// The matrices of a model without those of `left_out`, which are modules at its top.
pub fn matrices<B: Backend, M: Module<B>>(model: &M, left_out: &[&str]) -> Matrices<B> {
    let mut reader = Reader { path: Vec::new(), matrices: Matrices::new() };
    model.visit(&mut reader);
    let mut matrices = reader.matrices;
    matrices
        .retain(|path, _| !left_out.iter().any(|module| path.split('.').next() == Some(module)));
    matrices
}

struct Reader<B: Backend> {
    path: Vec<String>,
    matrices: Matrices<B>,
}

impl<B: Backend> ModuleVisitor<B> for Reader<B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let [rows, columns] = param.dims()[..] {
            let layer = self.path[..self.path.len() - 1].join(".");
            self.matrices.insert(layer, param.val().reshape([rows, columns]));
        }
    }
}

/// What was added to each matrix.
pub fn differences<B: Backend>(tuned: Matrices<B>, base: &Matrices<B>) -> Matrices<B> {
    tuned.into_iter().map(|(path, it)| (path.clone(), it - base[&path].clone())).collect()
}

/// The Frobenius norm of all matrices together.
pub fn norm<'a, B: Backend>(matrices: impl IntoIterator<Item = &'a Tensor<B, 2>>) -> f64 {
    let squares = matrices.into_iter().map(|it| number(it.clone().square().sum()));
    squares.sum::<f64>().sqrt()
}

/// The Frobenius norm of the difference of two matrices, as a multiple of that of the second.
pub fn relative_difference<B: Backend>(new: &Tensor<B, 2>, old: &Tensor<B, 2>) -> f64 {
    norm([&(new.clone() - old.clone())]) / norm([old])
}

/// The value of a tensor with one element.
pub fn number<B: Backend>(tensor: Tensor<B, 1>) -> f64 {
    tensor.into_data().iter::<f64>().sum()
}
