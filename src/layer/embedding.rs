use burn::{
    nn::Embedding,
    tensor::{Int, Tensor, backend::Backend, module::embedding},
};

use super::{LoraLayer, module::lora_layer};
use crate::{
    adapter::{LoraAdapter, Mixed, Tie, WeightLayout},
    precision::Precision,
    quantized::{QuantizedWeight, Weight},
    tensors::{add, frozen},
};

/// A drop-in for Burn's [`Embedding`] that can carry an adapter.
///
/// The table `[n_embedding, d_model]` is the weight matrix. A forward pass does not form an update of
/// that size: it looks up the same rows in A, `[n_embedding, rank]`, and multiplies them with B,
/// `[rank, d_model]`. As in PEFT, A starts at zero and B is drawn from the normal distribution with
/// standard deviation 1. So lookups in training change only the rows that are looked up. An adapter's
/// dropout is ignored, and a bias is an error.
///
/// ```
/// use burn::{backend::Flex, nn::EmbeddingConfig, tensor::Tensor};
/// use burn_lora::{LoraConfig, nn::LoraEmbedding};
///
/// let device = Default::default();
/// let base = EmbeddingConfig::new(1000, 64).init(&device);
/// let layer: LoraEmbedding<Flex> = LoraConfig::peft(4, 8.0).init(base);
/// let x = layer.forward(Tensor::from_ints([[3, 1, 4], [1, 5, 9]], &device));
/// assert_eq!(x.dims(), [2, 3, 64]);
/// // The same table as the output projection of a language model.
/// assert_eq!(layer.project(x).dims(), [2, 3, 1000]);
/// ```
///
/// Freezing, parameter paths, files and records work as in [`LoraLinear`](crate::LoraLinear).
#[derive(Debug)]
pub struct LoraEmbedding<B: Backend> {
    /// The pretrained layer.
    pub base: Embedding<B>,
    adapter: Option<LoraAdapter<B>>,
    /// The adapters of the samples of a mixed batch.
    mixed: Option<Mixed<B>>,
    precision: Precision,
    quantized: Option<QuantizedWeight<B>>,
}

impl<B: Backend> LoraEmbedding<B> {
    /// Looks up the embeddings: indices `[batch, length]` to `[batch, length, d_model]`.
    pub fn forward(&self, input: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let [batch, length] = input.dims();
        let [_, d_model] = self.weight_shape();
        let is_empty = batch * length == 0;
        let is_plain = self.adapter.is_none() && self.mixed.is_none();
        let base = match &self.quantized {
            None if is_plain => return self.base.forward(input),
            None => embedding(frozen(&self.base.weight), input.clone()),
            Some(_) if is_empty => Tensor::zeros([batch, length, d_model], &input.device()),
            Some(table) => {
                let rows = table.select(input.clone().reshape([batch * length]));
                rows.dense().reshape([batch, length, d_model])
            }
        };
        if is_empty {
            return base;
        }
        let update = |adapter: &LoraAdapter<B>, indices: Tensor<B, 2, Int>| {
            let [batch, length] = indices.dims();
            adapter.forward_lookup(indices).reshape([batch, length, d_model])
        };
        match (&self.mixed, &self.adapter) {
            (Some(mixed), _) => mixed.add_to(base, &input, update),
            (None, Some(adapter)) => {
                let y = add(base, update(adapter, input));
                adapter.normalized(y, 2, || self.weight_matrix())
            }
            (None, None) => base,
        }
    }

    /// Uses the table as an output projection (*tied* weights): the product of each vector with each
    /// embedding, `[batch, length, d_model]` to `[batch, length, n_embedding]`.
    ///
    /// The adapter updates the projection as it updates lookups. An exception is an adapter that was
    /// loaded from a file of PEFT without `ensure_weight_tying`: in PEFT the head keeps the base's table
    /// then, and here the projection does. [Merged](crate::Lora::merge), every adapter is in the one
    /// table that is left, as in PEFT. A table that was trained in full is used by lookups and
    /// projection, which in PEFT needs `ensure_weight_tying`, too.
    ///
    /// # Panics
    ///
    /// If the last dimension of `hidden` is not `d_model`.
    pub fn project(&self, hidden: Tensor<B, 3>) -> Tensor<B, 3> {
        let [batch, length, d_model] = hidden.dims();
        let [n_embedding, expected] = self.weight_shape();
        assert!(
            d_model == expected,
            "LoraEmbedding projects [batch, length, {expected}], got {:?}",
            hidden.dims(),
        );
        if batch * length == 0 {
            // `reshape` reads a size of 0 as "keep this size", so it cannot be used here.
            return Tensor::zeros([batch, length, n_embedding], &hidden.device());
        }
        let hidden = hidden.reshape([batch * length, d_model]);
        let base = |hidden| self.projected(hidden, frozen(&self.base.weight));
        let logits = match (&self.mixed, &self.adapter) {
            (None, None) => self.projected(hidden, self.base.weight.val()),
            (Some(mixed), _) => {
                mixed.check(batch);
                mixed.change(base(hidden.clone()), &hidden, |base, adapter, hidden| {
                    match adapter.tie {
                        Tie::Leaves => base,
                        _ => add(base, adapter.forward_transposed(hidden)),
                    }
                })
            }
            (None, Some(adapter)) => match adapter.tie {
                Tie::Leaves => base(hidden),
                _ => adapter.projected(hidden, || self.weight_matrix(), base),
            },
        };
        logits.reshape([batch, length, n_embedding])
    }

    /// The product of each row with each embedding of the table, which is `table` if it is not quantized.
    fn projected(&self, rows: Tensor<B, 2>, table: Tensor<B, 2>) -> Tensor<B, 2> {
        self.transposed(table).forward(rows, None)
    }

    /// The table, which is `table` if it is not quantized, as the weight of the projection.
    fn transposed(&self, table: Tensor<B, 2>) -> Weight<B> {
        match &self.quantized {
            Some(table) => Weight::quantized(table.clone(), self.precision),
            None => Weight::full(table.transpose(), self.precision),
        }
    }

    /// The base's table as the weight of the projection, as a constant.
    pub(crate) fn base_projection(&self) -> Weight<B> {
        self.transposed(frozen(&self.base.weight))
    }

    /// Whether the samples of a batch have adapters of their own.
    pub(crate) fn is_mixed(&self) -> bool {
        self.mixed.is_some()
    }

    /// The table as the weight of the projection, if it is all that this computes with.
    pub(super) fn plain_table(&self) -> Option<Weight<B>> {
        let table = match (&self.mixed, &self.adapter) {
            (None, None) => self.base.weight.val(),
            (None, Some(adapter)) if matches!(adapter.tie, Tie::Leaves) => {
                frozen(&self.base.weight)
            }
            _ => return None,
        };
        Some(self.transposed(table))
    }

    fn layout(&self) -> WeightLayout {
        WeightLayout::Embedding
    }

    fn can_take_bias(&self) -> bool {
        false
    }

    /// Whether the projection is one operation on CPU backends.
    fn has_form(&self) -> bool {
        true
    }
}

lora_layer!(LoraEmbedding, LoraEmbeddingRecord, Embedding, 2, weight; quantized as quantised);
