//! Small models, for what the U-Net has not.

use std::fs;

use burn::{
    module::Module,
    nn::{
        EmbeddingConfig, LinearConfig,
        conv::{Conv2dConfig, ConvTranspose2dConfig},
    },
    tensor::backend::Backend,
};
use burn_lora::{
    LoraAdapters, LoraError, LoraLinear,
    nn::{LoraConv2d, LoraConvTranspose2d, LoraEmbedding},
    peft::Renaming,
};

use crate::model::{Plain, device};

/// A layer of each kind.
#[derive(Module, Debug)]
pub struct Toy<B: Backend> {
    pub fc: LoraLinear<B>,
    pub conv: LoraConv2d<B>,
    pub point: LoraConv2d<B>,
    pub grouped: LoraConv2d<B>,
    pub up: LoraConvTranspose2d<B>,
    pub table: LoraEmbedding<B>,
}

impl<B: Backend> Toy<B> {
    pub fn new() -> Self {
        let device = device::<B>();
        let conv = |channels, size| Conv2dConfig::new(channels, [size, size]);
        Self {
            fc: LinearConfig::new(3, 5).init(&device).into(),
            conv: conv([2, 4], 3).init(&device).into(),
            point: conv([3, 5], 1).init(&device).into(),
            grouped: conv([4, 6], 3).with_groups(2).init(&device).into(),
            up: ConvTranspose2dConfig::new([2, 3], [2, 2]).init(&device).into(),
            table: EmbeddingConfig::new(7, 3).init(&device).into(),
        }
    }
}

/// Two layers with one name in kohya's files.
#[derive(Module, Debug)]
pub struct Twins<B: Backend> {
    pub a: Twin<B>,
    pub a_b: LoraLinear<B>,
}

#[derive(Module, Debug)]
pub struct Twin<B: Backend> {
    pub b: LoraLinear<B>,
}

pub fn linear<B: Backend>() -> LoraLinear<B> {
    LinearConfig::new(3, 5).init(&device::<B>()).into()
}

pub fn twins() -> Twins<Plain> {
    Twins { a: Twin { b: linear() }, a_b: linear() }
}

/// The set in this file.
pub fn read<M: Module<Plain>>(
    bytes: &[u8],
    model: &M,
    names: &Renaming,
) -> Result<LoraAdapters<Plain>, LoraError> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set.safetensors");
    fs::write(&file, bytes).unwrap();
    LoraAdapters::load_image(&file, model, names, &device::<Plain>())
}
