//! Low-rank adaptation ([LoRA, Hu et al. 2021](https://arxiv.org/abs/2106.09685)) for the
//! [Burn](https://burn.dev) deep-learning framework.
//!
//! LoRA adapts a trained model to a new task without training it: the weights stay frozen, and each
//! weight matrix W gets an update of low rank, the product of two thin matrices A and B, which is
//! learned in its place:
//!
//! ```text
//! y = x·W + b + s·(x·A)·B
//! ```
//!
//! The adapters are a few percent of the model. Training them takes less time and memory than training
//! the model, they are kept as small files, many sets of them share one base, and merged into the
//! weights they cost nothing.
//!
//! # A program
//!
//! Put this crate's layers where Burn's would stand. Nothing has to be implemented for the model:
//!
//! ```no_run
//! use burn::{
//!     backend::{Autodiff, Flex},
//!     module::Module,
//!     nn::{Linear, LinearConfig},
//!     optim::{AdamConfig, GradientsParams, Optimizer},
//!     tensor::{Distribution, Tensor, activation::relu, backend::Backend},
//! };
//! use burn_lora::{LoraAdapters, LoraConfig, LoraLinear, LoraModule};
//!
//! #[derive(Module, Debug)]
//! struct Net<B: Backend> {
//!     body: Vec<LoraLinear<B>>,
//!     head: Linear<B>,
//! }
//!
//! impl<B: Backend> Net<B> {
//!     fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
//!         self.head.forward(self.body.iter().fold(x, |x, layer| relu(layer.forward(x))))
//!     }
//! }
//!
//! # fn main() -> Result<(), burn_lora::LoraError> {
//! type B = Autodiff<Flex>;
//! let device = Default::default();
//! let base: Net<B> = Net {
//!     body: vec![LinearConfig::new(784, 256).init(&device).into()],
//!     head: LinearConfig::new(256, 10).init(&device),
//! }; // and the weights from a checkpoint
//!
//! // Adapters of rank 8 on the LoRA layers. The head trains in full, and all else is frozen.
//! let config = LoraConfig::peft(8, 16.0).with_modules_to_save(["head"]);
//! let mut model = base.attach(&config)?;
//! println!("{}", model.parameters());
//!
//! // Any Burn training loop, or the Learner.
//! let mut optimizer = AdamConfig::new().init();
//! let x = Tensor::random([32, 784], Distribution::Default, &device);
//! let loss = model.forward(x).square().mean();
//! let grads = GradientsParams::from_grads(loss.backward(), &model);
//! model = optimizer.step(1e-3, model, grads);
//!
//! // Everything that was trained, in a directory that Python's PEFT reads, too.
//! model.adapters().save("adapters/digits")?;
//! let served = base.switch(&LoraAdapters::load("adapters/digits", &device)?)?;
//!
//! let plain: Net<B> = served.merge()?; // a plain model, at no extra cost
//! let original: Net<B> = served.detach(); // the base, to the bit
//! # Ok(())
//! # }
//! ```
//!
//! # Where to go from here
//!
//! - [`LoraConfig`]: rank, scale, which layers, what trains next to them.
//! - [`LoraModule`] and [`Lora`]: what can be done with a model, and with an adapted one. [`Lora::overlay`]
//!   adapts stock modules as they are.
//! - [`LoraLinear`], and in [`nn`] the other layers, and functions for models of your own.
//! - [`LoraAdapters`]: adapters as values and files. [`adapters`] has what combining them needs, [`peft`] their
//!   names in Python.
//! - [`image`]: files of image models, of kohya's programs, diffusers and ComfyUI.
//! - [`quantize`]: a base in 4, 8 or 16 bits.
//! - [`serve`]: many sets of adapters at once, and from directories.
//! - [`decode`]: layers on slices, for programs that answer token by token.
//! - [`train`]: LoRA+ and checkpoints; less time by workers, less memory by segments, several machines.
//! - [`LoraAdapter`]: the formula itself.
//! - [First steps](first_steps): checkpoints from elsewhere, nested models, threads, exporting, and what
//!   PEFT's functions are called here.
//!
//! # Features
//!
//! The library is generic over Burn's [`Backend`](burn::tensor::backend::Backend) and needs none. `flex`
//! and `ndarray` give linear layers a faster way on these CPU backends; name the one that you use. With the
//! environment variable `BURN_LORA_PORTABLE=1` Burn's operations are used there, too, to compare with.

