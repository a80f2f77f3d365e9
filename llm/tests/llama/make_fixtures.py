"""Writes tiny decoders with random weights, one of each architecture that this package
reads, and what Hugging Face's `transformers` and PEFT compute with them.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0 safetensors==0.8.0 gguf==0.19.0 libgguf==0.2.2
    venv/bin/python llm/tests/llama/make_fixtures.py SMOLLM2

SMOLLM2 is a directory with SmolLM2-135M-Instruct. The fixture does not contain its weights, only tokens and
some of their scores. Without this argument only the tiny models are written.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import gguf
import libgguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM,
    Qwen3Config, Qwen3ForCausalLM,
)

FIXTURES = Path(__file__).parent / "fixtures"

SIZES = {
    "vocab_size": 29, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2,
}

# Periods of 6.3 and more: with these limits some are kept, some scaled, and one is between.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}

MODELS = {
    "llama2": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama3": (LlamaForCausalLM, LlamaConfig(
        **SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=8, rope_parameters=LLAMA3,
    )),
    "smollm2": (LlamaForCausalLM, LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )),
    "biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=4, tie_word_embeddings=True)),
}

TEXTS = [
    "A thin green line divides the lake from the sky.",
    "it works",
    "Nobody expected the second act to be this funny!",
    "The train to Basel leaves at 7:42 from platform 11.",
    "def area(width, height):\n    return width * height\n",
    "She said: \"I'd rather walk\" - and so we did.",
    "Rust's borrow checker rejects the program, which is what one wants.",
    "naïve café owners & their straße",
    "Low-rank matrices have few parameters.",
    "?",
    "What remains of a film when neither its actors nor its author nor its music are remembered, and "
    "nobody can say any longer where it was shown, who paid for it, or why the cat was there? Little, one "
    "would think; and yet people still speak of the light in it, which fell from the left.",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "3.14159 is not 22/7",
    "The quick brown fox jumps over the lazy dog, again.",
    "Le lac est calme ce matin, et la brume se lève.",
    "He never called back.",
]


def write(path, ids, logits):
    rows = [[round(it, 6) for it in row] for row in logits.double().flatten(0, 1).tolist()]
    text = json.dumps({"ids": ids.tolist(), "logits": rows}, separators=(",", ":"))
    path.write_text(text + "\n")


def tiny(name, kind, config):
    model = kind(config).eval()
    for parameter in model.parameters():
        parameter.copy_(0.5 * torch.randn_like(parameter))
    if name == "mistral":
        # Rounded to the type of its file.
        model = model.bfloat16().float()
    path = FIXTURES / name
    ids = torch.randint(0, config.vocab_size, (2, 9))
    match name:
        case "mistral":
            model.bfloat16().save_pretrained(path)
            model = model.float()
        case "qwen2":
            # In parts with an index.
            model.save_pretrained(path, max_shard_size="3kB")
            assert (path / "model.safetensors.index.json").exists()
        case _:
            model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    write(path / "expected.json", ids, model(ids).logits)

    targets = "all-linear" if name != "smollm2" else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.copy_(0.4 * torch.randn_like(parameter))
    adapted.save_pretrained(path / "adapter")
    (path / "adapter" / "README.md").unlink()
    write(path / "adapter" / "expected.json", ids, adapted(ids).logits)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{name}: {size:,} bytes")


GGUF_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}

# In the order of a layer's parameters, so that each occurs in queries or keys and elsewhere.
TYPES = ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"]


# What llama.cpp's program makes of a model in Q4_K_M, in the order of its parameters. Values and down projections are
# Q6_K in some layers; rows that are no blocks of 256 are Q5_0 instead of Q4_K, and Q8_0 instead of Q6_K.
Q4_K_M = [
    "Q4_K",
    "Q4_K", "Q4_K", "Q6_K", "Q5_0", "Q4_K", "Q4_K", "Q8_0",
    "Q4_K", "Q4_K", "Q4_K", "Q5_0", "Q4_K", "Q4_K", "Q5_0",
    "Q6_K",
]

# The others, the second half of them in blocks of 32.
OTHERS = ["Q2_K", "Q3_K", "Q5_K", "IQ4_XS", "IQ4_NL", "Q2_K", "Q5_K", "Q5_1", "Q3_K"]


def quantized(value, kind):
    """By GGUF's own package as far as it can, and by ggml's code."""
    try:
        return gguf.quants.quantize(value, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = value.shape
        data = np.asarray(libgguf.quantize_rows(value, kind))
        return data.view(np.uint8).reshape(rows, columns // block * size)


def write_gguf(path, model, types, frequencies=None):
    config = model.config
    kind = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else
                          config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    number = 0
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = name.split(".")
        module = GGUF_NAMES[parts[-2]]
        if parts[1] == "layers":
            module = f"blk.{parts[2]}.{module}"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(parts[-2])
        if kind == "llama" and heads:
            # The pairs that RoPE turns next to each other.
            rows = value.shape[0]
            value = value.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        value = value.float().contiguous().numpy()
        if value.ndim == 2:
            kind_of = gguf.GGMLQuantizationType[types[number % len(types)]]
            number += 1
            writer.add_tensor(f"{module}.{parts[-1]}", quantized(value, kind_of), raw_dtype=kind_of)
        else:
            writer.add_tensor(f"{module}.{parts[-1]}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def divisors():
    """What llama.cpp's converter writes for Llama 3: the plain frequencies, divided by the scaled ones."""
    values = []
    for pair in range(4):
        wavelength = 2 * math.pi * LLAMA3["rope_theta"] ** (pair / 4)
        length, factor = LLAMA3["original_max_position_embeddings"], LLAMA3["factor"]
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        if wavelength < length / high:
            values.append(1.0)
        elif wavelength > length / low:
            values.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(values, dtype=torch.float32).numpy()


