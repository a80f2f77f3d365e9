//! What `config.json` would say of the model in a GGUF file.

use std::path::Path;

use burn_lora::gguf::Gguf;
use serde_json::{Value, json};

use super::{architecture::Architecture, open, rope};
use crate::{config::LlamaConfig, error::Context};

/// By how much RoPE's frequencies are divided, for Llama 3.
pub(super) const DIVISORS: &str = "rope_freqs.weight";

/// The same for Phi-3, in texts of the usual length and in longer ones.
pub(super) const SHORT: &str = "rope_factors_short.weight";
pub(super) const LONG: &str = "rope_factors_long.weight";

/// The tensors that are no weights.
pub(crate) const POSITIONS: [&str; 3] = [DIVISORS, SHORT, LONG];

/// The values of a tensor.
pub(super) fn values(file: &Gguf, name: &str) -> Result<Vec<f32>, String> {
    file.values(name).map_err(|error| error.to_string())
}

/// What Hugging Face's `config.json` says of the model in a GGUF file.
///
/// # Errors
///
/// If the file cannot be read, or has frequencies of RoPE that are no rule of `config.json`.
pub fn hugging_face_config(path: &Path) -> Result<Value, String> {
    let file = open(path)?;
    let mut json = config(&file).context(path.display())?;
    if file.tensors.contains_key(DIVISORS) {
        let divisors = values(&file, DIVISORS)?;
        json["rope_scaling"] = rope_scaling(&json, &divisors).context(path.display())?;
    }
    json["architectures"] = json!([architecture(&file).context(path.display())?.class]);
    for (name, field) in
        [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")]
    {
        if let Some(id) = file.fields.get(&format!("tokenizer.ggml.{field}_token_id")) {
            json[name] = id.clone();
        }
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

/// The family of the model.
pub(super) fn architecture(file: &Gguf) -> Result<&'static Architecture, String> {
    let name = file.fields.get("general.architecture").and_then(Value::as_str);
    Architecture::find(name.ok_or("`general.architecture` is missing")?)
}

/// The fields of a family.
struct Fields<'a> {
    file: &'a Gguf,
    name: &'static str,
}

impl Fields<'_> {
    fn value(&self, name: &str) -> Value {
        let key = format!("{}.{name}", self.name);
        self.file.fields.get(&key).cloned().unwrap_or(Value::Null)
    }

    /// The number, which may be a list of one for each layer, or null if it is not there.
    fn get(&self, name: &str) -> Result<Value, String> {
        let told = |problem: String| format!("`{}.{name}`: {problem}", self.name);
        match same_for_all(self.value(name)).map_err(told)? {
            value @ (Value::Null | Value::Number(_)) => Ok(value),
            other => Err(told(format!("{other} is no number"))),
        }
    }

    /// The number, which must be there.
    fn number(&self, name: &str) -> Result<Value, String> {
        match self.get(name)? {
            Value::Null => Err(format!("`{}.{name}` is missing", self.name)),
            value => Ok(value),
        }
    }

    /// The size or count, which must be there.
    fn need(&self, name: &str) -> Result<Value, String> {
        match self.number(name)? {
            value if value.is_u64() => Ok(value),
            other => Err(format!("`{}.{name}`: {other} is no whole number", self.name)),
        }
    }

    /// What it is, or null if the value is one of those that mean nothing.
    fn unless(&self, name: &str, nothing: f64) -> Result<Value, String> {
        let value = self.get(name)?;
        Ok(if value.as_f64() == Some(nothing) { Value::Null } else { value })
    }
}