mod adapter;
pub mod adapters;
mod burn_faults;
mod config;
pub mod decode;
mod decomposition;
pub mod error;
mod files;
mod formats;
mod gguf_file;
mod layer;
mod model;
mod ops;
pub mod overlay;
mod pattern;
mod precision;
mod products;
mod quantized;
pub mod serve;
mod table;
mod tensors;
pub mod train;
mod traverse;

pub use adapter::LoraAdapter;
pub use adapters::LoraAdapters;
pub use config::{Init, LoraConfig, Scaling};
pub use error::LoraError;
pub use layer::LoraLinear;
pub use model::{Lora, LoraModule};

/// Layers that can carry an adapter, and functions for models of one's own.
///
/// Each layer is a drop-in for one of Burn's: it has the same outputs, parameter paths and files.
/// [`LoraLinear`] is the simplest of them, and the one to read first.
pub mod nn {
    #[doc(no_inline)]
    pub use crate::LoraLinear;
    pub use crate::layer::{
        Adaptable, AttentionMask, AttentionOptions, BatchNorm, Foldable, LoraConv1d, LoraConv2d,
        LoraConvTranspose2d, LoraEmbedding, LoraMhaCache, LoraMhaInput, LoraMultiHeadAttention,
        attention, geglu, gelu, group_norm, layer_norm, rms_norm, rotate, soft_cap, swap_heads,
        swiglu,
    };
    pub use crate::precision::Precision;
}

/// The names that a model has in Python.
///
/// The files themselves are read and written by [`LoraAdapters::load`] and [`save`](LoraAdapters::save).
pub mod peft {
    pub use crate::adapters::renaming::Renaming;
}

/// Files of adapters of image models.
///
/// They are read and written by [`LoraAdapters::load_image`] and [`save_image`](LoraAdapters::save_image).
pub mod image {
    pub use crate::formats::ImageFormat;
}

/// Bases in 4, 8 and 16 bits.
///
/// [`LoraModule::quantize`] rounds the weights of a model; [`LoraModule::with_quantized`] puts in those of a file,
/// bit by bit.
pub mod quantize {
    pub use crate::model::{QuantizationReport, QuantizeConfig, QuantizedLayer};
    pub use crate::quantized::{GgufType, Quantization, QuantizedWeight, QuantizedWeightItem};
}

/// Files in the [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) format, which llama.cpp and what is
/// built on it read.
///
/// Adapters are read and written by [`LoraAdapters::load_gguf`] and [`save_gguf`](LoraAdapters::save_gguf), for which a
/// [`Family`](gguf::Family) says how a model's layers are called there. [`Gguf`](gguf::Gguf) and
/// [`write()`](gguf::write) are for all other files.
pub mod gguf {
    pub use crate::{
        formats::Family,
        gguf_file::{
            Field, Gguf, NewTensor, Packed, Packing, WRITER, halves_to_pairs, pairs_to_halves,
            paths, write,
        },
    };
}

/// What trains in a model, and tables like those of this crate's reports.
pub mod report {
    pub use crate::{
        model::{LayerReport, ParameterReport},
        table::{grouped, table},
    };
}

/// What checkpoints hold. These types are the `Record` of this crate's modules; there is no need to name them.
pub mod record {
    pub use crate::adapter::LoraAdapterRecord;
    pub use crate::layer::{
        BatchNormRecord, LoraConv1dRecord, LoraConv2dRecord, LoraConvTranspose2dRecord,
        LoraEmbeddingRecord, LoraLinearRecord, LoraMultiHeadAttentionRecord,
    };
    pub use crate::model::{LoraRecord, ParameterRecord, PlacedAdapterRecord};
}

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/first-steps.md")]
pub mod first_steps {}

/// So that the programs in the README and in the guide are compiled and run as those here are.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    mod readme {}
    #[doc = include_str!("../docs/guide/what-lora-is.md")]
    mod what_lora_is {}
    #[doc = include_str!("../docs/guide/first-adapter.md")]
    mod first_adapter {}
    #[doc = include_str!("../docs/guide/choosing.md")]
    mod choosing {}
    #[doc = include_str!("../docs/guide/many-tasks.md")]
    mod many_tasks {}
    #[doc = include_str!("../docs/guide/coming-from-peft.md")]
    mod coming_from_peft {}
    #[doc = include_str!("../docs/relatives.md")]
    mod relatives {}
    #[doc = include_str!("../docs/layers.md")]
    mod layers {}
}
