//! A decoder in a GGUF file, as Hugging Face would have it: the same names, sizes and order of values.

use std::{collections::BTreeMap, path::Path, rc::Rc};

use burn::{
    module::ParamId,
    tensor::{DType, TensorData, backend::Backend},
};
use burn_lora::quantize::{GgufType, QuantizedWeight};

use super::{Gguf, Packing, rope};
use crate::{config::LlamaConfig, error::Context};
use burn_store::{TensorSnapshot, TensorSnapshotError};
use serde_json::{Value, json};

/// Modules in the file, and their names at Hugging Face. `*` is the number of a layer.
const NAMES: [(&str, &str); 14] = [
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
    ("blk.*.attn_norm", "model.layers.*.input_layernorm"),
    ("blk.*.attn_q", "model.layers.*.self_attn.q_proj"),
    ("blk.*.attn_k", "model.layers.*.self_attn.k_proj"),
    ("blk.*.attn_v", "model.layers.*.self_attn.v_proj"),
    ("blk.*.attn_output", "model.layers.*.self_attn.o_proj"),
    ("blk.*.attn_q_norm", "model.layers.*.self_attn.q_norm"),
    ("blk.*.attn_k_norm", "model.layers.*.self_attn.k_norm"),
    ("blk.*.ffn_norm", "model.layers.*.post_attention_layernorm"),
    ("blk.*.ffn_gate", "model.layers.*.mlp.gate_proj"),
    ("blk.*.ffn_up", "model.layers.*.mlp.up_proj"),
    ("blk.*.ffn_down", "model.layers.*.mlp.down_proj"),
];

/// By how much RoPE's frequencies are divided, for Llama 3.
const ROPE: &str = "rope_freqs.weight";

/// The configuration and the tensors of a decoder.
pub struct Model {
    /// The sizes.
    pub config: LlamaConfig,
    /// The tensors that are not quantized, by the paths of the parameters.
    pub tensors: BTreeMap<String, TensorSnapshot>,
    /// The matrices whose numbers have 4 or 8 bits. They are among the tensors, too.
    pub matrices: BTreeMap<String, Matrix>,
    /// How the values of each tensor are packed.
    pub packings: BTreeMap<String, Packing>,
}

/// A matrix whose numbers have 4 or 8 bits.
pub struct Matrix {
    file: Rc<Gguf>,
    name: String,
    kind: GgufType,
    shape: [usize; 2],
    /// The number of heads, if its rows are in GGUF's own order.
    heads: Option<usize>,
}

impl Matrix {
    /// Reads the matrix as it is.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or a scale in it is not finite.
    pub fn read<B: Backend>(&self, device: &B::Device) -> Result<QuantizedWeight<B>, String> {
        let mut bytes = self.file.bytes(&self.name)?;
        if let Some(heads) = self.heads {
            bytes = in_halves(&bytes, heads, self.shape[0]);
        }
        QuantizedWeight::from_gguf(self.kind, self.shape, &bytes, device)
            .map_err(|error| format!("`{}`: {error}", self.name))
    }
}

