"""Writes large models with random weights, to measure the memory that training them takes, which does not depend on
the values. Tokens are those of a small GGUF model.

    python -m venv env && env/bin/pip install torch==2.15.0 transformers==5.24.0 gguf==0.19.0
    env/bin/python write_large.py llama-1b SMOLLM2.gguf DIRECTORY
    env/bin/python write_large.py llama-8b SMOLLM2.gguf FILE.gguf

`llama-1b` is a decoder with the shapes of TinyLlama and 49,152 tokens, 1.07 billion parameters, in bf16, in several
safetensors files (2.1 GB); `llama-1b-untied` has a head of its own (2.3 GB). `llama-8b` is a file of Llama 3.1 8B's
shapes in Q4_K_M (4.9 GB).
"""

import json
import sys
from pathlib import Path

import numpy as np

DEVIATION = 0.02

ONE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49_152, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}


def write_1b(tokens, to, tied):
    """Each file holds some layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    to.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(tokens.parent, gguf_file=tokens.name).save_pretrained(to)
    (to / "config.json").write_text(json.dumps(ONE | {"tie_word_embeddings": tied}, indent=1) + "\n")
    torch.manual_seed(1)
    width, inner, keys = ONE["hidden_size"], ONE["intermediate_size"], 256

    def matrix(rows, columns):
        return (DEVIATION * torch.randn(rows, columns)).bfloat16()

    def layer(index):
        shapes = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        tensors = {f"{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{norm}.weight"] = torch.ones(width).bfloat16()
        return {f"model.layers.{index}.{name}": value for name, value in tensors.items()}

    def ends():
        tensors = {"model.embed_tokens.weight": matrix(ONE["vocab_size"], width),
                   "model.norm.weight": torch.ones(width).bfloat16()}
        return tensors if tied else tensors | {"lm_head.weight": matrix(ONE["vocab_size"], width)}

    layers = range(ONE["num_hidden_layers"])
    parts = [lambda: ends(), *(lambda some=layers[start:start + 8]: {
        name: value for index in some for name, value in layer(index).items()
    } for start in layers[::8])]
    index, size = {}, 0
    for number, part in enumerate(parts, 1):
        name, tensors = f"model-{number:05}-of-{len(parts):05}.safetensors", part()
        save_file(tensors, to / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        size += sum(value.nbytes for value in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (to / "model.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n")


EIGHT = {"vocab_size": 128_256, "width": 4096, "inner": 14_336, "layers": 32, "heads": 32, "kv_heads": 8}

# By how much Llama 3.1 divides its frequencies.
FACTOR, LOW, HIGH, LENGTH, BASE = 8, 1, 4, 8192, 5e5


def divisors():
    pairs = EIGHT["width"] // EIGHT["heads"] // 2
    turns = LENGTH * BASE ** (-np.arange(pairs) / pairs) / (2 * np.pi)
    kept = np.clip((turns - LOW) / (HIGH - LOW), 0, 1)
    return (1 / (kept + (1 - kept) / FACTOR)).astype(np.float32)


def q4_k(numbers, random):
    """Blocks of 256 numbers: their scale, what the smallest numbers are multiplied by, eight of each, all 32, in 6 bits,
    and the codes."""
    blocks = np.empty((numbers // 256, 144), np.uint8)
    scale = DEVIATION / (32 * 4.61)
    blocks[:, :4] = np.array([scale, 7.5 * scale], np.float16).view(np.uint8)
    blocks[:, 4:12], blocks[:, 12:16] = 0xA0, 0
    blocks[:, 16:] = np.frombuffer(random.bytes(numbers // 2), np.uint8).reshape(-1, 128)
    return blocks


def q6_k(numbers, random):
    """Blocks of 256 numbers: the codes, 16 scales, all 16, and their scale."""
    blocks = np.empty((numbers // 256, 210), np.uint8)
    blocks[:, :192] = np.frombuffer(random.bytes(numbers // 4 * 3), np.uint8).reshape(-1, 192)
    blocks[:, 192:208] = 16
    blocks[:, 208:] = np.array([DEVIATION / (16 * 18.5)], np.float16).view(np.uint8)
    return blocks


def more_tokens(tokens, merges, count, random):
    """Pairs of tokens as tokens, until there are so many."""
    plain = [token for token in tokens if len(token) < 6 and token.isascii()]
    known = set(tokens)
    while len(known) < count:
        one, other = (plain[index] for index in random.integers(len(plain), size=2))
        if one + other not in known:
            known.add(one + other)
            tokens.append(one + other)
            merges.append(f"{one} {other}")


def write_8b(tokens, to):
    """With the mixture of types of llama.cpp's Q4_K_M."""
    import gguf

    random = np.random.default_rng(8)
    width, inner, layers = EIGHT["width"], EIGHT["inner"], EIGHT["layers"]
    keys, vocabulary = width // EIGHT["heads"] * EIGHT["kv_heads"], EIGHT["vocab_size"]
    field = gguf.GGUFReader(tokens).get_field
    words, merges, kinds = (field(f"tokenizer.ggml.{name}").contents() for name in ["tokens", "merges", "token_type"])
    more_tokens(words, merges, vocabulary, random)
    to.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(to, "llama")
    writer.add_context_length(131_072)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(EIGHT["heads"])
    writer.add_head_count_kv(EIGHT["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(BASE)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(field("tokenizer.ggml.pre").contents())
    writer.add_token_list(words)
    writer.add_token_types(kinds + [1] * (vocabulary - len(kinds)))
    writer.add_token_merges(merges)
    for name in ["bos", "eos"]:
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", field(f"tokenizer.ggml.{name}_token_id").contents())
    writer.add_chat_template(field("tokenizer.chat_template").contents())

    tensors = {"rope_freqs": (divisors().shape, "F32"), "token_embd": ((vocabulary, width), "Q4_K"),
               "output_norm": ((width,), "F32"), "output": ((vocabulary, width), "Q6_K")}
    for layer in range(layers):
        eighth = layers // 8
        large = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        more = "Q6_K" if large else "Q4_K"
        tensors |= {f"blk.{layer}.{name}": it for name, it in {
            "attn_norm": ((width,), "F32"), "attn_q": ((width, width), "Q4_K"), "attn_k": ((keys, width), "Q4_K"),
            "attn_v": ((keys, width), more), "attn_output": ((width, width), "Q4_K"), "ffn_norm": ((width,), "F32"),
            "ffn_gate": ((inner, width), "Q4_K"), "ffn_up": ((inner, width), "Q4_K"),
            "ffn_down": ((width, inner), more),
        }.items()}
    size = {"F32": 4, "Q4_K": 144 / 256, "Q6_K": 210 / 256}
    for name, (shape, kind) in tensors.items():
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        bytes_shape = shape if raw is None else (*shape[:-1], int(shape[-1] * size[kind]))
        dtype = np.dtype(np.float32 if raw is None else np.uint8)
        writer.add_tensor_info(f"{name}.weight", bytes_shape, dtype, int(np.prod(shape) * size[kind]), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (shape, kind) in tensors.items():
        numbers = int(np.prod(shape))
        match kind:
            case "F32":
                values = divisors() if name == "rope_freqs" else np.ones(shape, np.float32)
            case "Q4_K":
                values = q4_k(numbers, random)
            case "Q6_K":
                values = q6_k(numbers, random)
        writer.write_tensor_data(values)
    writer.close()


if __name__ == "__main__":
    what, tokens, to = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    match what:
        case "llama-1b":
            write_1b(tokens, to, tied=True)
        case "llama-1b-untied":
            write_1b(tokens, to, tied=False)
        case "llama-8b":
            write_8b(tokens, to)
