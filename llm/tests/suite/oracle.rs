//! What the tests compare with.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::train::Backward;

use crate::backend::{Plain, Train};

/// Expected values, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f64>,
}

pub fn device<B: Backend>() -> B::Device {
    B::Device::default()
}

/// Fails unless every element agrees within `tolerance` of the largest expected magnitude.
#[track_caller]
pub fn assert_close<B: Backend, const D: usize>(
    actual: Tensor<B, D>,
    expected: &Matrix,
    tolerance: f64,
) {
    let actual = actual.into_data().convert::<f64>().to_vec::<f64>().unwrap();
    assert_eq!(actual.len(), expected.rows * expected.cols, "number of elements");
    let largest = expected.data.iter().fold(1.0f64, |max, it| max.max(it.abs()));
    for (index, (actual, expected)) in actual.iter().zip(&expected.data).enumerate() {
        let error = (actual - expected).abs() / largest;
        assert!(error <= tolerance, "element {index}: expected {expected}, got {actual}");
    }
}

/// Fails unless every element has the same bits.
#[track_caller]
pub fn assert_identical<B1: Backend, B2: Backend, const D: usize>(
    actual: Tensor<B1, D>,
    expected: Tensor<B2, D>,
) {
    assert_eq!(actual.dims(), expected.dims());
    assert_eq!(actual.into_data().as_bytes(), expected.into_data().as_bytes());
}

/// Fails unless two passes have the same loss and the same gradients within rounding.
#[track_caller]
pub fn assert_same<M: Module<Train>>(model: &M, pass: &Backward, expected: &Backward) {
    assert!((pass.loss - expected.loss).abs() < 1e-4, "{} {}", pass.loss, expected.loss);
    let (pass, expected) = (gradients(model, pass), gradients(model, expected));
    assert!(!expected.is_empty());
    assert_eq!(Vec::from_iter(pass.keys()), Vec::from_iter(expected.keys()));
    for (id, values) in &expected {
        let largest = values.iter().fold(1.0, |largest: f64, value| largest.max(value.abs()));
        for (ours, value) in pass[id].iter().zip(values) {
            assert!((ours - value).abs() < 1e-4 * largest, "{:?} {values:?}", pass[id]);
        }
    }
}

fn gradients<M: Module<Train>>(model: &M, pass: &Backward) -> BTreeMap<ParamId, Vec<f64>> {
    struct Finder<'a>(&'a GradientsParams, BTreeMap<ParamId, Vec<f64>>);
    impl ModuleVisitor<Train> for Finder<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
            if let Some(gradient) = self.0.get::<Plain, D>(param.id) {
                self.1.insert(param.id, gradient.into_data().iter::<f64>().collect());
            }
        }
    }
    let mut finder = Finder(&pass.gradients, BTreeMap::new());
    model.visit(&mut finder);
    finder.1
}
