//! Adapters on stock modules, which have no LoRA layers.

mod module;
mod slot;

use std::sync::OnceLock;

use burn::{module::Module, tensor::backend::Backend};

use crate::{
    model::Lora,
    traverse::{self, statistics},
};
use slot::Slot;

pub use crate::model::IntoPlain;
pub use module::OverlayRecord;

/// A model of stock modules that can carry adapters: what has no LoRA layer, such as a stock
/// `TransformerEncoder`, `Lstm` or `Conv3d`, or a matrix of a model of your own.
///
/// An overlay is a model itself, with all methods of [`LoraModule`](crate::LoraModule): its LoRA layers are the
/// weights of the module in it. They have the paths that they would have as this crate's layers. Every weight of
/// two or more dimensions can carry an adapter. For a forward pass the weights that have one are replaced, in a copy of the module that
/// shares everything else, by `W + s·A·B`:
///
/// ```
/// use burn::{backend::{Autodiff, Flex}, nn::{LstmConfig, Lstm}, tensor::Tensor};
/// use burn_lora::{LoraConfig, LoraModule, overlay::Overlay};
///
/// # fn main() -> Result<(), burn_lora::LoraError> {
/// type B = Autodiff<Flex>;
/// let device = Default::default();
/// let lstm: Lstm<B> = LstmConfig::new(8, 16, true).init(&device);
///
/// let config = LoraConfig::new(2, 4.0).with_targets([".*_gate.input_transform"]);
/// let model = Overlay::new(lstm).attach(&config)?;
/// let x = Tensor::ones([4, 10, 8], &device);
/// let (y, _) = model.with_adapters(|lstm| lstm.forward(x, None));
/// assert_eq!(y.dims(), [4, 10, 16]);
///
/// let merged: Lstm<B> = model.merge()?;
/// let lstm: Lstm<B> = model.detach();
/// # Ok(())
/// # }
/// ```
///
/// Such adapters are *dense*: `A·B` and its gradient exist for each adapted weight, in every step. A
/// training step takes about the time and memory of full fine-tuning: 0.98 and 1.08 times as much for
/// attention of width 512, where [`LoraMultiHeadAttention`](crate::nn::LoraMultiHeadAttention) takes 0.53
/// and 0.22 (`cargo bench`). Without autodiff the weights are composed in the first pass, and kept: for
/// one row and a layer of width 1024 that pass takes 9 times as long as one of the merged layer, and
/// every later one as long as that. The adapted weights then take their memory twice. Use LoRA layers
/// where you can change the model; the paths and the adapters are the same, and what was trained on one
/// can be [switched](crate::LoraModule::switch) onto the other.
///
/// A dense adapter does not see the layer's input: dropout on it is not possible, and attaching
/// adapters with dropout is an error; loaded ones train without. A bias of the adapter is added to the
/// layer's own, which must be there. Kernels of grouped convolutions look like those of others: their
/// adapters can be saved, but PEFT does not fit them onto the layer. One module that the model holds
/// twice has two adapters.
#[derive(Clone, Debug)]
pub struct Overlay<B: Backend, M> {
    /// Boxed, since modules are moved a lot: unoptimized programs keep a copy for each move on the stack.
    model: Box<M>,
    /// Where the model can carry adapters.
    slots: Vec<Slot<B>>,
    /// The model with the adapters in its weights, once it was asked for without autodiff.
    composed: OnceLock<Box<M>>,
}

impl<B: Backend, M: Module<B>> Overlay<B, M> {
    /// The model with places for adapters. Nothing is copied or frozen. Parameters that were never used draw
    /// their values.
    pub fn new(model: M) -> Self {
        traverse::draw(&model);
        let slots = slot::find(&model);
        Self { model: Box::new(model), slots, composed: OnceLock::new() }
    }

    /// Runs `pass` on the model with the adapters in effect, and returns its result.
    ///
    /// The model that `pass` gets is good for one backward pass: a result that is kept for later must come
    /// from a call of its own. It holds for batch norms what [`Lora`] says of them.
    pub fn with_adapters<R>(&self, pass: impl FnOnce(&M) -> R) -> R {
        let mut devices =
            self.slots.iter().filter_map(|slot| Some(slot.adapter.as_ref()?.a.device()));
        let Some(device) = devices.next() else { return pass(&self.model) };
        if !B::ad_enabled(&device) {
            return pass(self.composed.get_or_init(|| Box::new(self.compose())));
        }
        let composed = self.compose();
        let result = pass(&composed);
        statistics::follow::<B, M>(&self.model, &[&composed]);
        result
    }

    fn compose(&self) -> M {
        slot::compose((*self.model).clone(), &self.slots)
    }

    /// The model itself, on which the adapters have no effect.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model without the adapters.
    pub fn into_inner(self) -> M {
        *self.model
    }
}

impl<B: Backend, M: Module<B>> Lora<B, Overlay<B, M>> {
    /// The model with everything frozen, and with places for adapters on stock modules: the same as
    /// `Lora::new(Overlay::new(model))`.
    pub fn overlay(model: M) -> Self {
        Self::new(Overlay::new(model))
    }
}

impl<B: Backend, M> IntoPlain<M> for Overlay<B, M> {
    fn into_plain(self) -> M {
        *self.model
    }
}
