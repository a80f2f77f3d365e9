//! The fields of a GGUF file that describe a decoder, from its configuration.

use burn_lora::gguf::Field;

use super::{
    architecture::Architecture,
    config::{DIVISORS, LONG, SHORT},
};
use crate::{
    config::{Design, LlamaConfig, Rope},
    error::Result,
};

/// What describes a decoder in a file: fields, and small tensors of its positions.
pub(crate) struct Description {
    /// The fields, by their names.
    pub fields: Vec<(String, Field)>,
    /// Tensors in single precision, by their names in the file.
    pub tensors: Vec<(&'static str, Vec<f32>)>,
}

/// What describes a decoder of this configuration.
///
/// # Errors
///
/// If llama.cpp has no such decoder, or files are not written for it: the error says in what it differs.
pub(crate) fn describe(
    config: &LlamaConfig,
    family: &Architecture,
    is_tied: bool,
) -> Result<Description> {
    let design = config.design();
    let mut all = Describing { arch: family.name, fields: Vec::new(), tensors: Vec::new() };
    all.check_tensors(config, is_tied)?;
    all.text("general.architecture", family.name);
    all.text("general.type", "model");
    let layers = config.num_hidden_layers;
    let windows: Vec<_> = design.layers.iter().map(|it| design.windows[it.window]).collect();
    let sees = all.window(&windows, layers)?;
    // Where llama.cpp knows of no window, texts that are not longer than it are the same.
    let length =
        sees.map_or(config.max_position_embeddings, |it| it.min(config.max_position_embeddings));
    for (name, size) in [
        ("block_count", layers),
        ("context_length", length),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.key_value_heads()),
        ("attention.key_length", config.head_dim()),
        ("attention.value_length", config.head_dim()),
        ("vocab_size", config.vocab_size),
    ] {
        all.size(name, size)?;
    }
    all.number("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
    all.scales(config, &design)?;
    all.turns(&design)?;
    all.rope(&design.ropes)?;
    Ok(Description { fields: all.fields, tensors: all.tensors })
}

struct Describing {
    arch: &'static str,
    fields: Vec<(String, Field)>,
    tensors: Vec<(&'static str, Vec<f32>)>,
}

impl Describing {
    fn text(&mut self, name: &str, text: &str) {
        self.fields.push((name.to_owned(), text.into()));
    }

    /// A field of this family.
    fn size(&mut self, name: &str, size: usize) -> Result<()> {
        let size = u32::try_from(size).map_err(|_| format!("`{name}` {size} is too large"))?;
        self.fields.push((format!("{}.{name}", self.arch), size.into()));
        Ok(())
    }

    /// A field of this family.
    fn number(&mut self, name: &str, number: f64) {
        self.fields.push((format!("{}.{name}", self.arch), (number as f32).into()));
    }

    fn refuse<T>(&self, what: &str) -> Result<T> {
        Err(format!(
            "llama.cpp's `{}` models {what}; write the model as a directory instead",
            self.arch
        ))
    }

    /// Fails if the decoder has tensors that llama.cpp does not have in this family, or lacks one.
    fn check_tensors(&self, config: &LlamaConfig, is_tied: bool) -> Result<()> {
        let biases = config.biases();
        let heads = config.num_attention_heads * config.head_dim();
        match self.arch {
            "llama" | "granite" => Ok(()),
            _ if biases.output || biases.mlp => {
                self.refuse("have no biases behind attention and in the feed-forward network")
            }
            "gemma2" if !is_tied => self.refuse("have no head of their own"),
            "olmo2" if is_tied => self.refuse("have a head of their own"),
            "olmo2" | "phi3" if heads != config.hidden_size => {
                self.refuse("have heads that are together as wide as the model")
            }
            _ => Ok(()),
        }
    }

    fn refuse_rope<T>(&self) -> Result<T> {
        Err(format!(
            "files of llama.cpp's `{}` models are not written with such a rule of RoPE; write the model as a directory, and \
             convert that",
            self.arch
        ))
    }

