use burn::{
    module::Module,
    nn::{
        Dropout,
        attention::{MhaOutput, MultiHeadAttention},
    },
    tensor::{
        Bool, Tensor,
        activation::{quiet_softmax, softmax},
        backend::Backend,
    },
};

use super::{AttentionMask, AttentionOptions, LoraLinear, attention, fresh, swap_heads};
use crate::{config::LoraConfig, ops::runs_on, tensors::cat};

/// A drop-in for Burn's [`MultiHeadAttention`] whose four projections can carry adapters.
///
/// ```
/// use burn::{backend::Flex, nn::attention::MultiHeadAttentionConfig, tensor::Tensor};
/// use burn_lora::{LoraConfig, nn::LoraMhaInput};
///
/// let device = Default::default();
/// let base = MultiHeadAttentionConfig::new(64, 4).init::<Flex>(&device);
/// // On the queries and values, the paper's choice; `with_targets` makes another.
/// let attention = LoraConfig::peft(4, 8.0).init_attention(base);
/// let x = Tensor::ones([2, 5, 64], &device);
/// let y = attention.context(LoraMhaInput::self_attn(x));
/// assert_eq!(y.dims(), [2, 5, 64]);
/// ```
///
/// It supports everything that the base supports, including masks, caches and quiet softmax. Its
/// parameters have the base's paths (`query.weight`, …). Input and cache are types of this crate,
/// because the fields of Burn's types are private. They have the same constructors as Burn's types.
#[derive(Module, Debug)]
pub struct LoraMultiHeadAttention<B: Backend> {
    /// The projection to the queries.
    pub query: LoraLinear<B>,
    /// The projection to the keys.
    pub key: LoraLinear<B>,
    /// The projection to the values.
    pub value: LoraLinear<B>,
    /// The projection of the heads' outputs back to `d_model`.
    pub output: LoraLinear<B>,
    /// The dropout on the scores.
    pub dropout: Dropout,
    /// The size of inputs and outputs.
    pub d_model: usize,
    /// The number of heads.
    pub n_heads: usize,
    /// The size of a head's queries and keys.
    pub d_k: usize,
    /// The value that masked scores are set to.
    pub min_float: f64,
    /// Whether quiet softmax is used, with which a head can attend to nothing.
    pub quiet_softmax: bool,
}

impl<B: Backend> From<MultiHeadAttention<B>> for LoraMultiHeadAttention<B> {
    /// The layer without adapters; nothing is copied or frozen.
    fn from(base: MultiHeadAttention<B>) -> Self {
        Self {
            query: base.query.into(),
            key: base.key.into(),
            value: base.value.into(),
            output: base.output.into(),
            dropout: base.dropout,
            d_model: base.d_model,
            n_heads: base.n_heads,
            d_k: base.d_k,
            min_float: base.min_float,
            quiet_softmax: base.quiet_softmax,
        }
    }
}

impl LoraConfig {
    /// Puts fresh adapters on the projections of a trained attention layer that
    /// [`targets`](Self::targets) names. If `targets` is empty, the projections to the queries and
    /// values get adapters, as in the paper.
    ///
    /// # Panics
    ///
    /// If a value of the configuration is invalid, or a target is not one of `query`, `key`, `value`
    /// and `output`.
    pub fn init_attention<B: Backend>(
        &self,
        base: MultiHeadAttention<B>,
    ) -> LoraMultiHeadAttention<B> {
        let config = match self.targets.is_empty() {
            true => self.clone().with_targets(["query", "value"]),
            false => self.clone(),
        };
        let mut attention = LoraMultiHeadAttention::from(base.no_grad());
        let LoraMultiHeadAttention { query, key, value, output, .. } = &mut attention;
        let mut projections =
            [("query", query), ("key", key), ("value", value), ("output", output)];
        let paths = projections.each_ref().map(|(path, _)| (*path).to_owned());
        let plan = config.resolve(&paths).unwrap_or_else(|error| panic!("{error}"));
        for (path, layer) in &mut projections {
            if let Some(config) = plan.get(path) {
                layer.set_adapter(Some(fresh(config, *layer)));
            }
        }
        attention
    }
}

/// The input of a [`LoraMultiHeadAttention`].
#[derive(Clone, Debug)]
pub struct LoraMhaInput<B: Backend> {
    query: Tensor<B, 3>,
    /// The keys and values; `None` if they are the queries.
    key_value: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
    mask_pad: Option<Tensor<B, 2, Bool>>,
    mask_attn: Option<Tensor<B, 3, Bool>>,
}

impl<B: Backend> LoraMhaInput<B> {
    /// A sequence that attends to itself: `[batch, length, d_model]`.
    pub fn self_attn(tensor: Tensor<B, 3>) -> Self {
        Self { query: tensor, key_value: None, mask_pad: None, mask_attn: None }
    }

