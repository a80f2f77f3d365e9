"""Writes what GGUF's own package makes of numbers and of adapters: numbers rounded to its types, and files of adapters
as llama.cpp has them, of a model with two heads of queries and one of keys. Prints what rounding changes.

    python -m venv venv
    venv/bin/pip install gguf==0.19.0 numpy==2.4.6 safetensors==0.8.0
    venv/bin/python tests/gguf/make_fixtures.py
"""

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"
TYPES = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
random = np.random.default_rng(5)


def rounded():
    # Usual numbers, and blocks that are zero, equal, tiny, on one side of zero, and with two that are largest.
    rows = random.standard_normal((12, 64)).astype(np.float32)
    rows[1:3] *= [[1e-3], [300.0]]
    rows[3] = 0.0
    rows[4] = 0.7
    rows[5] = -0.7
    rows[6] *= 1e-7
    rows[7] = abs(rows[7])
    rows[8] = -abs(rows[8])
    rows[9, [3, 9]] = [4.0, -4.0]
    # In the middle between two steps of Q8_0.
    rows[10] = (np.arange(64) - 31.5) / 63.0
    rows[10, [0, 32]] = 127.0
    rows[11] = np.round(rows[11] * 8) / 8
    tensors = {"numbers": rows}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quants.quantize(rows, kind)
        tensors[name] = np.ascontiguousarray(data).view(np.uint8).reshape(len(rows), -1)
    save_file(tensors, FIXTURES / "rounded.safetensors")


def errors():
    """What rounding changes in normally distributed numbers, for docs/results.md."""
    numbers = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        rounded = gguf.quants.dequantize(gguf.quants.quantize(numbers, kind), kind)
        print(f"{name}: {100 * np.linalg.norm(rounded - numbers) / np.linalg.norm(numbers):.2f} %")


RANK, WIDTH, HEAD = 3, 8, 4
# The layers: their outputs, and the heads whose rows RoPE turns in pairs.
LAYERS = {
    "blk.0.attn_q": (2 * HEAD, 2), "blk.0.attn_k": (HEAD, 1), "blk.0.attn_v": (HEAD, None), "blk.1.attn_k": (HEAD, 1),
    "output": (32, None),
}
PACKINGS = {"blk.0.attn_q": "F16", "blk.0.attn_k": "F32", "blk.0.attn_v": "BF16", "blk.1.attn_k": "F32"}


def adapters(name, alpha, packings):
    writer = gguf.GGUFWriter(FIXTURES / name, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    factors = {}
    for layer, (outputs, heads) in LAYERS.items():
        a = random.standard_normal((RANK, WIDTH)).astype(np.float32)
        b = random.standard_normal((outputs, RANK)).astype(np.float32)
        for factor, numbers in {"a": a, "b": b}.items():
            kind = gguf.GGMLQuantizationType[packings.get(layer, "F32")]
            numbers = gguf.quants.dequantize(gguf.quants.quantize(numbers, kind), kind)
            factors[f"{layer}.{factor}"] = np.ascontiguousarray(numbers)
            if factor == "b" and heads:
                numbers = numbers.reshape(heads, 2, outputs // heads // 2, RANK).swapaxes(1, 2).reshape(outputs, RANK)
            writer.add_tensor(f"{layer}.weight.lora_{factor}", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    # A file may hold the embeddings of a model whose head is another tensor: A as it is, and B.
    a, b = random.standard_normal((32, RANK)), random.standard_normal((WIDTH, RANK))
    for factor, numbers in {"a": a, "b": b}.items():
        factors[f"token_embd.{factor}"] = numbers.astype(np.float32)
        writer.add_tensor(f"token_embd.weight.lora_{factor}", numbers.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(factors, FIXTURES / f"{name}.safetensors")


FIXTURES.mkdir(exist_ok=True)
rounded()
adapters("adapters.gguf", 4.5, PACKINGS)
adapters("unscaled.gguf", None, {})
errors()