/// The fields of `config.json`.
pub(super) fn config(file: &Gguf) -> Result<Value, String> {
    let family = architecture(file)?;
    let fields = Fields { file, name: family.name };
    let has = |name: &str| file.tensors.contains_key(name);
    let rows = file.tensors.get("token_embd.weight").and_then(|it| it.shape.first());
    let mut json = json!({
        "model_type": family.model_type,
        "vocab_size": rows.ok_or("`token_embd.weight` is missing")?,
        "hidden_size": fields.need("embedding_length")?,
        "intermediate_size": fields.need("feed_forward_length")?,
        "num_hidden_layers": fields.need("block_count")?,
        "num_attention_heads": fields.need("attention.head_count")?,
        "num_key_value_heads": match fields.get("attention.head_count_kv")? {
            Value::Null => fields.need("attention.head_count")?,
            count => count,
        },
        "head_dim": head_dim(&fields)?,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon")?,
        "tie_word_embeddings": !has("output.weight"),
        "max_position_embeddings": fields.need("context_length")?,
        "attention_bias": family.name != "qwen2" && has("blk.0.attn_output.bias"),
        "mlp_bias": has("blk.0.ffn_up.bias"),
        "hidden_act": "silu",
        "rope_theta": match fields.get("rope.freq_base")? {
            // What llama.cpp takes then.
            Value::Null => json!(10_000.0),
            theta => theta,
        },
        "rope_scaling": scaling(&fields)?,
    });
    let mut set = |name: &str, value: Value| json[name] = value;
    match family.name {
        "gemma2" | "gemma3" => gemma(&fields, &mut set)?,
        "phi3" => {
            set("sliding_window", fields.unless("attention.sliding_window", 0.0)?);
            set(
                "original_max_position_embeddings",
                match original_length(&fields)? {
                    Value::Null => fields.need("context_length")?,
                    length => length,
                },
            );
        }
        "granite" => {
            for (name, field) in [
                ("attention_multiplier", "attention.scale"),
                ("embedding_multiplier", "embedding_scale"),
                ("residual_multiplier", "residual_scale"),
                ("logits_scaling", "logit_scale"),
            ] {
                set(name, fields.get(field)?);
            }
        }
        _ => {}
    }
    if !["gemma2", "gemma3", "phi3"].contains(&family.name) {
        let window = fields.get("attention.sliding_window")?.as_u64().unwrap_or(0);
        let length = fields.need("context_length")?.as_u64().unwrap_or(0);
        // OLMo 3 has the name of OLMo 2, and windows.
        if (1..length).contains(&window) {
            let name = family.name;
            return Err(format!("`{name}.attention.sliding_window` {window} is not supported"));
        }
    }
    // A part of each head that is turned.
    let [turned, head] = ["rope.dimension_count", "attention.key_length"].map(|it| fields.get(it));
    let whole =
        || Some(json["hidden_size"].as_u64()? / json["num_attention_heads"].as_u64()?.max(1));
    if let (Some(turned), Some(head)) = (turned?.as_u64(), head?.as_u64().or_else(whole))
        && turned < head
    {
        json["partial_rotary_factor"] = json!(turned as f64 / head as f64);
    }
    // `transformers` does not take null for what is not said.
    if let Some(fields) = json.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    Ok(json)
}

/// The size of a head, if the file says it, or if `transformers` would take another than llama.cpp.
fn head_dim(fields: &Fields) -> Result<Value, String> {
    let number = |name: &str| Ok::<_, String>(fields.need(name)?.as_u64().unwrap_or(0));
    match fields.get("attention.key_length")? {
        Value::Null if ["qwen3", "gemma2", "gemma3"].contains(&fields.name) => {
            let heads = number("attention.head_count")?.max(1);
            Ok(json!(number("embedding_length")? / heads))
        }
        size => Ok(size),
    }
}