/// Reads a GGUF file. The values of its tensors are read when they are needed.
///
/// # Errors
///
/// If the file cannot be read, or describes a model that the decoder is not.
pub fn read(path: &Path) -> Result<Model, String> {
    let file = Gguf::open(path)?;
    let told = |problem: String| format!("{}: {problem}", path.display());
    let divisors = match file.tensors.contains_key(ROPE) {
        true => Some(file.values(ROPE)?),
        false => None,
    };
    let config = LlamaConfig::from_json(config(&file).map_err(told)?).map_err(told)?;
    let config = config.with_divided_frequencies(divisors.as_deref()).map_err(told)?;
    let architecture = file.fields["general.architecture"].as_str().unwrap_or_default();
    let permuted = architecture == "llama";
    let heads = [config.num_attention_heads, config.key_value_heads()];
    let file = Rc::new(file);
    let (mut tensors, mut matrices, mut packings) =
        (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in &file.tensors {
        if name == ROPE {
            continue;
        }
        let new_name = python_name(name);
        let heads = match () {
            _ if !permuted => None,
            _ if new_name.contains(".q_proj.") => Some(heads[0]),
            _ if new_name.contains(".k_proj.") => Some(heads[1]),
            _ => None,
        };
        packings.insert(new_name.clone(), tensor.packing);
        let shape = tensor.shape.clone();
        let kind = match tensor.packing {
            Packing::Q8_0 => Some(GgufType::Q8_0),
            Packing::Q4_0 => Some(GgufType::Q4_0),
            Packing::Q4_1 => Some(GgufType::Q4_1),
            Packing::F32 | Packing::F16 | Packing::BF16 => None,
        };
        if let (Some(kind), &[rows, columns]) = (kind, &shape[..]) {
            let (file, name) = (file.clone(), name.clone());
            let matrix = Matrix { file, name, kind, shape: [rows, columns], heads };
            matrices.insert(new_name.clone(), matrix);
        }
        let (file, name) = (file.clone(), name.clone());
        let values = {
            let shape = shape.clone();
            move || {
                let mut values = file.values(&name).map_err(TensorSnapshotError::IoError)?;
                if let Some(heads) = heads {
                    values = in_halves(&values, heads, shape[0]);
                }
                Ok(TensorData::new(values, shape.clone()))
            }
        };
        let (path, containers) = (vec![new_name.clone()], Vec::new());
        let (values, id) = (Rc::new(values), ParamId::new());
        let tensor =
            TensorSnapshot::from_closure(values, DType::F32, shape.into(), path, containers, id);
        tensors.insert(new_name, tensor);
    }
    Ok(Model { config, tensors, matrices, packings })
}

/// The name at Hugging Face, or the same if it is unknown.
fn python_name(name: &str) -> String {
    let Some((module, parameter)) = name.rsplit_once('.') else { return name.to_owned() };
    let layer = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let pattern = layer.map_or(module.to_owned(), |(_, rest)| format!("blk.*.{rest}"));
    match NAMES.iter().find(|(there, _)| *there == pattern) {
        Some((_, here)) => {
            let layer = layer.map_or("", |(layer, _)| layer);
            format!("{}.{parameter}", here.replace('*', layer))
        }
        None => name.to_owned(),
    }
}

/// Puts the rows of queries or keys in Hugging Face's order. Files of Llamas have the pairs of rows that
/// RoPE turns next to each other; Hugging Face has them half a head apart.
fn in_halves<T: Copy>(values: &[T], heads: usize, rows: usize) -> Vec<T> {
    let (width, head) = (values.len() / rows, rows / heads);
    let row = |row: usize| {
        let (start, in_head) = (row / head * head, row % head);
        let (second, pair) = (in_head / (head / 2), in_head % (head / 2));
        start + 2 * pair + second
    };
    (0..rows).flat_map(|it| values[row(it) * width..][..width].iter().copied()).collect()
}

/// What Hugging Face's `config.json` says of the model in a GGUF file.
///
/// # Errors
///
/// If the file cannot be read, or has frequencies of RoPE that are no rule of `config.json`.
pub fn hugging_face_config(path: &Path) -> Result<Value, String> {
    let file = Gguf::open(path)?;
    let mut json = config(&file).context(path.display())?;
    if file.tensors.contains_key(ROPE) {
        json["rope_scaling"] = rope_scaling(&json, &file.values(ROPE)?).context(path.display())?;
    }
    json["architectures"] = match json["model_type"].as_str() {
        Some("qwen2") => json!(["Qwen2ForCausalLM"]),
        Some("qwen3") => json!(["Qwen3ForCausalLM"]),
        _ => json!(["LlamaForCausalLM"]),
    };
    for name in ["bos_token_id", "eos_token_id"] {
        let id = file.fields.get(&format!("tokenizer.ggml.{name}"));
        json[name] = id.cloned().unwrap_or(Value::Null);
    }
    Ok(json)
}

/// The rule of the configuration, and the divisors of the file, as one rule.
fn rope_scaling(json: &Value, divisors: &[f32]) -> Result<Value, String> {
    let frequencies = |json: &Value, divisors| {
        let config = LlamaConfig::from_json(json.clone())?.with_divided_frequencies(divisors)?;
        Ok::<_, String>(config.rope().frequencies)
    };
    let wanted = frequencies(json, Some(divisors))?;
    let mut plain = json.clone();
    plain["rope_scaling"] = Value::Null;
    let plain = frequencies(&plain, None)?;
    let divisors: Vec<_> =
        plain.iter().zip(&wanted).map(|(plain, wanted)| plain / wanted).collect();
    rope::rule(&plain, &divisors).ok_or_else(|| {
        "its frequencies of RoPE are no rule that a Hugging Face configuration can have; use the adapters beside \
         the GGUF file"
            .to_owned()
    })
}

/// The fields of `config.json`.
fn config(file: &Gguf) -> Result<Value, String> {
    let field = |name: &str| file.fields.get(name).cloned().unwrap_or(Value::Null);
    let architecture = field("general.architecture");
    let kind = architecture.as_str().ok_or("`general.architecture` is missing")?;
    if !["llama", "qwen2", "qwen3"].contains(&kind) {
        return Err(format!("`general.architecture` \"{kind}\" is not supported"));
    }
    let of = |name: &str| {
        same_for_all(field(&format!("{kind}.{name}"))).context(format!("`{kind}.{name}`"))
    };
    let need = |name: &str| match of(name)? {
        Value::Null => Err(format!("`{kind}.{name}` is missing")),
        value => Ok(value),
    };
    let factor = match of("rope.scaling.factor")? {
        // Its older name.
        Value::Null => of("rope.scale_linear")?,
        factor => factor,
    };
    // llama.cpp scales by the factor also if no type says so, and takes 0 for none.
    let scaling = match of("rope.scaling.type")?.as_str().unwrap_or("linear") {
        "none" => Value::Null,
        "linear" if factor.as_f64().unwrap_or(0.0) == 0.0 => Value::Null,
        other => json!({"rope_type": other, "factor": factor}),
    };
    let has = |name: &str| file.tensors.contains_key(name);
    let rows = file.tensors.get("token_embd.weight").and_then(|it| it.shape.first());
    Ok(json!({
        "model_type": kind,
        "vocab_size": rows.ok_or("`token_embd.weight` is missing")?,
        "hidden_size": need("embedding_length")?,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": need("attention.head_count")?,
        "num_key_value_heads": of("attention.head_count_kv")?,
        "head_dim": of("attention.key_length")?,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon")?,
        "tie_word_embeddings": !has("output.weight"),
        "max_position_embeddings": need("context_length")?,
        "attention_bias": kind != "qwen2" && has("blk.0.attn_output.bias"),
        "mlp_bias": has("blk.0.ffn_up.bias"),
        "hidden_act": "silu",
        "rope_theta": of("rope.freq_base")?,
        "rope_scaling": scaling,
    }))
}

/// The value, or the one that a list has for each of the layers.
fn same_for_all(value: Value) -> Result<Value, String> {
    match value {
        Value::Array(layers) => match layers.split_first() {
            Some((first, rest)) if rest.iter().all(|it| it == first) => Ok(first.clone()),
            _ => Err("layers that differ in it are not supported".to_owned()),
        },
        value => Ok(value),
    }
}
