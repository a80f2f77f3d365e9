"""Writes a tiny decoder with random weights of each family that `make_fixtures.py` has none of, as a Hugging Face
directory and as a GGUF file, and what Hugging Face's `transformers` and PEFT compute with it: scores, and the gradients
of an adapter. Writes what each of RoPE's rules makes of one of the other models, too.

    venv/bin/python llm/tests/llama/make_families.py

The environment is that of `make_fixtures.py`.
"""

import json
import shutil

import gguf
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GraniteConfig, GraniteForCausalLM,
    LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Olmo2Config, Olmo2ForCausalLM, Phi3Config, Phi3ForCausalLM,
    Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM,
)

from make_fixtures import FIXTURES, SIZES

SMALL = SIZES | {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4, "pad_token_id": 0}

# Texts have 11 tokens, so that windows hide some of them, and are longer than those of a first training.
LENGTH = 11
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 50.0, "short_factor": [1.1, 1.3, 1.9], "long_factor": [1.5, 3.5, 9.0],
}

GEMMA = SMALL | {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 3}

FAMILIES = {
    # Norms on both sides, caps, and a window on each second layer.
    "gemma2": (Gemma2ForCausalLM, lambda: Gemma2Config(
        **GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=3.0,
        rope_parameters={"rope_type": "default", "rope_theta": 60.0},
    )),
    # Two rules of RoPE, and norms of queries and keys.
    "gemma3": (Gemma3ForCausalLM, lambda: Gemma3TextConfig(
        **GEMMA | {"num_hidden_layers": 7, "hidden_size": 8, "intermediate_size": 6, "num_key_value_heads": 1, "num_attention_heads": 2},
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 80.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    )),
    # Fused layers, a part of each head that is turned, and divisors of their own for long texts.
    "phi3": (Phi3ForCausalLM, lambda: Phi3Config(
        **SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1}, original_max_position_embeddings=8, sliding_window=5,
        rope_parameters=LONGROPE | {"partial_rotary_factor": 0.75},
    )),
    # Norms after, and those of queries and keys over all heads.
    "olmo2": (Olmo2ForCausalLM, lambda: Olmo2Config(
        **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 70.0},
    )),
    # The fourth layer turns nothing.
    "smollm3": (SmolLM3ForCausalLM, lambda: SmolLM3Config(
        **SMALL | {"num_hidden_layers": 4, "hidden_size": 8, "intermediate_size": 6}, no_rope_layer_interval=4,
        rope_parameters={"rope_type": "default", "rope_theta": 90.0},
    )),
    # Four multipliers.
    "granite": (GraniteForCausalLM, lambda: GraniteConfig(
        **SMALL, tie_word_embeddings=True, embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.6,
        logits_scaling=2.5, rope_parameters={"rope_type": "default", "rope_theta": 40.0},
    )),
}

# Windows of families whose other properties are tested elsewhere.
WINDOWS = {
    "mistral": (MistralForCausalLM, lambda: MistralConfig(**SMALL, sliding_window=4)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=1)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(
        **SMALL, head_dim=4, use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention", "full_attention"],
    )),
}

# Rules of RoPE, and the lengths of texts that they are tried with.
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
RULES = {
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    "yarn": YARN,
    "yarn with its own limits": YARN | {"beta_fast": 3.0, "beta_slow": 0.5, "truncate": False},
    "yarn with two scales": YARN | {"mscale": 1.0, "mscale_all_dim": 0.6},
    "yarn with an attention factor": YARN | {"attention_factor": 1.3},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 8, "factor": 8.0,
        "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.3, 2.0, 4.0, 8.0],
    },
    # Of Phi-3, the only one of these families that has it.
    "half of each head": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}


def rounded(logits):
    return [[round(it, 6) for it in row] for row in logits.double().flatten(0, 1).tolist()]


def write(path, ids, logits, **more):
    content = {"ids": ids.tolist(), "logits": rounded(logits), **more}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def random(kind, config, scale=0.5):
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return model


