//! Adapters of whole models as people have them. Every layer of the adapted model computes what it does
//! in PEFT.

use std::{collections::BTreeMap, fs, path::Path};

use burn::{
    module::{Module, Param},
    nn::{
        BatchNormConfig, EmbeddingConfig, GroupNorm, GroupNormConfig, LayerNorm, LayerNormConfig,
        LinearConfig, RmsNorm, RmsNormConfig, conv::Conv2dConfig,
    },
    tensor::{Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraLinear, LoraModule,
    nn::{BatchNorm, LoraConv2d, LoraEmbedding},
};
use burn_store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::{TempDir, fixture};
use crate::{
    model::{Plain, device},
    oracle::{Matrix, assert_close},
};

/// A layer of a model.
enum Leaf<'a> {
    Linear(&'a LoraLinear<Plain>),
    Embedding(&'a LoraEmbedding<Plain>),
    /// The table of embeddings as the head.
    TiedHead(&'a LoraEmbedding<Plain>),
    RmsNorm(&'a RmsNorm<Plain>),
    LayerNorm(&'a LayerNorm<Plain>),
    GroupNorm(&'a GroupNorm<Plain>),
    BatchNorm(&'a BatchNorm<Plain>),
    Conv(&'a LoraConv2d<Plain>),
}

fn values(view: &TensorView) -> Vec<f64> {
    let (chunks, _) = view.data().as_chunks::<4>();
    chunks.iter().map(|it| f64::from(f32::from_le_bytes(*it))).collect()
}

impl Leaf<'_> {
    fn output(&self, x: &TensorView) -> Tensor<Plain, 1> {
        fn tensor<const D: usize>(x: &TensorView) -> Tensor<Plain, D> {
            let shape: [usize; D] = x.shape().try_into().unwrap();
            let data: Vec<_> = values(x).into_iter().map(|it| it as f32).collect();
            Tensor::from_data(TensorData::new(data, shape), &device::<Plain>())
        }
        match self {
            Self::Linear(layer) => layer.forward(tensor::<2>(x)).flatten(0, 1),
            Self::Embedding(layer) => layer.forward(tensor::<2>(x).int()).flatten(0, 2),
            Self::TiedHead(layer) => layer.project(tensor::<2>(x).unsqueeze()).flatten(0, 2),
            Self::RmsNorm(layer) => layer.forward(tensor::<2>(x)).flatten(0, 1),
            Self::LayerNorm(layer) => layer.forward(tensor::<2>(x)).flatten(0, 1),
            Self::GroupNorm(layer) => layer.forward(tensor::<4>(x)).flatten(0, 3),
            Self::BatchNorm(layer) => layer.forward(tensor::<4>(x)).flatten(0, 3),
            Self::Conv(layer) => layer.forward(tensor::<4>(x)).flatten(0, 3),
        }
    }
}

trait Leaves: Module<Plain> {
    fn leaves(&self) -> BTreeMap<String, Leaf<'_>>;
}

fn linear<B: Backend>(d_input: usize, d_output: usize, bias: bool) -> LoraLinear<B> {
    LinearConfig::new(d_input, d_output).with_bias(bias).init(&device::<B>()).into()
}

fn named<'a>(prefix: &str, leaves: Vec<(&str, Leaf<'a>)>) -> Vec<(String, Leaf<'a>)> {
    leaves.into_iter().map(|(name, leaf)| (format!("{prefix}{name}"), leaf)).collect()
}

#[derive(Module, Debug)]
struct Llama<B: Backend> {
    model: LlamaBody<B>,
    /// None if the head is the table of embeddings.
    lm_head: Option<LoraLinear<B>>,
}

#[derive(Module, Debug)]
struct LlamaBody<B: Backend> {
    embed_tokens: LoraEmbedding<B>,
    layers: Vec<LlamaLayer<B>>,
    norm: RmsNorm<B>,
}

#[derive(Module, Debug)]
struct LlamaLayer<B: Backend> {
    self_attn: LlamaAttention<B>,
    mlp: LlamaMlp<B>,
    input_layernorm: RmsNorm<B>,
    post_attention_layernorm: RmsNorm<B>,
}

#[derive(Module, Debug)]
struct LlamaAttention<B: Backend> {
    q_proj: LoraLinear<B>,
    k_proj: LoraLinear<B>,
    v_proj: LoraLinear<B>,
    o_proj: LoraLinear<B>,
}

#[derive(Module, Debug)]
struct LlamaMlp<B: Backend> {
    gate_proj: LoraLinear<B>,
    up_proj: LoraLinear<B>,
    down_proj: LoraLinear<B>,
}

impl Llama<Plain> {
    fn new(tied: bool) -> Self {
        let norm = || RmsNormConfig::new(8).with_epsilon(1e-6).init(&device::<Plain>());
        let layer = || LlamaLayer {
            self_attn: LlamaAttention {
                q_proj: linear(8, 8, false),
                k_proj: linear(8, 4, false),
                v_proj: linear(8, 4, false),
                o_proj: linear(8, 8, false),
            },
            mlp: LlamaMlp {
                gate_proj: linear(8, 12, false),
                up_proj: linear(8, 12, false),
                down_proj: linear(12, 8, false),
            },
            input_layernorm: norm(),
            post_attention_layernorm: norm(),
        };
        let model = Self {
            model: LlamaBody {
                embed_tokens: EmbeddingConfig::new(17, 8).init(&device::<Plain>()).into(),
                layers: vec![layer(), layer()],
                norm: norm(),
            },
            lm_head: (!tied).then(|| linear(8, 17, false)),
        };
        loaded(model, if tied { "llama_tied" } else { "llama" })
    }
}

impl Leaves for Llama<Plain> {
    fn leaves(&self) -> BTreeMap<String, Leaf<'_>> {
        let table = &self.model.embed_tokens;
        let head = self.lm_head.as_ref().map_or(Leaf::TiedHead(table), Leaf::Linear);
        let mut leaves = named(
            "",
            vec![
                ("model.embed_tokens", Leaf::Embedding(table)),
                ("model.norm", Leaf::RmsNorm(&self.model.norm)),
                ("lm_head", head),
            ],
        );
        for (index, layer) in self.model.layers.iter().enumerate() {
            leaves.extend(named(
                &format!("model.layers.{index}."),
                vec![
                    ("self_attn.q_proj", Leaf::Linear(&layer.self_attn.q_proj)),
                    ("self_attn.k_proj", Leaf::Linear(&layer.self_attn.k_proj)),
                    ("self_attn.v_proj", Leaf::Linear(&layer.self_attn.v_proj)),
                    ("self_attn.o_proj", Leaf::Linear(&layer.self_attn.o_proj)),
                    ("mlp.gate_proj", Leaf::Linear(&layer.mlp.gate_proj)),
                    ("mlp.up_proj", Leaf::Linear(&layer.mlp.up_proj)),
                    ("mlp.down_proj", Leaf::Linear(&layer.mlp.down_proj)),
                    ("input_layernorm", Leaf::RmsNorm(&layer.input_layernorm)),
                    ("post_attention_layernorm", Leaf::RmsNorm(&layer.post_attention_layernorm)),
                ],
            ));
        }
        leaves.into_iter().collect()
    }
}

#[derive(Module, Debug)]
struct Gpt2<B: Backend> {
    transformer: Gpt2Body<B>,
    lm_head: LoraLinear<B>,
}

#[derive(Module, Debug)]
struct Gpt2Body<B: Backend> {
    wte: LoraEmbedding<B>,
    wpe: LoraEmbedding<B>,
    h: Vec<Gpt2Block<B>>,
    ln_f: LayerNorm<B>,
}

#[derive(Module, Debug)]
struct Gpt2Block<B: Backend> {
    ln_1: LayerNorm<B>,
    attn: Gpt2Attention<B>,
    ln_2: LayerNorm<B>,
    mlp: Gpt2Mlp<B>,
}

#[derive(Module, Debug)]
struct Gpt2Attention<B: Backend> {
    c_attn: LoraLinear<B>,
    c_proj: LoraLinear<B>,
}

#[derive(Module, Debug)]
struct Gpt2Mlp<B: Backend> {
    c_fc: LoraLinear<B>,
    c_proj: LoraLinear<B>,
}

impl Gpt2<Plain> {
    fn new() -> Self {
        let norm = || LayerNormConfig::new(8).init(&device::<Plain>());
        let block = || Gpt2Block {
            ln_1: norm(),
            attn: Gpt2Attention { c_attn: linear(8, 24, true), c_proj: linear(8, 8, true) },
            ln_2: norm(),
            mlp: Gpt2Mlp { c_fc: linear(8, 32, true), c_proj: linear(32, 8, true) },
        };
        let table = |rows| EmbeddingConfig::new(rows, 8).init(&device::<Plain>()).into();
        let body =
            Gpt2Body { wte: table(13), wpe: table(9), h: vec![block(), block()], ln_f: norm() };
        loaded(Self { transformer: body, lm_head: linear(8, 13, false) }, "gpt2")
    }
}

impl Leaves for Gpt2<Plain> {
    fn leaves(&self) -> BTreeMap<String, Leaf<'_>> {
        let body = &self.transformer;
        let mut leaves = named(
            "",
            vec![
                ("transformer.wte", Leaf::Embedding(&body.wte)),
                ("transformer.wpe", Leaf::Embedding(&body.wpe)),
                ("transformer.ln_f", Leaf::LayerNorm(&body.ln_f)),
                ("lm_head", Leaf::Linear(&self.lm_head)),
            ],
        );
        for (index, block) in body.h.iter().enumerate() {
            leaves.extend(named(
                &format!("transformer.h.{index}."),
                vec![
                    ("ln_1", Leaf::LayerNorm(&block.ln_1)),
                    ("attn.c_attn", Leaf::Linear(&block.attn.c_attn)),
                    ("attn.c_proj", Leaf::Linear(&block.attn.c_proj)),
                    ("ln_2", Leaf::LayerNorm(&block.ln_2)),
                    ("mlp.c_fc", Leaf::Linear(&block.mlp.c_fc)),
                    ("mlp.c_proj", Leaf::Linear(&block.mlp.c_proj)),
                ],
            ));
        }
        leaves.into_iter().collect()
    }
}

#[derive(Module, Debug)]
struct Mixed<B: Backend> {
    l: LoraLinear<B>,
    nb: LoraLinear<B>,
    c: LoraConv2d<B>,
    norm: LayerNorm<B>,
    final_norm: LayerNorm<B>,
    bn: BatchNorm<B>,
    gn: GroupNorm<B>,
    other: LoraLinear<B>,
}

impl Mixed<Plain> {
    fn new() -> Self {
        let device = device::<Plain>();
        let model = Self {
            l: linear(4, 5, true),
            nb: linear(4, 5, false),
            c: Conv2dConfig::new([3, 4], [3, 2]).init(&device).into(),
            norm: LayerNormConfig::new(5).init(&device),
            final_norm: LayerNormConfig::new(5).init(&device),
            bn: BatchNormConfig::new(4).init(&device).into(),
            gn: GroupNormConfig::new(2, 4).init(&device),
            other: linear(3, 3, true),
        };
        loaded(model, "mixed")
    }
}

impl Leaves for Mixed<Plain> {
    fn leaves(&self) -> BTreeMap<String, Leaf<'_>> {
        let leaves = vec![
            ("l", Leaf::Linear(&self.l)),
            ("nb", Leaf::Linear(&self.nb)),
            ("c", Leaf::Conv(&self.c)),
            ("norm", Leaf::LayerNorm(&self.norm)),
            ("final_norm", Leaf::LayerNorm(&self.final_norm)),
            ("bn", Leaf::BatchNorm(&self.bn)),
            ("gn", Leaf::GroupNorm(&self.gn)),
            ("other", Leaf::Linear(&self.other)),
        ];
        named("", leaves).into_iter().collect()
    }
}

/// The model with the parameters that the fixtures were made for.
fn loaded<M: Module<Plain> + ModuleSnapshot<Plain>>(mut model: M, base: &str) -> M {
    let store = SafetensorsStore::from_file(fixture(&format!("cases/base_{base}.safetensors")));
    let store = match base.starts_with("llama") {
        // burn-store does not rename the parameter of this norm.
        true => store.with_key_remapping(r"norm\.weight$", "norm.gamma"),
        false => store,
    };
    model.load_from(&mut store.with_from_adapter(PyTorchToBurnAdapter)).unwrap();
    model
}

fn load(name: &str) -> LoraAdapters<Plain> {
    LoraAdapters::load(fixture("cases").join(name), &device::<Plain>()).unwrap()
}

/// Fails unless every layer of which the fixture has an output computes it.
#[track_caller]
fn assert_computes(model: &impl Leaves, name: &str) {
    let bytes = fs::read(fixture("cases").join(name).join("io.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let leaves = model.leaves();
    let outputs = file.iter().filter_map(|(key, y)| Some((key.strip_prefix("y.")?, y)));
    for (path, y) in outputs {
        let leaf = leaves.get(path).unwrap_or_else(|| panic!("there is no {path}"));
        let x = file.tensor(&format!("x.{path}")).unwrap();
        println!("{name}: {path}");
        let y = values(&y);
        assert_close(leaf.output(&x), &Matrix { rows: 1, cols: y.len(), data: y }, 1e-5);
    }
}

/// The same after the adapters were put on, taken off the model, saved, loaded and merged.
#[track_caller]
fn check<M: Leaves>(base: &M, name: &str) {
    let adapted = base.switch(&load(name)).unwrap();
    assert_computes(&*adapted, name);
    assert_computes(&adapted.merge().unwrap(), name);
    let dir = TempDir::new(&format!("case-{name}"));
    for set in [load(name), adapted.adapters()] {
        set.save(dir.0.join("set")).unwrap();
        let again = LoraAdapters::load(dir.0.join("set"), &device::<Plain>()).unwrap();
        assert_computes(&*base.switch(&again).unwrap(), name);
    }
}

#[test]
fn a_conv1d_in_full_is_read_by_its_shape() {
    check(&Gpt2::new(), "gpt2_saved");
    let error = Gpt2::new().switch(&load("gpt2_saved_square")).unwrap_err().to_string();
    assert!(error.contains("transformer.h.0.attn.c_proj.weight"), "{error}");
    assert!(error.contains("fan_in_fan_out"), "{error}");
}

#[test]
fn modules_are_meant_by_the_ends_of_their_names() {
    check(&Llama::new(false), "llama_norm_saved");
}

#[test]
fn tables_come_along() {
    let base = Llama::new(false);
    for name in ["llama_head_targeted", "llama_embedding_and_head", "llama_tables_saved"] {
        check(&base, name);
    }
    check(&Llama::new(true), "tied_tables_saved");
}

#[test]
fn biases_of_modules_in_full_are_read_once() {
    check(&Mixed::new(), "bias_all_saved");
}

#[test]
fn a_tied_head_moves_if_the_file_says_so() {
    let tied = Llama::new(true);
    check(&tied, "tied_embedding_ensured");
    let adapted = tied.switch(&load("tied_embedding")).unwrap();
    assert_computes(&*adapted, "tied_embedding");
    let again = tied.switch(&adapted.adapters()).unwrap();
    assert_computes(&*again, "tied_embedding");
    let recorded = Lora::new(Llama::new(true)).load_record(adapted.clone().into_record());
    assert_computes(&*recorded, "tied_embedding");
    // A model with a head of its own has an adapter on it.
    let mut own = Llama { lm_head: Some(linear(8, 17, false)), ..Llama::new(true) };
    let table = own.model.embed_tokens.base.weight.val();
    own.lm_head.as_mut().unwrap().base.weight = Param::from_tensor(table.transpose());
    check(&own, "tied_embedding");
    let adapted = own.switch(&load("tied_embedding_ensured")).unwrap();
    assert_computes(&*adapted, "tied_embedding_ensured");
    let again = own.switch(&adapted.adapters()).unwrap();
    assert_computes(&*again, "tied_embedding_ensured");
}

#[test]
fn b2_pefts_running_statistics_are_those_of_the_set() {
    check(&Mixed::new(), "batch_norm_saved");
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    let refused = |name: &str, message: &str| {
        let dir = fixture("cases").join(name);
        let error = LoraAdapters::<Plain>::load(dir, &device::<Plain>()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    refused("attention", "adapters of PyTorch's `MultiheadAttention` cannot be read");
}

fn config(targets: &[&str]) -> LoraConfig {
    LoraConfig::new(3, 2.0).with_init(Init::RandomBoth).with_targets(targets.iter().copied())
}

#[test]
fn a_name_that_means_more_to_python_is_not_written() {
    let modules = |module: &str| {
        let config = config(&["l"]).with_modules_to_save([module]);
        let set = Mixed::new().attach(&config).unwrap().adapters();
        let dir = TempDir::new(&format!("case-{module}"));
        set.save(dir.0.join("set")).unwrap();
        let text = fs::read(dir.0.join("set/adapter_config.json")).unwrap();
        let saved: Value = serde_json::from_slice(&text).unwrap();
        let again = LoraAdapters::<Plain>::load(dir.0.join("set"), &device::<Plain>()).unwrap();
        assert_eq!(again.num_params(), set.num_params());
        saved["modules_to_save"].clone()
    };
    // `norm` would also mean `final_norm`.
    assert_eq!(modules("norm"), json!(["norm.weight", "norm.bias"]));
    assert_eq!(modules("final_norm"), json!(["final_norm"]));
}

/// Adapters of whole models, those of Python and ours, for `tests/peft/check_saved.py`.
pub fn write_for_python(out: &Path) {
    fn write<M: Leaves>(out: &Path, name: &str, base: &str, io: &str, adapted: &Lora<Plain, M>) {
        adapted.adapters().save(out.join(name)).unwrap();
        let bytes = fs::read(fixture("cases").join(io).join("io.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let outputs = adapted.leaves().into_iter().map(|(path, leaf)| {
            let y = leaf.output(&file.tensor(&format!("x.{path}")).unwrap());
            (path, y.into_data().convert::<f64>().to_vec::<f64>().unwrap())
        });
        let outputs: BTreeMap<_, _> = outputs.collect();
        let expected = json!({"base": base, "io": io, "y": outputs});
        fs::write(out.join(name).join("case.json"), expected.to_string()).unwrap();
    }
    let (llama, tied) = (Llama::new(false), Llama::new(true));
    let names = ["norm_saved", "head_targeted", "embedding_and_head", "tables_saved"];
    for name in names.map(|name| format!("llama_{name}")) {
        write(out, &name, "llama", &name, &llama.switch(&load(&name)).unwrap());
    }
    for name in ["tied_embedding", "tied_embedding_ensured", "tied_tables_saved"] {
        write(out, name, "llama_tied", name, &tied.switch(&load(name)).unwrap());
    }
    let gpt2 = Gpt2::new().switch(&load("gpt2_saved")).unwrap();
    write(out, "gpt2_saved", "gpt2", "gpt2_saved", &gpt2);
    let mixed = Mixed::new().switch(&load("bias_all_saved")).unwrap();
    write(out, "bias_all_saved", "mixed", "bias_all_saved", &mixed);

    let ours = tied.attach(&config(&["embed_tokens", "v_proj"])).unwrap();
    write(out, "ours_tied", "llama_tied", "tied_embedding", &ours);
    // The norm is not that of the base.
    let mut moved = Mixed::new();
    moved.norm.gamma = moved.norm.gamma.map(|gamma| gamma * 2.0);
    let ours = moved.attach(&config(&["l"]).with_modules_to_save(["norm"])).unwrap();
    write(out, "ours_norm", "mixed", "bias_all_saved", &ours);
}
