//! The sizes and variants of a decoder, from Hugging Face's `config.json`.

use std::{f64::consts::TAU, iter::repeat, path::Path};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{error::Context, files::read_json};

/// The fields of `config.json` that a decoder is built from, with Hugging Face's defaults.
#[derive(Clone, Debug, Deserialize)]
pub struct LlamaConfig {
    model_type: ModelType,
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
    hidden_act: String,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    /// Newer files hold both of the above here.
    rope_parameters: Option<RopeParameters>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    /// By how much RoPE's frequencies are divided, one for each pair.
    #[serde(skip)]
    divisors: Option<Vec<f64>>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum ModelType {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

#[derive(Clone, Debug, Deserialize)]
struct RopeParameters {
    rope_type: Option<String>,
    /// The older name of the same. Files may have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// How fast the pairs of elements of a head turn, in radians per token.
#[derive(Clone, Debug)]
pub struct Rope {
    /// The angles per position, in radians: `[head_dim / 2]`.
    pub frequencies: Vec<f64>,
}

/// Which linear layers have a bias.
pub struct Biases {
    /// Those of queries, keys and values.
    pub queries_keys_values: bool,
    /// That of attention's output.
    pub output: bool,
    /// Those of the feed-forward layers.
    pub mlp: bool,
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
    pub fn from_json(json: Value) -> Result<Self, String> {
        // Quantized weights have other tensors.
        if let Some(quantized) = json.get("quantization_config").filter(|it| !it.is_null()) {
            let method = quantized.get("quant_method").unwrap_or(quantized);
            return Err(format!("`quantization_config` ({method}) is not supported"));
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
        if self.head_dim() == 0 || !self.head_dim().is_multiple_of(2) {
            return Err(format!("the size of a head must be even, and is {}", self.head_dim()));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return Err(format!("`rms_norm_eps` must be above 0, and is {}", self.rms_norm_eps));
        }
        if self.hidden_act != "silu" {
            return Err(format!("`hidden_act` must be \"silu\", and is {:?}", self.hidden_act));
        }
        self.check_window()?;
        self.frequencies().map(drop)
    }

    /// A window as long as the longest text hides nothing.
    fn check_window(&self) -> Result<(), String> {
        let used = match self.model_type {
            ModelType::Llama => false,
            ModelType::Mistral => true,
            ModelType::Qwen2 | ModelType::Qwen3 => self.use_sliding_window.unwrap_or(false),
        };
        match self.sliding_window {
            Some(window) if used && window < self.max_position_embeddings => Err(format!(
                "`sliding_window` {window} is not supported, because texts may have {} tokens",
                self.max_position_embeddings,
            )),
            _ => Ok(()),
        }
    }

    /// With each of RoPE's frequencies divided by a number, as GGUF files have it in place of a rule.
    pub fn with_divided_frequencies(mut self, divisors: Option<&[f32]>) -> Result<Self, String> {
        let Some(divisors) = divisors else { return Ok(self) };
        let (pairs, found) = (self.head_dim() / 2, divisors.len());
        if found != pairs || !divisors.iter().all(|it| it.is_finite() && *it > 0.0) {
            return Err(format!(
                "{pairs} divisors of RoPE above 0 are needed, and there are {found}"
            ));
        }
        self.divisors = Some(divisors.iter().map(|&it| it.into()).collect());
        Ok(self)
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
        self.head_dim.unwrap_or(match self.model_type {
            ModelType::Qwen3 => 128,
            _ => self.hidden_size / self.num_attention_heads,
        })
    }

    /// Whether the queries and keys of each head are normalized.
    pub fn norms_queries_and_keys(&self) -> bool {
        self.model_type == ModelType::Qwen3
    }

    /// Which layers have biases.
    pub fn biases(&self) -> Biases {
        let own = self.attention_bias;
        match self.model_type {
            ModelType::Llama => {
                Biases { queries_keys_values: own, output: own, mlp: self.mlp_bias }
            }
            ModelType::Mistral => Biases { queries_keys_values: false, output: false, mlp: false },
            ModelType::Qwen2 => Biases { queries_keys_values: true, output: false, mlp: false },
            ModelType::Qwen3 => Biases { queries_keys_values: own, output: own, mlp: false },
        }
    }

    /// The rotations of queries and keys.
    pub fn rope(&self) -> Rope {
        Rope { frequencies: self.frequencies().expect("they were checked") }
    }

    /// Pair i of n turns by `theta^(-i / n)` per token, divided by what a rule and the file say.
    fn frequencies(&self) -> Result<Vec<f64>, String> {
        let [new, old] = [&self.rope_parameters, &self.rope_scaling].map(|it| {
            it.as_ref().map(|parameters| self.frequencies_by(Some(parameters))).transpose()
        });
        match (new?, old?) {
            (Some(new), Some(old)) if new != old => Err(
                "`rope_parameters` and `rope_scaling` contradict each other; remove one of them"
                    .to_owned(),
            ),
            (Some(found), _) | (None, Some(found)) => Ok(found),
            (None, None) => self.frequencies_by(None),
        }
    }

    fn frequencies_by(&self, parameters: Option<&RopeParameters>) -> Result<Vec<f64>, String> {
        let theta = parameters.and_then(|it| it.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 0.0) {
            return Err(format!("`rope_theta` must be above 0, and is {theta}"));
        }
        let pairs = self.head_dim() / 2;
        let plain = (0..pairs).map(|i| theta.powf(-(i as f64) / pairs as f64));
        let divisors = self.divisors.iter().flatten().copied().chain(repeat(1.0));
        let scaled = |frequency| parameters.map_or(Ok(frequency), |it| it.scale(frequency));
        plain.zip(divisors).map(|(frequency, divisor)| Ok(scaled(frequency)? / divisor)).collect()
    }
}

impl RopeParameters {
    /// The frequency for texts that are longer than those of the first training.
    fn scale(&self, frequency: f64) -> Result<f64, String> {
        let need = |name: &str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(format!("RoPE's `{name}` must be above 0, and is {value}")),
            None => Err(format!("RoPE's `{name}` is missing")),
        };
        if let Some((name, _)) = self.others.iter().find(|(_, value)| value.is_object()) {
            return Err(format!("RoPE's parameters of `{name}` layers alone are not supported"));
        }
        if let Some(share) = self.partial_rotary_factor.filter(|it| *it != 1.0) {
            return Err(format!("RoPE's `partial_rotary_factor` {share} is not supported"));
        }
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None if self.factor.is_some() => {
                Err("RoPE has a `factor`, but no `rope_type` says what it does".to_owned())
            }
            None => Ok(frequency),
            Some("default") => Ok(frequency),
            Some("linear") => Ok(frequency / need("factor", self.factor)?),
            Some("llama3") => {
                let factor = need("factor", self.factor)?;
                let low = need("low_freq_factor", self.low_freq_factor)?;
                let high = need("high_freq_factor", self.high_freq_factor)?;
                let length = self.original_max_position_embeddings;
                let length = need("original_max_position_embeddings", length)?;
                if high <= low {
                    return Err(
                        "RoPE's `high_freq_factor` must be above `low_freq_factor`".to_owned()
                    );
                }
                // How often the pair turns within a text of the first training. Those that turn often
                // stay, those that turn seldom slow down, and between them it goes over smoothly.
                let turns = length * frequency / TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                Ok(frequency * (kept + (1.0 - kept) / factor))
            }
            Some(other) => Err(format!("`rope_type` \"{other}\" is not supported")),
        }
    }
}