def family(name, kind, config):
    model = random(kind, config)
    path = FIXTURES / name
    shutil.rmtree(path, ignore_errors=True)
    ids = torch.randint(0, config.vocab_size, (2, LENGTH))
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    with torch.no_grad():
        write(path / "expected.json", ids, model(ids).logits)
    write_gguf(FIXTURES / f"{name}.gguf", model, name)

    lora = LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).eval()
    factors = {key: it for key, it in adapted.named_parameters() if "lora_" in key}
    with torch.no_grad():
        for factor in factors.values():
            factor.copy_(0.4 * torch.randn_like(factor))
    adapted.save_pretrained(path / "adapter")
    (path / "adapter" / "README.md").unlink()
    logits = adapted(ids).logits
    # Summed over the tokens, as this package does it.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    write(path / "adapter" / "expected.json", ids, logits, loss=round(loss.item(), 6))
    gradients = {key.replace(".default", ""): it.grad for key, it in factors.items()}
    save_file(gradients, path / "adapter" / "gradients.safetensors")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{name}: {size:,} bytes, loss {loss.item():.3f}")


NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv", "o_proj": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_gguf(path, model, kind):
    """As llama.cpp's converter does it, by its fields and names."""
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    writer.add_rope_dimension_count(int(head * full.get("partial_rotary_factor", 1.0)))
    if kind.startswith("gemma"):
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    match kind:
        case "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        case "gemma3":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(full["factor"])
            writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        case "phi3":
            writer.add_sliding_window(config.sliding_window)
            writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
            for name in ["long", "short"]:
                writer.add_tensor(f"rope_factors_{name}.weight", torch.tensor(rope[f"{name}_factor"]).numpy())
        case "granite":
            writer.add_attention_scale(config.attention_multiplier)
            writer.add_embedding_scale(config.embedding_multiplier)
            writer.add_residual_scale(config.residual_multiplier)
            writer.add_logit_scale(config.logits_scaling)
    after = kind in ("gemma2", "gemma3", "olmo2")
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = name.split(".")
        names = NAMES | {"post_attention_layernorm": "post_attention_norm" if after else "ffn_norm"}
        module = names[parts[-2]]
        if parts[1] == "layers":
            module = f"blk.{parts[2]}.{module}"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(parts[-2])
        if kind in ("smollm3", "granite") and heads:
            rows = value.shape[0]
            value = value.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if kind.startswith("gemma") and parts[-2].endswith("norm"):
            value = value + 1
        writer.add_tensor(f"{module}.{parts[-1]}", value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def windows():
    """Models that are little more than a window. Their weights are a formula, so that no file is needed for them."""
    cases = {}
    for name, (kind, config) in WINDOWS.items():
        model = kind(config()).eval()
        with torch.no_grad():
            fill(model)
            ids = torch.arange(LENGTH)[None] * 5 % 29
            logits = model(ids).logits
        cases[name] = {"config": settings(model), "ids": ids.tolist(), "logits": rounded(logits[:, -4:])}
    return cases


def settings(model):
    """The configuration, without what says nothing of the model."""
    config = json.loads(model.config.to_json_string())
    return {key: it for key, it in config.items() if key not in ("transformers_version", "architectures", "dtype")}


def fill(model):
    """Number i of a tensor is 0.6·sin(i + the length of its name), of norms 1 more."""
    for name, parameter in model.named_parameters():
        numbers = 0.6 * torch.sin(torch.arange(parameter.numel()).double() + len(name)).reshape(parameter.shape)
        parameter.copy_(numbers + (1 if "norm" in name else 0))


def rules():
    """Scores after the last tokens of texts that are shorter and longer than usual."""
    cases = {}
    for name, rule in RULES.items():
        usual = 8 if rule["rope_type"] == "dynamic" else 64
        sizes = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": usual}
        if "partial_rotary_factor" in rule:
            model = Phi3ForCausalLM(Phi3Config(**sizes | {"hidden_size": 16}, pad_token_id=0, rope_parameters=dict(rule))).eval()
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=8, rope_parameters=dict(rule))).eval()
        with torch.no_grad():
            fill(model)
            texts = []
            for length in (7, 12):
                ids = torch.arange(length)[None] * 3 % 29
                texts.append({"ids": ids.tolist(), "logits": rounded(model(ids).logits[:, -2:])})
        cases[name] = {"config": settings(model), "texts": texts}
    return cases


def main():
    torch.manual_seed(34)
    for name, (kind, config) in FAMILIES.items():
        family(name, kind, config())
    for name, cases in [("windows", windows()), ("rules", rules())]:
        text = json.dumps(cases, separators=(",", ":"))
        (FIXTURES / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