def as_gguf():
    """The models that have their outputs above, and one with packed weights."""
    for name in ["llama3", "qwen2", "qwen3"]:
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / name)
        frequencies = divisors() if name == "llama3" else None
        write_gguf(FIXTURES / f"{name}.gguf", model, ["F32"], frequencies)
    config = LlamaConfig(**SIZES | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4})
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    write_gguf(FIXTURES / "packed.gguf", model, TYPES)
    model = AutoModelForCausalLM.from_pretrained(FIXTURES, gguf_file="packed.gguf", dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (2, 9))
    write(FIXTURES / "packed.json", ids, model.eval()(ids).logits)


def in_blocks():
    """Decoders that are wide enough for blocks of 256, with the outputs of the numbers that the blocks stand for."""
    torch.manual_seed(34)
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8}
    for name, types, layers in [("q4_k_m", Q4_K_M, 2), ("others", OTHERS, 1)]:
        config = LlamaConfig(**sizes | {"num_hidden_layers": layers})
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
        write_gguf(FIXTURES / f"{name}.gguf", model, types)
        number = 0
        for parameter in model.parameters():
            if parameter.ndim == 2:
                kind = gguf.GGMLQuantizationType[types[number]]
                number += 1
                numbers = gguf.quants.dequantize(quantized(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(numbers))
        assert number == len(types)
        ids = torch.randint(0, config.vocab_size, (2, 9))
        write(FIXTURES / f"{name}.json", ids, model.eval()(ids).logits)


def smollm2(directory):
    """For each text the scores of 60 tokens after its last, the largest score, and the sum of minus the
    logarithms of its tokens' probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    some = torch.randint(0, model.config.vocab_size, (60,))
    texts = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        logits = model(ids).logits[0].double()
        next_ones = logits[:-1].log_softmax(1).gather(1, ids[0, 1:, None])
        texts.append({
            "text": text, "ids": ids[0].tolist(), "largest": logits[-1].abs().max().item(),
            "scores": [round(it, 6) for it in logits[-1, some].tolist()],
            "cross_entropy": -next_ones.sum().item(),
        })
    content = {"some": some.tolist(), "texts": texts}
    (FIXTURES / "smollm2.json").write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n")


def main():
    torch.manual_seed(16)
    with torch.no_grad():
        for name, (kind, config) in MODELS.items():
            shutil.rmtree(FIXTURES / name, ignore_errors=True)
            tiny(name, kind, config)
        as_gguf()
        if len(sys.argv) > 1:
            smollm2(sys.argv[1])
        in_blocks()


if __name__ == "__main__":
    main()
