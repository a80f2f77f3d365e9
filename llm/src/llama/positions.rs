//! Where the tokens of a batch are.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use burn_lora::nn::AttentionMask;

use super::{Cache, Llama};
use crate::config::{LayerDesign, Rope};

/// Where the tokens of a batch are, and which others each of them sees.
#[derive(Clone, Debug)]
pub struct Positions<B: Backend> {
    /// For each rule of RoPE, the cosines and sines of the angles by which pairs of elements are turned: `[batch or 1,
    /// length, pairs]`.
    turns: Vec<[Tensor<B, 3>; 2]>,
    /// For each window.
    masks: Vec<AttentionMask<B>>,
}

/// The place of a token in its text, and how long that is.
#[derive(Clone, Copy)]
struct Place {
    position: usize,
    length: usize,
}

impl<B: Backend> Positions<B> {
    /// Which tokens a layer's tokens see, and the cosines and sines by which it turns them, if it does.
    pub(super) fn of(&self, layer: LayerDesign) -> (&AttentionMask<B>, Option<&[Tensor<B, 3>; 2]>) {
        (&self.masks[layer.window], layer.rope.map(|it| &self.turns[it]))
    }
}

impl<B: Backend> Llama<B> {
    /// Texts of `length` tokens. Each token sees itself and those before it.
    pub fn positions(&self, length: usize, device: &B::Device) -> Positions<B> {
        let places = (0..length).map(|position| Place { position, length });
        self.placed(&[places.collect()], AttentionMask::causal(length), device)
    }

    /// Rows that hold several texts each, one after the other: `[batch, length]`, where `texts` has the lengths of
    /// the texts of each row. Each text starts at position 0, and sees nothing of the others. What fills up a row
    /// to the length of the longest sees nothing at all.
    pub fn packed(&self, texts: &[Vec<usize>], device: &B::Device) -> Positions<B> {
        let mask = AttentionMask::packed(texts);
        let [total, _] = mask.dims();
        let places = texts.iter().map(|row| {
            let places =
                |&length: &usize| (0..length).map(move |position| Place { position, length });
            let mut places: Vec<_> = row.iter().flat_map(places).collect();
            places.resize(total, Place { position: 0, length: 1 });
            places
        });
        self.placed(&places.collect::<Vec<_>>(), mask, device)
    }

    /// The next `length` tokens of the texts in a cache.
    pub(super) fn next(&self, cache: &Cache<B>, length: usize, device: &B::Device) -> Positions<B> {
        let past = cache.length();
        let places = cache.lengths.iter().map(|&read| {
            let all = read + length;
            (read..all).map(|position| Place { position, length: all }).collect()
        });
        // Only what fills up a text at its beginning is not seen, and what comes later.
        let blank: Vec<_> = cache.lengths.iter().map(|read| past - read).collect();
        let seen = |text: usize, query: usize| blank[text]..past + query + 1;
        let mask = AttentionMask::new(blank.len(), length, past + length, seen);
        self.placed(&places.collect::<Vec<_>>(), mask, device)
    }

    fn placed(
        &self,
        places: &[Vec<Place>],
        mask: AttentionMask<B>,
        device: &B::Device,
    ) -> Positions<B> {
        let turns = self.design.ropes.iter();
        let turns = turns.map(|rope| [f64::cos, f64::sin].map(|of| rope.table(places, of, device)));
        let masks = self.design.windows.iter().map(|window| match window {
            Some(size) => mask.clone().window(*size),
            None => mask.clone(),
        });
        Positions { turns: turns.collect(), masks: masks.collect() }
    }
}

impl Rope {
    /// A function of the angle of each pair of each token: `[batch, length, pairs]`.
    fn table<B: Backend>(
        &self,
        places: &[Vec<Place>],
        of: fn(f64) -> f64,
        device: &B::Device,
    ) -> Tensor<B, 3> {
        let shape = [places.len(), places[0].len(), self.frequencies.len()];
        let mut values = Vec::with_capacity(shape.iter().product());
        for text in places {
            // The tokens of a text come one after the other.
            for text in text.chunk_by(|one, next| one.length == next.length) {
                let frequencies = self.frequencies_at(text[0].length);
                values.extend(text.iter().flat_map(|place| {
                    let position = place.position as f64;
                    let value = move |it: &f64| (self.amplitude * of(position * it)) as f32;
                    frequencies.iter().map(value)
                }));
            }
        }
        Tensor::from_data(TensorData::new(values, shape), device)
    }
}
