//! A decoder on slices in the memory of the host, which answers token by token.
//!
//! It computes what [`Llama`] computes, with the weights' own memory, by [`burn_lora::decode`]. A step reads tokens of
//! several texts, each of which has a cache and adapters of its own: parts of prompts, and tokens of answers.

mod layer;
mod set;
mod steps;
mod text;

use burn::{nn::RmsNorm, tensor::backend::Backend};
use burn_lora::{
    decode::{self, Inputs, Linear, Table},
    quantize::QuantizedWeight,
};

use super::Llama;
use crate::config::Design;
use layer::{Buffers, HostLayer};
use steps::Steps;

pub use set::HostSet;
pub use text::Text;

/// A decoder on slices. It shares the weights' memory with the [`Llama`] that it was made of.
#[derive(Debug)]
pub struct HostLlama {
    table: Table,
    layers: Vec<HostLayer>,
    norm: Norm,
    head: Linear,
    is_tied: bool,
    design: Design,
    rounds: bool,
    buffers: Buffers,
    /// The outputs of the last layer that scores are computed from.
    last: Inputs,
    scores: Vec<f32>,
}

/// A text, and what a step does with it.
#[derive(Debug)]
pub struct Step<'a> {
    /// The text.
    pub text: &'a mut Text,
    /// Its adapters; `None` for the decoder as it is.
    pub set: Option<&'a HostSet>,
    /// How many of its tokens that were not read yet are read at most.
    pub tokens: usize,
}

impl HostLlama {
    /// The decoder, with its adapters. `None` on other backends than `flex` and `ndarray`, or with
    /// [DoRA](burn_lora::LoraConfig::dora)'s magnitudes.
    ///
    /// With `exact`, all is multiplied in `f32`, but for prompts where the model is set to [bf16](burn_lora::nn::Precision).
    /// Otherwise, where a weight is held in at most 8 bits, tokens of answers are multiplied with it in 8 bits, but for the
    /// head, and adapters are held in half precision.
    pub fn of<B: Backend>(llama: &Llama<B>, exact: bool) -> Option<Self> {
        let table = &llama.model.embed_tokens;
        let table = Table::of(table, has_halves(table.quantized(), exact))?;
        let head = match &llama.lm_head {
            Some(head) => Linear::of(head, has_halves(head.quantized(), exact))?,
            None => table.projection(),
        };
        let design = llama.design.clone();
        let layers = llama.model.layers.iter().zip(&design.layers);
        let layers =
            layers.map(|(layer, of_layer)| HostLayer::of(layer, &design, *of_layer, exact));
        Some(Self {
            table,
            layers: layers.collect::<Option<_>>()?,
            norm: Norm::of(&llama.model.norm, &design),
            head,
            is_tied: llama.is_tied(),
            design,
            rounds: !exact,
            buffers: Buffers::default(),
            last: Inputs::default(),
            scores: Vec::new(),
        })
    }

    /// A text with this prompt, of which nothing is read yet.
    pub fn text(&self, prompt: Vec<u32>) -> Text {
        Text::new(prompt, self.layers.len())
    }

    /// The number of tokens that it knows.
    pub fn vocab_size(&self) -> usize {
        self.table.dims()[0]
    }

    /// Reads tokens of some texts, in one pass. The result has the scores of the token after each text that was read to its
    /// end, `[vocab_size]`, and `None` for the others.
    ///
    /// # Panics
    ///
    /// If a text has no token to be read, or one that the decoder does not know, or if it or its set was made for another
    /// decoder.
    pub fn read(&mut self, mut steps: Vec<Step>) -> Vec<Option<&mut [f32]>> {
        let usual = self.design.ropes.iter().find_map(|it| it.usual_length());
        for step in &mut steps {
            if let Some(usual) = usual {
                step.text.begin_again_beyond(usual);
            }
            assert!(
                step.text.unread() > 0 && step.tokens > 0,
                "there is nothing to read in a text"
            );
        }
        let complete: Vec<_> = steps.iter().map(|it| it.tokens >= it.text.unread()).collect();
        match steps.iter().all(|it| it.text.is_single()) {
            true => self.pass(steps),
            false => decode::in_pool(|| self.pass(steps)),
        }
        let mut scores = self.scores.chunks_exact_mut(self.table.dims()[0]);
        complete.into_iter().map(|it| if it { scores.next() } else { None }).collect()
    }

    fn pass(&mut self, steps: Vec<Step>) {
        let Self { table, layers, norm, head, design, buffers, last, scores, .. } = self;
        let [vocab_size, width] = table.dims();
        let mut steps = Steps::new(steps, design);
        buffers.x.resize(steps.rows() * width, 0.0);
        for (row, (id, x)) in steps.ids().zip(buffers.x.chunks_exact_mut(width)).enumerate() {
            table.look_up(id as usize, steps.set(row).and_then(|it| it.table.as_ref()), x);
            scale(x, design.embedding_scale);
        }
        for (index, layer) in layers.iter().enumerate() {
            layer.forward(index, &mut steps, design, self.rounds, buffers);
        }
        let ends = steps.ends();
        last.resize(ends.len(), width);
        for (row, to) in ends.iter().zip(last.numbers_mut().chunks_exact_mut(width)) {
            norm.apply(&buffers.x[row * width..][..width], to);
            scale(to, design.logit_scale);
        }
        // In `f32`: rounding here would change the order of scores that are near each other, and so the text.
        last.prepare(ends.len(), false);
        scores.resize(ends.len() * vocab_size, 0.0);
        let is_tied = self.is_tied;
        let update = |_, place: usize| {
            let set = steps.set(ends[place])?;
            match is_tied {
                true => set.table.as_ref().and_then(|it| it.projection()),
                false => set.head.as_ref(),
            }
        };
        decode::forward([&*head], last, update, [scores]);
        if let Some(cap) = design.logit_cap {
            decode::cap(scores, cap as f32);
        }
        steps.finish();
    }

    /// Whether texts that begin with the same tokens have the same keys and values. Where the length decides how tokens are
    /// turned, those of one text are not those of the other.
    pub fn shares_prefixes(&self) -> bool {
        !self.design.ropes.iter().any(|it| it.depends_on_length())
    }

    /// Has a text take over what another one, with the same adapters, has read of the prompt that both begin with, if prefixes
    /// are [shared](Self::shares_prefixes).
    pub fn take_over(&self, text: &mut Text, other: &Text) {
        if self.shares_prefixes() {
            text.take_over(other, text.common(other));
        }
    }
}

/// Whether the factors of a layer's adapters are in half precision. Where the weight is more exact, they are, too.
fn has_halves<B: Backend>(weight: Option<&QuantizedWeight<B>>, exact: bool) -> bool {
    !exact && weight.is_some_and(|it| !it.has_16_bits())
}

fn scale(numbers: &mut [f32], by: f64) {
    if by != 1.0 {
        numbers.iter_mut().for_each(|it| *it *= by as f32);
    }
}

/// The weight of a norm, and what is added to mean squares.
#[derive(Clone, Debug)]
struct Norm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl Norm {
    fn of<B: Backend>(norm: &RmsNorm<B>, design: &Design) -> Self {
        let gamma = norm.gamma.val().into_data().convert::<f32>();
        let mut weight: Vec<f32> = gamma.into_vec().expect("it was converted");
        if design.norms_add_one {
            weight.iter_mut().for_each(|it| *it += 1.0);
        }
        Self { weight, epsilon: norm.epsilon as f32 }
    }

    /// Rows of the weight's length.
    fn apply(&self, x: &[f32], y: &mut [f32]) {
        decode::norm(x, &self.weight, self.epsilon, y);
    }
}
