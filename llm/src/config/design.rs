//! What a decoder computes, besides its sizes and weights.

use serde::Deserialize;

use super::{Activation, LlamaConfig, Norms, Rope, Span, family::Family};

/// In what decoders differ. A family is no code of its own: it is one of these.
#[derive(Clone, Debug)]
pub struct Design {
    /// Where the norms of a block are.
    pub norms: Norms,
    /// Whether norms multiply by 1 plus their weight.
    pub norms_add_one: bool,
    /// What the norms of queries and keys go over, if there are any.
    pub queries_and_keys: Option<Span>,
    /// Whether queries, keys and values come of one linear layer, and both halves of the feed-forward network of another.
    pub fused: bool,
    /// The activation of the gate of a feed-forward network.
    pub activation: Activation,
    /// What the vectors of tokens are multiplied by.
    pub embedding_scale: f64,
    /// What the outputs of attention and of the feed-forward network are multiplied by before they are added.
    pub residual_scale: f64,
    /// What the products of queries and keys are multiplied by.
    pub score_scale: f64,
    /// Caps the scores of keys: s becomes `cap·tanh(s/cap)`.
    pub score_cap: Option<f64>,
    /// What the scores of the next tokens are multiplied by.
    pub logit_scale: f64,
    /// Caps the scores of the next tokens.
    pub logit_cap: Option<f64>,
    /// The rules by which queries and keys are turned.
    pub ropes: Vec<Rope>,
    /// How many tokens each token sees at most, itself among them.
    pub windows: Vec<Option<usize>>,
    /// Which of these each layer has.
    pub layers: Vec<LayerDesign>,
}

/// What is of its own in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerDesign {
    /// Which of the windows.
    pub window: usize,
    /// Which of the rules of RoPE. Without one, the order of tokens counts only by the mask.
    pub rope: Option<usize>,
}

/// What `config.json` says of scales and caps.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Fields {
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    embedding_multiplier: Option<f64>,
    attention_multiplier: Option<f64>,
    residual_multiplier: Option<f64>,
    logits_scaling: Option<f64>,
    use_bidirectional_attention: Option<bool>,
}

impl LlamaConfig {
    /// What the decoder computes.
    ///
    /// # Errors
    ///
    /// If a field is not as it must be.
    pub(super) fn checked_design(&self) -> Result<Design, String> {
        let (family, fields) = (self.family, &self.scales);
        if fields.use_bidirectional_attention.unwrap_or(false) {
            return Err("`use_bidirectional_attention` is not supported".to_owned());
        }
        let layers = self.layers.layers(family, self.num_hidden_layers)?;
        let mut windows: Vec<_> = layers.iter().map(|it| it.window).collect();
        windows.sort_unstable();
        windows.dedup();
        let ropes = self.ropes()?;
        let layers = layers.iter().map(|layer| LayerDesign {
            window: windows.iter().position(|it| *it == layer.window).expect("it is one of them"),
            rope: layer.turns.then_some(if layer.slides { ropes.len() - 1 } else { 0 }),
        });
        let layers = layers.collect();
        let scale = |name: &str, value: Option<f64>, usual: f64| match value.unwrap_or(usual) {
            it if it.is_finite() && it > 0.0 => Ok(it),
            it => Err(format!("`{name}` must be above 0, and is {it}")),
        };
        let cap = |name: &str, value: Option<f64>| match value {
            Some(it) if !(it.is_finite() && it > 0.0) => {
                Err(format!("`{name}` must be above 0, and is {it}"))
            }
            // The other families do not have it, whatever their files say.
            value => Ok(value.filter(|_| family.is_gemma())),
        };
        let head = 1.0 / (self.head_dim() as f64).sqrt();
        let is_granite = family == Family::Granite;
        let granite = |value: Option<f64>| value.filter(|_| is_granite);
        let score_scale = match family {
            Family::Gemma2 | Family::Gemma3 => {
                let size = fields.query_pre_attn_scalar;
                1.0 / scale("query_pre_attn_scalar", size, self.head_dim() as f64)?.sqrt()
            }
            Family::Granite => scale("attention_multiplier", fields.attention_multiplier, 1.0)?,
            _ => head,
        };
        let width = (self.hidden_size as f64).sqrt();
        let embedding = if family.is_gemma() { width } else { 1.0 };
        Ok(Design {
            norms: family.norms(),
            norms_add_one: family.is_gemma(),
            queries_and_keys: family.norms_of_queries_and_keys(),
            fused: family == Family::Phi3,
            activation: self.activation()?,
            embedding_scale: scale(
                "embedding_multiplier",
                granite(fields.embedding_multiplier),
                embedding,
            )?,
            residual_scale: scale("residual_multiplier", granite(fields.residual_multiplier), 1.0)?,
            score_scale,
            score_cap: cap("attn_logit_softcapping", fields.attn_logit_softcapping)?,
            logit_scale: 1.0 / scale("logits_scaling", granite(fields.logits_scaling), 1.0)?,
            logit_cap: cap("final_logit_softcapping", fields.final_logit_softcapping)?,
            ropes,
            windows,
            layers,
        })
    }

    fn activation(&self) -> Result<Activation, String> {
        if self.family.is_gemma() {
            // Older files have another activation in `hidden_act`, which `transformers` does not read.
            return match self.hidden_activation.as_deref() {
                None | Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
                Some(other) => Err(format!(
                    "`hidden_activation` must be \"gelu_pytorch_tanh\", and is {other:?}"
                )),
            };
        }
        match self.hidden_act.as_deref() {
            None | Some("silu") => Ok(Activation::Silu),
            Some(other) => Err(format!("`hidden_act` must be \"silu\", and is {other:?}")),
        }
    }
}
