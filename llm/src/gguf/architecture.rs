//! The families of decoders as GGUF files have them.

use burn_lora::peft::Renaming;

use crate::config::LlamaConfig;

/// A family.
pub(crate) struct Architecture {
    /// Its name in GGUF files.
    pub name: &'static str,
    /// Its name in `config.json`, and that of its class in `transformers`.
    pub model_type: &'static str,
    pub class: &'static str,
    /// Whether the pairs of rows of queries and keys that RoPE turns are next to each other. At Hugging Face they are
    /// half a head apart.
    pub permuted: bool,
    /// Whether 1 was added to the weights of norms, so that what reads the file need not do it.
    norms_add_one: bool,
    /// Where norms have other names than in Llamas.
    names: &'static [(&'static str, &'static str)],
}

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

const NORMS_AFTER: &[(&str, &str)] = &[
    ("blk.*.post_attention_norm", "model.layers.*.post_attention_layernorm"),
    ("blk.*.ffn_norm", "model.layers.*.pre_feedforward_layernorm"),
    ("blk.*.post_ffw_norm", "model.layers.*.post_feedforward_layernorm"),
];

const FUSED: &[(&str, &str)] = &[
    ("blk.*.attn_qkv", "model.layers.*.self_attn.qkv_proj"),
    ("blk.*.ffn_up", "model.layers.*.mlp.gate_up_proj"),
];

static FAMILIES: [Architecture; 9] = [
    of("llama", "llama", "LlamaForCausalLM").permuted(),
    of("qwen2", "qwen2", "Qwen2ForCausalLM"),
    of("qwen3", "qwen3", "Qwen3ForCausalLM"),
    of("gemma2", "gemma2", "Gemma2ForCausalLM").named(NORMS_AFTER).adding_one(),
    of("gemma3", "gemma3_text", "Gemma3ForCausalLM").named(NORMS_AFTER).adding_one(),
    of("phi3", "phi3", "Phi3ForCausalLM").named(FUSED),
    of("olmo2", "olmo2", "Olmo2ForCausalLM").named(NORMS_AFTER),
    of("smollm3", "smollm3", "SmolLM3ForCausalLM").permuted(),
    of("granite", "granite", "GraniteForCausalLM").permuted(),
];

const fn of(name: &'static str, model_type: &'static str, class: &'static str) -> Architecture {
    Architecture { name, model_type, class, permuted: false, norms_add_one: false, names: &[] }
}

impl Architecture {
    const fn permuted(mut self) -> Self {
        self.permuted = true;
        self
    }

    const fn adding_one(mut self) -> Self {
        self.norms_add_one = true;
        self
    }

    const fn named(mut self, names: &'static [(&'static str, &'static str)]) -> Self {
        self.names = names;
        self
    }

    /// The names of all families, in GGUF files and in `config.json`.
    pub fn names() -> impl Iterator<Item = [&'static str; 2]> {
        FAMILIES.iter().map(|it| [it.name, it.model_type])
    }

    /// The family of this name.
    pub fn find(name: &str) -> Result<&'static Self, String> {
        FAMILIES.iter().find(|it| it.name == name).ok_or_else(|| {
            let known: Vec<_> = FAMILIES.iter().map(|it| it.name).collect();
            format!(
                "`general.architecture` \"{name}\" is not supported; it must be one of {}",
                known.join(", ")
            )
        })
    }

    /// The family of the decoders that `config.json` calls so.
    pub fn of_model_type(model_type: &str) -> Option<&'static Self> {
        // llama.cpp has no other name for it.
        let model_type = if model_type == "mistral" { "llama" } else { model_type };
        FAMILIES.iter().find(|it| it.model_type == model_type)
    }

    /// The number of heads of the weight or bias of this name at Hugging Face, if its rows are in another order in files.
    pub fn heads(&self, config: &LlamaConfig, name: &str) -> Option<usize> {
        match () {
            _ if !self.permuted => None,
            _ if name.contains(".q_proj.") => Some(config.num_attention_heads),
            _ if name.contains(".k_proj.") => Some(config.key_value_heads()),
            _ => None,
        }
    }

    /// Whether 1 was added to the numbers of the tensor of this name in files.
    pub fn adds_one(&self, file_name: &str) -> bool {
        self.norms_add_one && file_name.ends_with("_norm.weight")
    }

    /// From the names of the modules in files to those at Hugging Face.
    pub fn modules(&self) -> Renaming {
        Renaming::new(self.names.iter().chain(&NAMES).copied()).partial()
    }
}

/// The name of a tensor, `module.parameter`, where the module has the name that the renaming gives.
pub(crate) fn renamed(tensor: &str, modules: &Renaming) -> String {
    match tensor.rsplit_once('.') {
        Some((module, parameter)) => format!("{}.{parameter}", modules.apply(module)),
        None => tensor.to_owned(),
    }
}
