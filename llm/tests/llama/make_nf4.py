"""Writes a tiny decoder with random weights in NF4, as bitsandbytes and `transformers` do, and what they compute with
it.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 bitsandbytes==0.50.2
    venv/bin/python llm/tests/llama/make_nf4.py
"""

import shutil

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from make_fixtures import FIXTURES, SIZES, write

# Rows of `down_proj` are no whole blocks of 64.
CONFIG = LlamaConfig(
    **SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}, tie_word_embeddings=True,
)


def main():
    torch.manual_seed(34)
    path = FIXTURES / "nf4"
    shutil.rmtree(path, ignore_errors=True)
    model = LlamaForCausalLM(CONFIG).eval()
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if not name.endswith("_proj.weight"):
            tensors[name] = value.clone()
            continue
        # The scales of one layer are quantized in turn.
        codes, state = quantize_4bit(value, quant_type="nf4", compress_statistics=".layers.0." in name)
        tensors[name] = codes
        tensors |= {f"{name}.{key}": it for key, it in state.as_dict(packed=True).items()}
        value.copy_(dequantize_4bit(codes, state))
    model.config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, CONFIG.vocab_size, (2, 9))
    logits = model(ids).logits
    write(path / "expected.json", ids, logits)

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    model.config.quantization_config = settings.to_dict()
    model.config.save_pretrained(path)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert (loaded(ids).logits - logits).abs().max() < 1e-4 * logits.abs().max()


if __name__ == "__main__":
    with torch.no_grad():
        main()
