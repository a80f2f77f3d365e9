//! Adapters over any module, by composing its weights for each forward pass.

mod module;
mod slot;

use std::{cell::RefCell, collections::BTreeSet, rc::Rc};

use burn::{module::Module, tensor::backend::Backend};

use crate::{LoraError, LoraLayers, LoraModule, walk};

pub use module::{LoraRecord, PlacedAdapterRecord};
use slot::{Handle, Slot};

/// Adapters over a module that knows nothing of them: a stock `TransformerEncoder`, `Lstm` or
/// `Conv3d`, or a model of your own as it is.
///
/// Every weight of two or more dimensions can carry an adapter. For each forward pass the weights
/// that have one are replaced, in a copy of the module that shares everything else, by `W + s·A·B`:
///
/// ```
/// use burn::{backend::{Autodiff, Flex}, nn::{LstmConfig, Lstm}, tensor::Tensor};
/// use burn_lora::{Lora, LoraConfig, LoraModule};
///
/// # fn main() -> Result<(), burn_lora::LoraError> {
/// type B = Autodiff<Flex>;
/// let device = Default::default();
/// let lstm: Lstm<B> = LstmConfig::new(8, 16, true).init(&device);
///
/// let config = LoraConfig::new(2, 4.0).with_targets([".*_gate.input_transform"]);
/// let model = Lora::new(lstm).attach(&config)?;
/// let x = Tensor::ones([4, 10, 8], &device);
/// let (y, _) = model.forward(|lstm| lstm.forward(x, None));
/// assert_eq!(y.dims(), [4, 10, 16]);
///
/// let lstm: Lstm<B> = model.into_merged()?;
/// # Ok(())
/// # }
/// ```
///
/// # What it costs
///
/// The dense `A·B` and its gradient exist for each adapted weight, in every step: a training step
/// takes about the time and memory of full fine-tuning: 0.98 and 1.08 times as much for attention of
/// width 512, where [`LoraMultiHeadAttention`](crate::LoraMultiHeadAttention) takes 0.53 and 0.22
/// (`cargo bench`). Use the layers with adapters inside where you can change the model. Their paths and
/// adapters are the same: what was trained through the overlay can be [switched](LoraModule::switch)
/// onto them, or loaded from its files, and the reverse.
///
/// # What it is
///
/// The overlay is a module with the base's parameters under the base's paths, and the adapters
/// beside them. The base is frozen, but for what
/// [`modules_to_save`](crate::LoraConfig::modules_to_save) names: no gradient reaches it, whatever
/// becomes of the module, and its batch norms' running statistics do not move, although the passes
/// on an autodiff backend normalise by the batch's statistics, as Burn's batch norm always does
/// there. Dropout inside the base still drops.
///
/// The record holds what trains, the adapters and the modules trained in full, and nothing of the
/// frozen base: so do checkpoints of a model that has the overlay as a field. To load one, make the
/// overlay over the same base again.
///
/// To train it with burn-train's `Learner`, make it the field of a struct of your own, for which you
/// can implement `TrainStep`; and list it in that struct's [`lora_layers`](LoraModule::lora_layers).
///
/// # What it cannot do
///
/// It does not see the layers' inputs: dropout on them is not possible, and attaching adapters with
/// dropout is an error; loaded ones train without. A bias of the adapter is added to the layer's
/// own, which must be there. Kernels of grouped convolutions look like those of others: their
/// adapters can be saved, but PEFT does not fit them onto the layer.
#[derive(Debug)]
pub struct Lora<B: Backend, M> {
    base: M,
    slots: Vec<Slot<B>>,
    /// The paths of the base's parameters that train.
    trained: BTreeSet<String>,
    has_statistics: bool,
}

impl<B: Backend, M: Module<B>> Lora<B, M> {
    /// The module without adapters, and frozen. Nothing is copied.
    ///
    /// # Panics
    ///
    /// If the module has LoRA layers of its own.
    pub fn new(base: M) -> Self {
        let found = walk::visit::<B, M>(&base);
        assert!(
            found.lora_layers.is_empty(),
            "the overlay is for modules without LoRA layers, and this one has {:?}",
            found.lora_layers,
        );
        let has_statistics = found.params.iter().any(|param| param.is_statistic);
        if has_statistics {
            walk::sync_statistics::<B, M>(&base);
        }
        let slots = slot::find::<B, M>(&base);
        let base = walk::mark_trainable(base, |_| false);
        Self { base, slots, trained: BTreeSet::new(), has_statistics }
    }

    /// Runs `pass` on the module with the adapters in effect, and returns its result.
    ///
    /// The module that `pass` gets is good for one backward pass: a result that is kept for later
    /// must come from a call of its own.
    pub fn forward<R>(&self, pass: impl FnOnce(&M) -> R) -> R {
        let effective = self.base.clone().map(&mut slot::Composer::new(&self.slots));
        if !self.has_statistics {
            return pass(&effective);
        }
        // The copy shares the cells that hold running statistics.
        let before = walk::statistics::<B, M>(&self.base);
        let result = pass(&effective);
        walk::sync_statistics::<B, M>(&self.base);
        walk::restore_statistics(self.base.clone(), before);
        result
    }

    /// The module underneath, without the adapters.
    pub fn base(&self) -> &M {
        &self.base
    }

    /// The module underneath; the adapters are dropped.
    pub fn into_base(self) -> M {
        self.base
    }

    /// The module with the adapters merged into its weights: plain, and without any overhead.
    ///
    /// # Errors
    ///
    /// [`LoraError::NotFinite`] if a merged weight would be NaN or infinite.
    pub fn into_merged(self) -> Result<M, LoraError> {
        Ok(self.merge()?.into_plain().base)
    }
}

impl<B: Backend, M: Module<B>> LoraModule<B> for Lora<B, M> {
    fn lora_layers(&mut self) -> LoraLayers<'_, B> {
        let base = Rc::new(RefCell::new(&mut self.base));
        let handles = self.slots.iter_mut().map(|slot| {
            let path = slot.path.clone();
            (path, Box::new(Handle { base: base.clone(), slot }) as Box<_>)
        });
        LoraLayers(handles.collect())
    }
}