/// What Gemma has of its own. Its files do not say all of it: llama.cpp knows it by the number of layers.
fn gemma(fields: &Fields, set: &mut impl FnMut(&str, Value)) -> Result<(), String> {
    let number = |name: &str| Ok::<_, String>(fields.need(name)?.as_u64().unwrap_or(0));
    let head = head_dim(fields)?;
    for name in ["hidden_act", "hidden_activation"] {
        set(name, json!("gelu_pytorch_tanh"));
    }
    // The models of 27 billion weights.
    let is_largest =
        matches!((fields.name, number("block_count")?), ("gemma2", 46) | ("gemma3", 62));
    let size = match is_largest {
        true => json!(number("embedding_length")? / number("attention.head_count")?.max(1)),
        false => head,
    };
    set("query_pre_attn_scalar", size);
    set("sliding_window", fields.get("attention.sliding_window")?);
    // Which layers have a window: one of so many has none, or a list. The rule of the family holds otherwise.
    let pattern = format!("{}.attention.sliding_window_pattern", fields.name);
    match fields.file.fields.get(&pattern) {
        None => {}
        Some(Value::Array(layers)) => {
            let kind = |it: &Value| match it.as_bool() {
                Some(true) => Ok("sliding_attention"),
                Some(false) => Ok("full_attention"),
                None => Err(format!("`{pattern}` has {it}")),
            };
            set("layer_types", json!(layers.iter().map(kind).collect::<Result<Vec<_>, _>>()?));
        }
        Some(number) if fields.name == "gemma3" => set("sliding_window_pattern", number.clone()),
        Some(number) if number.as_u64() == Some(2) => {}
        Some(other) => return Err(format!("`{pattern}` {other} is not supported")),
    }
    let caps = ["attn_logit_softcapping", "final_logit_softcapping"];
    for (name, usual) in caps.into_iter().zip([50.0, 30.0]) {
        match (fields.unless(name, 0.0)?, fields.name) {
            (Value::Null, "gemma2") => set(name, json!(usual)),
            (value, _) => set(name, value),
        }
    }
    if fields.name == "gemma3" {
        // The factor is that of layers that see all.
        if let Value::Number(theta) = fields.get("rope.freq_base_swa")? {
            set("rope_local_base_freq", Value::Number(theta));
        }
    }
    Ok(())
}

/// The rule by which RoPE's frequencies are scaled, or null.
fn scaling(fields: &Fields) -> Result<Value, String> {
    let factor = match fields.get("rope.scaling.factor")? {
        // Its older name.
        Value::Null => fields.get("rope.scale_linear")?,
        factor => factor,
    };
    if fields.file.tensors.contains_key(LONG) {
        let [short, long] =
            [SHORT, LONG].map(|name| match fields.file.tensors.contains_key(name) {
                true => values(fields.file, name),
                false => Err(format!("`{name}` is missing")),
            });
        return Ok(json!({
            "rope_type": "longrope", "short_factor": short?, "long_factor": long?,
            "attention_factor": fields.unless("rope.scaling.attn_factor", 0.0)?,
        }));
    }
    // llama.cpp scales by the factor also if no type says so, and takes 0 for none.
    match fields.value("rope.scaling.type").as_str().unwrap_or("linear") {
        "none" => Ok(Value::Null),
        "linear" if factor.as_f64().unwrap_or(0.0) == 0.0 => Ok(Value::Null),
        "yarn" => {
            for name in ["attn_factor", "yarn_attn_factor", "yarn_ext_factor"] {
                let key = format!("rope.scaling.{name}");
                if let Value::Number(value) = fields.unless(&key, 1.0)? {
                    return Err(format!("`{}.{key}` {value} is not supported", fields.name));
                }
            }
            Ok(json!({
                "rope_type": "yarn", "factor": factor,
                "original_max_position_embeddings": original_length(fields)?,
                "beta_fast": fields.get("rope.scaling.yarn_beta_fast")?,
                "beta_slow": fields.get("rope.scaling.yarn_beta_slow")?,
            }))
        }
        other => Ok(json!({"rope_type": other, "factor": factor})),
    }
}

/// The length of the texts of the first training.
fn original_length(fields: &Fields) -> Result<Value, String> {
    fields.get("rope.scaling.original_context_length")
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
