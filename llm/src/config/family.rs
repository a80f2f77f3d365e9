//! What the families of decoders have in common, and in what they differ.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A family, by the name that `config.json` has for it.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    #[serde(rename = "gemma3_text")]
    Gemma3,
    Phi3,
    Olmo2,
    SmolLm3,
    Granite,
}

/// Where the norms of a block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// Before attention and before the feed-forward network.
    Before,
    /// After them, before their outputs are added.
    After,
    /// Both.
    Both,
}

/// What the norms of queries and keys go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// Each head by itself.
    Head,
    /// All heads of a token together.
    Token,
}

/// The activation of the gate of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x·sigmoid(x)`
    Silu,
    /// GELU by its approximation with a hyperbolic tangent.
    GeluTanh,
}

/// Which linear layers have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Those of queries, keys and values.
    pub queries_keys_values: bool,
    /// That of attention's output.
    pub output: bool,
    /// Those of the feed-forward layers.
    pub mlp: bool,
}

impl Family {
    /// What `transformers` takes for fields that are not in the file.
    pub fn defaults(self) -> Value {
        match self {
            Self::Llama | Self::Qwen2 | Self::Qwen3 | Self::Olmo2 | Self::Granite => json!({}),
            Self::Phi3 => json!({"original_max_position_embeddings": 4096}),
            Self::Mistral => json!({"sliding_window": 4096}),
            Self::Gemma2 => json!({
                "tie_word_embeddings": true, "sliding_window": 4096, "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192,
            }),
            Self::Gemma3 => json!({
                "tie_word_embeddings": true, "sliding_window": 4096, "query_pre_attn_scalar": 256,
                "max_position_embeddings": 131_072,
            }),
            Self::SmolLm3 => json!({"tie_word_embeddings": true, "rope_theta": 2_000_000.0}),
        }
    }

    pub fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    pub fn norms(self) -> Norms {
        match self {
            Self::Gemma2 | Self::Gemma3 => Norms::Both,
            Self::Olmo2 => Norms::After,
            _ => Norms::Before,
        }
    }

    /// What the norms of queries and keys go over, if there are any.
    pub fn norms_of_queries_and_keys(self) -> Option<Span> {
        match self {
            Self::Qwen3 | Self::Gemma3 => Some(Span::Head),
            Self::Olmo2 => Some(Span::Token),
            _ => None,
        }
    }

    /// The size of a head, if the file does not say it and it is not a part of the width.
    pub fn head_dim(self) -> Option<usize> {
        match self {
            Self::Qwen3 => Some(128),
            Self::Gemma2 | Self::Gemma3 => Some(256),
            _ => None,
        }
    }

    /// Which layers have biases, where `attention` and `mlp` are what the file says.
    pub fn biases(self, attention: bool, mlp: bool) -> Biases {
        let of = |queries_keys_values, output, mlp| Biases { queries_keys_values, output, mlp };
        match self {
            Self::Llama | Self::SmolLm3 | Self::Granite => of(attention, attention, mlp),
            Self::Mistral | Self::Phi3 => of(false, false, false),
            Self::Qwen2 => of(true, false, false),
            Self::Qwen3 | Self::Gemma2 | Self::Gemma3 | Self::Olmo2 => {
                of(attention, attention, false)
            }
        }
    }
}
