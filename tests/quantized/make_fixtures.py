"""Writes matrices that Python's libraries quantized, and what they make of them, for the tests to compare with:
NF4 by bitsandbytes, with scales that are quantized in turn, and blocks of GGUF files.

    python -m venv venv
    venv/bin/pip install bitsandbytes==0.50.2 gguf==0.19.0 torch==2.15.0 safetensors
    venv/bin/python tests/quantized/make_fixtures.py
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"

torch.manual_seed(1)
tensors = {}

# So many blocks that their scales are more than one group of 256, with rows of unlike size, and one of zeros.
weight = torch.randn(96, 192) * torch.linspace(0.01, 0.2, 96)[:, None]
weight[5] = 0
tensors["weight"] = weight
packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
tensors["nf4.doubled"] = bnb.dequantize_4bit(packed, state).contiguous()
tensors["nf4.levels"] = state.code.reshape(1, 16).contiguous()

blocks = (torch.randn(7, 96) * torch.linspace(0.1, 3, 7)[:, None] + 0.2).numpy()
for name in ["Q8_0", "Q4_0", "Q4_1"]:
    kind = gguf.GGMLQuantizationType[name]
    data = quantize(blocks, kind)
    tensors[f"{name}.data"] = torch.from_numpy(np.ascontiguousarray(data))
    tensors[f"{name}.numbers"] = torch.from_numpy(dequantize(data, kind).astype(np.float32))

save_file(tensors, FIXTURES / "quantized.safetensors")
print({name: tuple(tensor.shape) for name, tensor in tensors.items()})