    /// The windows of the layers, if llama.cpp has them in these. Otherwise the smallest one, which texts must not be
    /// longer than.
    fn window(&mut self, windows: &[Option<usize>], layers: usize) -> Result<Option<usize>> {
        let has_window: fn(usize) -> bool = match self.arch {
            "gemma2" => |layer| layer % 2 == 0,
            "gemma3" => |layer| (layer + 1) % 6 != 0,
            "phi3" => |_| true,
            _ => return Ok(windows.iter().copied().flatten().min()),
        };
        let Some(window) = windows.iter().copied().flatten().next() else {
            // Of Phi-3 alone: the others always have windows.
            self.size("attention.sliding_window", 0)?;
            return Ok(None);
        };
        let is_usual = |layer: usize| windows[layer] == has_window(layer).then_some(window);
        if !(0..layers).all(is_usual) {
            return self.refuse("have windows in other layers");
        }
        self.size("attention.sliding_window", window)?;
        Ok(None)
    }

    /// Multipliers and caps.
    fn scales(&mut self, config: &LlamaConfig, design: &Design) -> Result<()> {
        match self.arch {
            "granite" => {
                self.number("attention.scale", design.score_scale);
                self.number("embedding_scale", design.embedding_scale);
                self.number("residual_scale", design.residual_scale);
                self.number("logit_scale", 1.0 / design.logit_scale);
                return Ok(());
            }
            "gemma2" => {
                // What llama.cpp takes if the file does not say it is no "none".
                let (Some(score), Some(logit)) = (design.score_cap, design.logit_cap) else {
                    return self.refuse("always have caps of scores");
                };
                self.number("attn_logit_softcapping", score);
                self.number("final_logit_softcapping", logit);
            }
            "gemma3" if design.score_cap.is_some() => return self.refuse("have no caps of scores"),
            "gemma3" => {
                if let Some(cap) = design.logit_cap {
                    self.number("final_logit_softcapping", cap);
                }
            }
            _ => {}
        }
        // By the number of layers, those of 27 billion weights are known, and their scale is another.
        let is_largest =
            matches!((self.arch, config.num_hidden_layers), ("gemma2", 46) | ("gemma3", 62));
        let size = match is_largest {
            true => config.hidden_size / config.num_attention_heads,
            false => config.head_dim(),
        };
        let usual = 1.0 / (size as f64).sqrt();
        match is_near(design.score_scale, usual) {
            true => Ok(()),
            false => self.refuse("scale the products of queries and keys by the size of a head"),
        }
    }

    /// Which layers turn queries and keys.
    fn turns(&self, design: &Design) -> Result<()> {
        let is_usual = |(index, turns): (usize, bool)| match self.arch {
            "smollm3" => turns == ((index + 1) % 4 != 0),
            _ => turns,
        };
        match design.layers.iter().map(|it| it.rope.is_some()).enumerate().all(is_usual) {
            true => Ok(()),
            false => self.refuse("turn queries and keys in other layers"),
        }
    }

    /// How queries and keys are turned.
    fn rope(&mut self, ropes: &[Rope]) -> Result<()> {
        let Some(rope) = ropes.first() else { return Ok(()) };
        self.number("rope.freq_base", rope.theta);
        self.size("rope.dimension_count", 2 * rope.frequencies.len())?;
        if let [_, sliding] = ropes {
            self.number("rope.freq_base_swa", sliding.theta);
            let is_plain = sliding.divisors().into_iter().all(|it| is_near(it, 1.0));
            if !is_plain || sliding.amplitude != 1.0 || sliding.depends_on_length() {
                return self.refuse("have no rule of RoPE in layers with a window");
            }
        }
        let divisors = rope.divisors();
        let single = |numbers: &[f64]| numbers.iter().map(|&it| it as f32).collect::<Vec<_>>();
        if let ("phi3", Some((length, long))) = (self.arch, rope.long_divisors()) {
            self.size("rope.scaling.original_context_length", length)?;
            self.number("rope.scaling.attn_factor", rope.amplitude);
            self.tensors.extend([(LONG, single(&long)), (SHORT, single(&divisors))]);
            return Ok(());
        }
        if rope.depends_on_length() || rope.amplitude != 1.0 {
            return self.refuse_rope();
        }
        let first = divisors[0];
        match divisors.iter().all(|it| is_near(*it, first)) {
            true if is_near(first, 1.0) => {}
            true => {
                self.text(&format!("{}.rope.scaling.type", self.arch), "linear");
                self.number("rope.scaling.factor", first);
            }
            // Llama 3's rule, or any other.
            false if self.arch == "llama" => self.tensors.push((DIVISORS, single(&divisors))),
            false => return self.refuse_rope(),
        }
        Ok(())
    }
}

fn is_near(value: f64, expected: f64) -> bool {
    (value / expected - 1.0).abs() <= 1e-6
}
