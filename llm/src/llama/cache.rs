//! What a decoder remembers of texts that it goes on with.

use burn::tensor::{Int, Tensor, backend::Backend};

/// The keys and values of the tokens that were read, so that they are not computed again for the next.
#[derive(Clone, Debug)]
pub struct Cache<B: Backend> {
    /// For each layer, the keys and the values: `[batch, length, key_value_heads · head_dim]`. Shorter texts
    /// are filled up at their beginning, so that all go on at the same place.
    pub(super) layers: Vec<Option<[Tensor<B, 3>; 2]>>,
    /// The length of each text.
    pub(super) lengths: Vec<usize>,
    /// The tokens of each text, if the decoder may have to read a text again.
    pub(super) ids: Vec<Vec<i32>>,
}

impl<B: Backend> Cache<B> {
    /// The texts of all caches in one, in their order. Panics if one is empty.
    pub fn join(caches: &[Self]) -> Self {
        let lengths: Vec<_> = caches.iter().flat_map(|it| it.lengths.clone()).collect();
        let total = caches.iter().map(Self::length).max().unwrap_or(0);
        let filled = |cache: &Self, layer: usize, part: usize| {
            let part = cache.layers[layer].as_ref().expect("texts were read")[part].clone();
            let [batch, length, width] = part.dims();
            match total - length {
                0 => part,
                missing => {
                    let blank = Tensor::zeros([batch, missing, width], &part.device());
                    Tensor::cat(vec![blank, part], 1)
                }
            }
        };
        let joined = |layer| {
            let parts = |part| caches.iter().map(|it| filled(it, layer, part)).collect();
            Some([0, 1].map(|part| Tensor::cat(parts(part), 0)))
        };
        let depth = caches.first().map_or(0, |it| it.layers.len());
        let ids = caches.iter().flat_map(|it| it.ids.clone()).collect();
        Self { layers: (0..depth).map(joined).collect(), lengths, ids }
    }

    /// The cache of these texts alone, in this order.
    pub fn select(self, texts: &[usize]) -> Self {
        let lengths: Vec<_> = texts.iter().map(|&text| self.lengths[text]).collect();
        let (total, needed) = (self.length(), lengths.iter().copied().max().unwrap_or(0));
        let indices: Vec<_> = texts.iter().map(|&text| text as i32).collect();
        let layers = self.layers.into_iter().map(|layer| {
            let chosen = |part: Tensor<B, 3>| {
                let indices = Tensor::<B, 1, Int>::from_ints(&*indices, &part.device());
                part.select(0, indices).narrow(1, total - needed, needed)
            };
            layer.map(|parts| parts.map(chosen))
        });
        let ids = texts.iter().filter_map(|&text| self.ids.get(text).cloned()).collect();
        Self { layers: layers.collect(), lengths, ids }
    }

    /// The length of the longest text.
    pub(super) fn length(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }
}

/// A layer's part of a cache, if there is one.
pub(super) type Cached<'a, B> = Option<&'a mut Option<[Tensor<B, 3>; 2]>>;