    /// Queries `[batch, length_1, d_model]` that attend to keys and values
    /// `[batch, length_2, d_model]`.
    pub fn new(query: Tensor<B, 3>, key: Tensor<B, 3>, value: Tensor<B, 3>) -> Self {
        Self { key_value: Some((key, value)), ..Self::self_attn(query) }
    }

    /// Sets which keys are padding: `[batch, length_2]`.
    pub fn mask_pad(mut self, mask_pad: Tensor<B, 2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// Sets which keys each query must not see: `[batch, length_1, length_2]`.
    pub fn mask_attn(mut self, mask_attn: Tensor<B, 3, Bool>) -> Self {
        self.mask_attn = Some(mask_attn);
        self
    }

    fn parts(&self) -> [Tensor<B, 3>; 3] {
        let (key, value) =
            self.key_value.clone().unwrap_or((self.query.clone(), self.query.clone()));
        [self.query.clone(), key, value]
    }
}

/// The cache of a [`LoraMultiHeadAttention`] for a sequence that grows token by token.
#[derive(Clone, Debug)]
pub struct LoraMhaCache<B: Backend> {
    query: Cached<B, 4>,
    key: Cached<B, 4>,
    value: Cached<B, 4>,
    output: Cached<B, 3>,
}

impl<B: Backend> LoraMhaCache<B> {
    /// A cache for a sequence that attends to itself. After the first call, only the last position of
    /// each input is new.
    pub fn autoregressive() -> Self {
        let (query, key, value) = (Cached::growing(2), Cached::growing(2), Cached::growing(2));
        Self { query, key, value, output: Cached::growing(1) }
    }

    /// A cache for a sequence that attends to another sequence. The keys and values of the other
    /// sequence are computed once.
    pub fn autoregressive_cross_attention() -> Self {
        Self { key: Cached::fixed(), value: Cached::fixed(), ..Self::autoregressive() }
    }
}

/// The result of a projection, kept from call to call.
#[derive(Clone, Debug)]
struct Cached<B: Backend, const D: usize> {
    value: Option<Tensor<B, D>>,
    /// The dimension along which the result grows; `None` if it does not grow.
    grows: Option<usize>,
}

impl<B: Backend, const D: usize> Cached<B, D> {
    fn growing(dim: usize) -> Self {
        Self { value: None, grows: Some(dim) }
    }

    fn fixed() -> Self {
        Self { value: None, grows: None }
    }

    fn extend(
        &mut self,
        input: Tensor<B, 3>,
        project: impl Fn(Tensor<B, 3>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let value = match (self.value.take(), self.grows) {
            (None, _) => project(input),
            (Some(known), None) => known,
            (Some(known), Some(dim)) => {
                let last = input.dims()[1] - 1;
                cat(&[known, project(input.narrow(1, last, 1))], dim)
            }
        };
        self.value = Some(value.clone());
        value
    }
}

impl<B: Backend> LoraMultiHeadAttention<B> {
    /// Applies the layer: the context is `[batch, length_1, d_model]`, and the weights are
    /// `[batch, n_heads, length_1, length_2]`.
    pub fn forward(&self, input: LoraMhaInput<B>) -> MhaOutput<B> {
        let [batch, length_1, _] = input.query.dims();
        let length_2 = input.key_value.as_ref().map_or(length_1, |(key, _)| key.dims()[1]);
        if batch * length_1 * length_2 == 0 {
            // Batched products of empty tensors crash on Burn's flex backend.
            let device = input.query.device();
            return MhaOutput {
                weights: Tensor::zeros([batch, self.n_heads, length_1, length_2], &device),
                context: self.output.forward(Tensor::zeros(input.query.dims(), &device)),
            };
        }
        let [query, key, value] = self.projected(&input).map(swap_heads);
        let weights = self.weights(query, key, &input);
        let context = self.output.forward(self.mean(&weights, value));
        MhaOutput { weights, context }
    }

    /// The [`context`](MhaOutput::context) of [`forward`](Self::forward) alone: `[batch, length_1, d_model]`.
    ///
    /// On the CPU backends of the features `flex` and `ndarray` the weights, `[batch, n_heads, length_1, length_2]`,
    /// are then never there as a whole: see [`attention`]. That needs masks that leave each query one run of keys,
    /// as padding and causal masks do, and no dropout. Otherwise, and on other backends, `forward` computes it.
    pub fn context(&self, input: LoraMhaInput<B>) -> Tensor<B, 3> {
        match self.mask(&input) {
            Some(mask) => {
                let [query, key, value] = self.projected(&input);
                let options = AttentionOptions {
                    quiet: self.quiet_softmax,
                    precision: self.query.precision(),
                    ..Default::default()
                };
                let context = attention(query, key, value, &mask, &options);
                self.output.forward(context.flatten(2, 3))
            }
            None => self.forward(input).context,
        }
    }

