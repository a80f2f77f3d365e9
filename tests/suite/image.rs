//! Files of adapters of image models: what diffusers computes with each is computed here, and it reads what is written
//! here.

mod blocks;
mod header;
mod names;
mod refused;
mod saving;
mod text;
mod toys;
mod unet;
mod unwritten;

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Tensor, TensorData};
use burn_lora::{LoraAdapters, LoraError, LoraModule};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{
    model::{Plain, device},
    oracle::{Matrix, assert_close},
};
use unet::{UNet, names};

/// The files with an output of their own.
const FILES: [&str; 10] = [
    "kohya",
    "kohya_dora",
    "kohya_tucker",
    "diffusers",
    "diffusers_dora",
    "diffusers_model",
    "diffusers_plain",
    "diffusers_old",
    "comfy",
    "comfy_alpha",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/image/fixtures").join(name)
}

thread_local! {
    /// Made once for each test.
    static BASE: UNet<Plain> = UNet::base();
}

fn load_file(path: impl AsRef<Path>) -> Result<LoraAdapters<Plain>, LoraError> {
    BASE.with(|base| LoraAdapters::load_image(path, base, &names(), &device::<Plain>()))
}

fn load(name: &str) -> LoraAdapters<Plain> {
    load_file(fixture(&format!("{name}.safetensors"))).unwrap()
}

/// A file of zeros in these shapes.
fn zeros(tensors: &[(&str, Dtype, &[usize])]) -> Vec<u8> {
    let zeros = vec![0; 4096];
    let views = tensors.iter().map(|(key, dtype, shape)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (*key, TensorView::new(*dtype, shape.to_vec(), &zeros[..bytes]).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// The inputs and outputs of diffusers.
struct Io(Vec<u8>);

impl Io {
    fn read() -> Self {
        Self(fs::read(fixture("io.safetensors")).unwrap())
    }

    fn values(&self, key: &str) -> Matrix {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let (values, _) = tensors.tensor(key).unwrap().data().as_chunks::<4>();
        let data: Vec<_> = values.iter().map(|it| f64::from(f32::from_le_bytes(*it))).collect();
        Matrix { rows: 1, cols: data.len(), data }
    }

    fn tensor<const D: usize>(&self, key: &str, shape: [usize; D]) -> Tensor<Plain, D> {
        let values = self.values(key).data.into_iter().map(|it| it as f32).collect();
        Tensor::from_data(TensorData::new::<f32, _>(values, shape), &device::<Plain>())
    }

    fn output(&self, model: &UNet<Plain>) -> Tensor<Plain, 4> {
        let (x, times) = (self.tensor("x", [2, 3, 8, 8]), self.tensor("t", [2]));
        model.forward(x, times, self.tensor("context", [2, 5, 6]))
    }
}

#[test]
fn what_diffusers_computes_with_each_file_is_computed_here() {
    let (io, base) = (Io::read(), UNet::<Plain>::base());
    assert_close(io.output(&base), &io.values("y.base"), 1e-5);
    for name in FILES {
        let adapted = base.switch(&load(name)).unwrap();
        assert_close(io.output(&adapted), &io.values(&format!("y.{name}")), 1e-5);
        assert_close(io.output(&adapted.merge().unwrap()), &io.values(&format!("y.{name}")), 1e-5);
    }
}
