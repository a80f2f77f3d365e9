//! The sizes and variants of a decoder, from Hugging Face's `config.json`.

mod design;
mod family;
mod layers;
mod rope;

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::{error::Context, files::read_json};
use family::Family;

pub use design::{Design, LayerDesign};
pub use family::{Activation, Biases, Norms, Span};
pub use rope::Rope;

/// The fields of `config.json` that a decoder is built from, with Hugging Face's defaults.
#[derive(Clone, Debug, Deserialize)]
pub struct LlamaConfig {
    #[serde(rename = "model_type")]
    family: Family,
    /// The number of tokens that the model knows.
    pub vocab_size: usize,
    /// The size of the vector of a token.
    pub hidden_size: usize,
    /// The size of the hidden layer of a feed-forward network.
    pub intermediate_size: usize,
    /// The number of blocks.
    pub num_hidden_layers: usize,
    /// The number of query heads.
    pub num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    /// What is added to mean squares in norms.
    pub rms_norm_eps: f64,
    /// Whether the table of embeddings is also the head.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// The length of the longest text, in tokens.
    pub max_position_embeddings: usize,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    #[serde(flatten)]
    rope: rope::Fields,
    #[serde(flatten)]
    layers: layers::Fields,
    #[serde(flatten)]
    scales: design::Fields,
    /// By how much RoPE's frequencies are divided, one for each pair.
    #[serde(skip)]
    divisors: Option<Vec<f64>>,
}

impl LlamaConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or describes a model that this decoder is not.
    pub fn read(path: &Path) -> Result<Self, String> {
        Self::from_json(read_json(path)?).context(path.display())
    }

    /// The configuration with the fields of `config.json`.
    ///
    /// # Errors
    ///
    /// If they describe a model that this decoder is not.
    pub fn from_json(mut json: Value) -> Result<Self, String> {
        // Quantized weights have other tensors. Those of bitsandbytes say themselves what they are.
        if let Some(quantized) = json.get("quantization_config").filter(|it| !it.is_null()) {
            let method = quantized.get("quant_method").unwrap_or(quantized);
            if method != "bitsandbytes" {
                return Err(format!("`quantization_config` ({method}) is not supported"));
            }
        }
        if let (Some(fields), Some(kind)) = (json.as_object(), json.get("model_type")) {
            let family: Family =
                serde_json::from_value(kind.clone()).map_err(|error| error.to_string())?;
            let mut all = family.defaults();
            if let Some(all) = all.as_object_mut() {
                all.extend(fields.clone());
            }
            json = all;
        }
        let config: Self = serde_json::from_value(json).map_err(|error| error.to_string())?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        for (name, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.key_value_heads()),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if size == 0 {
                return Err(format!("`{name}` is 0"));
            }
        }
        // No model has so many, and what each of them is like takes memory.
        if self.num_hidden_layers > 10_000 {
            return Err(format!("`num_hidden_layers` is {}", self.num_hidden_layers));
        }
        let (heads, shared) = (self.num_attention_heads, self.key_value_heads());
        if !heads.is_multiple_of(shared) {
            return Err(format!(
                "{heads} query heads cannot share {shared} key-value heads evenly"
            ));
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(heads) {
            let width = self.hidden_size;
            return Err(format!("`hidden_size` {width} cannot be split into {heads} heads"));
        }
        // RoPE has numbers for each pair, before the tensors are looked at.
        if self.head_dim() > 1 << 16 {
            return Err(format!("the size of a head is {}", self.head_dim()));
        }
        if self.head_dim() == 0 || !self.head_dim().is_multiple_of(2) {
            return Err(format!("the size of a head must be even, and is {}", self.head_dim()));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return Err(format!("`rms_norm_eps` must be above 0, and is {}", self.rms_norm_eps));
        }
        self.checked_design().map(drop)
    }

    /// With each of RoPE's frequencies divided by a number, as GGUF files have it in place of a rule.
    pub fn with_divided_frequencies(mut self, divisors: Option<&[f32]>) -> Result<Self, String> {
        let Some(divisors) = divisors else { return Ok(self) };
        let (pairs, found) = (self.rope().frequencies.len(), divisors.len());
        if found != pairs || !divisors.iter().all(|it| it.is_finite() && *it > 0.0) {
            return Err(format!(
                "{pairs} divisors of RoPE above 0 are needed, and there are {found}"
            ));
        }
        self.divisors = Some(divisors.iter().map(|&it| it.into()).collect());
        Ok(self)
    }

    /// The name of the family in `config.json`.
    pub fn model_type(&self) -> String {
        let name = serde_json::to_value(self.family).expect("it is a name");
        name.as_str().expect("it is a name").to_owned()
    }

    /// What it says, one field in a line, for replicas that have to agree on it: no parameter tells these constants.
    pub fn to_lines(&self) -> String {
        format!("{self:?}").replace(", ", "\n")
    }

    /// The number of heads of keys, and of values.
    pub fn key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// The size of a head.
    pub fn head_dim(&self) -> usize {
        let usual = || self.hidden_size / self.num_attention_heads;
        self.head_dim.or(self.family.head_dim()).unwrap_or_else(usual)
    }

    /// Which layers have biases.
    pub fn biases(&self) -> Biases {
        self.family.biases(self.attention_bias, self.mlp_bias)
    }

    /// What the decoder computes.
    pub fn design(&self) -> Design {
        self.checked_design().expect("it was checked")
    }

    /// The rotations of queries and keys, in layers that see all of a text.
    pub fn rope(&self) -> Rope {
        self.design().ropes.swap_remove(0)
    }

    /// The rules of all layers, or those of layers that see all and of those with a window.
    fn ropes(&self) -> Result<Vec<Rope>, String> {
        let sizes = rope::Sizes {
            head_dim: self.head_dim(),
            max_position_embeddings: self.max_position_embeddings,
            is_phi3: self.family == Family::Phi3,
        };
        let mut ropes = match self.family {
            Family::Gemma3 => self.rope.ropes_by_kind(&sizes)?.into(),
            _ => vec![self.rope.rope(&sizes)?],
        };
        if let Some(divisors) = &self.divisors {
            let all = ropes.remove(0).divided(divisors);
            ropes.insert(0, all);
        }
        Ok(ropes)
    }
}
