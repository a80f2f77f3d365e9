//! Reading on after texts in a cache.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};

use super::{Cache, Llama};

impl<B: Backend> Llama<B> {
    /// An empty cache.
    pub fn cache(&self) -> Cache<B> {
        Cache { layers: vec![None; self.depth()], lengths: Vec::new(), ids: Vec::new() }
    }

    /// Reads on after the texts in the cache: `[batch, length]` to the scores of the token after the last of
    /// each, `[batch, vocab_size]`.
    ///
    /// Where RoPE turns long texts otherwise (longrope), a text that becomes long is read again from its beginning, as
    /// in `transformers`.
    pub fn read(&self, ids: Tensor<B, 2, Int>, cache: &mut Cache<B>) -> Tensor<B, 2> {
        let [batch, length] = ids.dims();
        cache.lengths.resize(batch, 0);
        let usual = self.design.ropes.iter().find_map(|it| it.usual_length());
        let Some(usual) = usual else { return self.read_on(ids, cache) };
        cache.ids.resize(batch, Vec::new());
        let new: Vec<i32> = ids.to_data().iter().collect();
        cache.ids.iter_mut().zip(new.chunks(length)).for_each(|(all, new)| all.extend(new));
        let becomes_long = |read: usize| (1..=usual).contains(&read) && read + length > usual;
        if !cache.lengths.iter().any(|&read| becomes_long(read)) {
            return self.read_on(ids, cache);
        }
        let read = |text: usize| {
            let mut own = cache.clone().select(&[text]);
            let mut new = ids.clone().narrow(0, text, 1);
            if becomes_long(own.lengths[0]) {
                let all = own.ids[0].clone();
                let data = TensorData::new(all, [1, own.ids[0].len()]);
                new = Tensor::from_data(data, &new.device());
                own = Cache { ids: own.ids, lengths: vec![0], ..self.cache() };
            }
            (self.read_on(new, &mut own), own)
        };
        let (scores, caches): (Vec<_>, Vec<_>) = (0..batch).map(read).unzip();
        *cache = Cache::join(&caches);
        Tensor::cat(scores, 0)
    }

    fn read_on(&self, ids: Tensor<B, 2, Int>, cache: &mut Cache<B>) -> Tensor<B, 2> {
        let [_, length] = ids.dims();
        let positions = self.next(cache, length, &ids.device());
        let mut x = self.embed(ids);
        let layers = self.model.layers.iter().zip(&self.design.layers);
        for ((layer, &of_layer), cached) in layers.zip(&mut cache.layers) {
            x = layer.forward(x, &self.design, of_layer, &positions, &mut Some(cached));
        }
        cache.lengths.iter_mut().for_each(|read| *read += length);
        let last = x.narrow(1, length - 1, 1);
        self.logits(last).squeeze_dim(1)
    }
}
