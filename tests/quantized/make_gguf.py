"""Writes matrices in types of GGUF files that hold their scales among the codes: the bytes that ggml's code makes of
random numbers, and the numbers that GGUF's own package reads in them.

    python -m venv venv
    venv/bin/pip install gguf==0.19.0 libgguf==0.2.2 numpy==2.4.6 safetensors==0.8.0
    venv/bin/python tests/quantized/make_gguf.py
"""

from pathlib import Path

import gguf
import libgguf
import numpy as np
from safetensors.numpy import save_file

TYPES = ["Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"]

random = np.random.default_rng(3)
tensors = {}
for name in TYPES:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # An odd number of blocks, so that rows of some types are no whole words of four bytes.
    columns = block if block == 256 else 3 * block
    numbers = random.standard_normal((3, columns)) * [[0.1], [1], [3]] + 0.2
    data = np.asarray(libgguf.quantize_rows(numbers.astype(np.float32), kind))
    data = data.view(np.uint8).reshape(3, columns // block * size)
    tensors[f"{name}.data"] = data
    tensors[f"{name}.numbers"] = gguf.quants.dequantize(data, kind).astype(np.float32)

save_file(tensors, Path(__file__).parent / "fixtures" / "gguf.safetensors")
print({name: tensor.shape for name, tensor in tensors.items()})
