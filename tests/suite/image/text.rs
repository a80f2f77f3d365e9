//! A text encoder: the `CLIPTextModel` of `tests/image/make_fixtures.py`. Most files have adapters for it and for the
//! U-Net, which are two models here.

use burn::{
    module::Module,
    nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, LinearConfig},
    tensor::{
        Int, Tensor,
        activation::{sigmoid, softmax},
        backend::Backend,
    },
};
use burn_lora::{LoraAdapters, LoraLinear, LoraModule, peft::Renaming};
use burn_store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};

use super::{Io, fixture};
use crate::{
    model::{Plain, device},
    oracle::assert_close,
};

const WIDTH: usize = 8;
const HEADS: usize = 2;
const LENGTH: usize = 7;

#[derive(Module, Debug)]
pub struct TextEncoder<B: Backend> {
    embeddings: Embeddings<B>,
    encoder: Encoder<B>,
    final_layer_norm: LayerNorm<B>,
}

#[derive(Module, Debug)]
struct Embeddings<B: Backend> {
    token_embedding: Embedding<B>,
    position_embedding: Embedding<B>,
}

#[derive(Module, Debug)]
struct Encoder<B: Backend> {
    layers: Vec<Layer<B>>,
}

#[derive(Module, Debug)]
struct Layer<B: Backend> {
    layer_norm1: LayerNorm<B>,
    self_attn: Attention<B>,
    layer_norm2: LayerNorm<B>,
    mlp: Mlp<B>,
}

#[derive(Module, Debug)]
struct Attention<B: Backend> {
    q_proj: LoraLinear<B>,
    k_proj: LoraLinear<B>,
    v_proj: LoraLinear<B>,
    out_proj: LoraLinear<B>,
}

#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    fc1: LoraLinear<B>,
    fc2: LoraLinear<B>,
}

/// From the names in Python to the paths here, which have no part.
pub fn names() -> Renaming {
    Renaming::new([("text_encoder.text_model.encoder", "encoder")])
}

impl<B: Backend> Layer<B> {
    fn new() -> Self {
        let linear = |d_input, d_output| -> LoraLinear<B> {
            LinearConfig::new(d_input, d_output).init(&device::<B>()).into()
        };
        let norm = || LayerNormConfig::new(WIDTH).init(&device::<B>());
        let square = || linear(WIDTH, WIDTH);
        Self {
            layer_norm1: norm(),
            self_attn: Attention {
                q_proj: square(),
                k_proj: square(),
                v_proj: square(),
                out_proj: square(),
            },
            layer_norm2: norm(),
            mlp: Mlp { fc1: linear(WIDTH, 12), fc2: linear(12, WIDTH) },
        }
    }

    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let normed = self.layer_norm1.forward(x.clone());
        let x = x + self.self_attn.forward(normed);
        let hidden = self.mlp.fc1.forward(self.layer_norm2.forward(x.clone()));
        // The quick approximation of GELU.
        let hidden = hidden.clone() * sigmoid(hidden * 1.702);
        x + self.mlp.fc2.forward(hidden)
    }
}

impl<B: Backend> Attention<B> {
    /// A token sees itself and those before it.
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [batch, length, _] = x.dims();
        let [query, key, value] = [&self.q_proj, &self.k_proj, &self.v_proj].map(|layer| {
            let heads = layer.forward(x.clone()).reshape([batch, length, HEADS, WIDTH / HEADS]);
            heads.swap_dims(1, 2)
        });
        let scores = query.matmul(key.swap_dims(2, 3)) / ((WIDTH / HEADS) as f64).sqrt();
        let hidden = Tensor::<B, 2>::ones([length, length], &x.device()).triu(1) * -1e9;
        let weights = softmax(scores + hidden.unsqueeze::<4>(), 3);
        let y = weights.matmul(value).swap_dims(1, 2).reshape([batch, length, WIDTH]);
        self.out_proj.forward(y)
    }
}

impl<B: Backend> TextEncoder<B> {
    /// The base that the fixtures were made for.
    pub fn base() -> Self {
        let device = device::<B>();
        let mut model = Self {
            embeddings: Embeddings {
                token_embedding: EmbeddingConfig::new(20, WIDTH).init(&device),
                position_embedding: EmbeddingConfig::new(LENGTH, WIDTH).init(&device),
            },
            encoder: Encoder { layers: vec![Layer::new(), Layer::new()] },
            final_layer_norm: LayerNormConfig::new(WIDTH).init(&device),
        };
        let store = SafetensorsStore::from_file(fixture("base_text.safetensors"));
        let result = model.load_from(&mut store.with_from_adapter(PyTorchToBurnAdapter)).unwrap();
        assert!(result.missing.is_empty(), "{result}");
        model
    }

    /// The hidden states `[batch, length, 8]` of the tokens `[batch, length]`.
    pub fn forward(&self, tokens: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let places = Tensor::arange(0..LENGTH as i64, &tokens.device()).unsqueeze();
        let Embeddings { token_embedding, position_embedding } = &self.embeddings;
        let x = token_embedding.forward(tokens) + position_embedding.forward(places);
        self.final_layer_norm.forward(self.encoder.layers.iter().fold(x, |x, it| it.forward(x)))
    }
}

/// The adapters of the text encoder in the file that has both.
pub fn load() -> LoraAdapters<Plain> {
    let (file, model) = (fixture("kohya_both.safetensors"), TextEncoder::<Plain>::base());
    LoraAdapters::load_image(file, &model, &names(), &device::<Plain>()).unwrap()
}

#[test]
fn each_model_takes_its_part_of_a_file_with_both() {
    let (io, base) = (Io::read(), TextEncoder::<Plain>::base());
    let tokens = || io.tensor("tokens", [2, LENGTH]).int();
    assert_close(base.forward(tokens()), &io.values("y.base_text"), 1e-5);
    let set = load();
    assert_eq!((set.len(), set.unused().len()), (4, 36));
    let adapted = base.switch(&set).unwrap();
    assert_close(adapted.forward(tokens()), &io.values("y.kohya_text"), 1e-5);
    let unet = super::load("kohya_both");
    assert_eq!((unet.len(), unet.unused().len()), (12, 12));
    assert_eq!(unet.fingerprint(), super::load("kohya").fingerprint());
}
