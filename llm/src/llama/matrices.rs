//! The matrices of a decoder, whether they are quantized or not.

use std::iter;

use burn::tensor::{Tensor, backend::Backend};
use burn_lora::LoraLinear;

use super::{Layer, Llama};

/// The names that linear layers of a block have in one family or another.
pub(crate) const LINEAR: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
];

/// The place of a linear layer in [`LINEAR`], from its path.
pub(super) fn place(path: &str) -> usize {
    let name = path.rsplit('.').next();
    LINEAR.iter().position(|it| Some(*it) == name).expect("it is one of them")
}

impl<B: Backend> Llama<B> {
    /// The names of the linear layers of a block: the targets that PEFT calls `all-linear`.
    pub fn linear_layers(&self) -> Vec<&'static str> {
        let first = self.model.layers.iter().take(1);
        let paths = first.flat_map(|layer| layer.linear()).map(|(path, _)| path);
        paths.map(|path| path.rsplit('.').next().unwrap_or(path)).collect()
    }

    /// The weights of the table of embeddings, of the linear layers and of the head, without adapters, by the paths of
    /// these. Of a linear layer it is `[d_input, d_output]`. Each is unpacked when it is asked for.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = (String, Tensor<B, 2>)> {
        let table = iter::once_with(|| {
            let table = &self.model.embed_tokens;
            let rows = table.quantized().map_or_else(|| table.base.weight.val(), |it| it.dense());
            ("model.embed_tokens".to_owned(), rows)
        });
        let layers = self.model.layers.iter().enumerate().flat_map(|(index, layer)| {
            let path = move |name: &str| format!("model.layers.{index}.{name}");
            layer.linear().map(move |(name, linear)| (path(name), linear))
        });
        let head = self.lm_head.iter().map(|head| ("lm_head".to_owned(), head));
        table.chain(layers.chain(head).map(|(path, linear)| (path, weight(linear))))
    }
}

impl<B: Backend> Layer<B> {
    pub(super) fn linear(&self) -> impl Iterator<Item = (&'static str, &LoraLinear<B>)> {
        let Self { self_attn, mlp, .. } = self;
        let all = [
            ("self_attn.q_proj", self_attn.q_proj.as_ref()),
            ("self_attn.k_proj", self_attn.k_proj.as_ref()),
            ("self_attn.v_proj", self_attn.v_proj.as_ref()),
            ("self_attn.qkv_proj", self_attn.qkv_proj.as_ref()),
            ("self_attn.o_proj", Some(&self_attn.o_proj)),
            ("mlp.gate_proj", mlp.gate_proj.as_ref()),
            ("mlp.up_proj", mlp.up_proj.as_ref()),
            ("mlp.gate_up_proj", mlp.gate_up_proj.as_ref()),
            ("mlp.down_proj", Some(&mlp.down_proj)),
        ];
        all.into_iter().filter_map(|(name, linear)| Some((name, linear?)))
    }
}

/// The base's weight, unpacked if it is quantized.
fn weight<B: Backend>(layer: &LoraLinear<B>) -> Tensor<B, 2> {
    match layer.quantized() {
        Some(weight) => weight.dense().transpose(),
        None => layer.base.weight.val(),
    }
}