    /// The masks of the input as one, where attention is a single operation, and computes what `forward` does.
    fn mask(&self, input: &LoraMhaInput<B>) -> Option<AttentionMask<B>> {
        /// From here on, a masked score has the weight 0.
        const HIDES: f64 = -1e4;

        let [batch, length_1, _] = input.query.dims();
        let length_2 = input.key_value.as_ref().map_or(length_1, |(key, _)| key.dims()[1]);
        let dropout = self.dropout.prob > 0.0 && B::ad_enabled(&input.query.device());
        let fits = runs_on::<B>()
            && !dropout
            && self.min_float <= HIDES
            && self.d_k * self.n_heads == self.d_model
            && batch * length_1 * length_2 > 0;
        if !fits {
            return None;
        }
        let (padding, hidden) = (input.mask_pad.clone(), input.mask_attn.clone());
        AttentionMask::of_hidden(padding, hidden, [batch, length_1, length_2])
    }

    /// The queries, keys and values: `[batch, length, n_heads, d_k]`.
    fn projected(&self, input: &LoraMhaInput<B>) -> [Tensor<B, 4>; 3] {
        match &input.key_value {
            // Queries, keys and values are projected from one reshaped copy of the input.
            None => {
                let [batch, length, _] = input.query.dims();
                let rows = input.query.clone().flatten::<2>(0, 1);
                [&self.query, &self.key, &self.value]
                    .map(|layer| self.split(layer.forward(rows.clone()), [batch, length]))
            }
            Some(_) => {
                let [query, key, value] = input.parts();
                [(query, &self.query), (key, &self.key), (value, &self.value)]
                    .map(|(x, layer)| self.project(x, layer))
            }
        }
    }

    /// Applies the layer to a sequence that has grown by one position since the last call with the
    /// same cache. The shapes are those of [`forward`](Self::forward). Like the base's caches, this is
    /// meant for inference.
    pub fn forward_cache(
        &self,
        input: LoraMhaInput<B>,
        cache: &mut LoraMhaCache<B>,
    ) -> MhaOutput<B> {
        let [query, key, value] = input.parts();
        let query = cache.query.extend(query, |x| swap_heads(self.project(x, &self.query)));
        let key = cache.key.extend(key, |x| swap_heads(self.project(x, &self.key)));
        let value = cache.value.extend(value, |x| swap_heads(self.project(x, &self.value)));
        let weights = self.weights(query, key, &input);
        let context = self.mean(&weights, value);
        let context = cache.output.extend(context, |x| self.output.forward(x));
        MhaOutput { weights, context }
    }

    fn project(&self, x: Tensor<B, 3>, layer: &LoraLinear<B>) -> Tensor<B, 4> {
        let [batch, length, _] = x.dims();
        self.split(layer.forward(x.flatten::<2>(0, 1)), [batch, length])
    }

    /// Splits `[batch · length, d_model]` into `[batch, length, n_heads, d_k]`.
    fn split(&self, rows: Tensor<B, 2>, [batch, length]: [usize; 2]) -> Tensor<B, 4> {
        rows.reshape([batch, length, self.n_heads, self.d_k])
    }

    fn weights(
        &self,
        query: Tensor<B, 4>,
        key: Tensor<B, 4>,
        input: &LoraMhaInput<B>,
    ) -> Tensor<B, 4> {
        let scores = query.matmul(key.transpose()).div_scalar((self.d_k as f32).sqrt());
        let mut scores = self.dropout.forward(scores);
        if let Some(mask) = input.mask_pad.clone() {
            let [batch, length] = mask.dims();
            scores = scores.mask_fill(mask.reshape([batch, 1, 1, length]), self.min_float);
        }
        if let Some(mask) = input.mask_attn.clone() {
            let [batch, length_1, length_2] = mask.dims();
            let mask = mask.reshape([batch, 1, length_1, length_2]);
            scores = scores.mask_fill(mask, self.min_float);
        }
        if self.quiet_softmax { quiet_softmax(scores, 3) } else { softmax(scores, 3) }
    }

    /// The mean of the values by these weights.
    fn mean(&self, weights: &Tensor<B, 4>, value: Tensor<B, 4>) -> Tensor<B, 3> {
        let [batch, _, length, _] = weights.dims();
        let context = swap_heads(weights.clone().matmul(value));
        context.reshape([batch, length, self.d_model])
    }
}
