"""Loads the adapters that the text_classification example saved onto Hugging Face's model, with PEFT,
and compares what they compute. Needs the environment of make_fixtures.py:

    cargo run --release --example text_classification --no-default-features --features flex -- \
        --model MINILM --data SST2
    venv/bin/python llm/tests/bert/check_saved.py MINILM out/text_classification

Then it saves an adapter of PEFT's own for the same layers, and compares the names and shapes.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from make_fixtures import embed


def main():
    model, out = sys.argv[1], Path(sys.argv[2])
    expected = json.loads((out / "vectors.json").read_text())
    length = max(map(len, expected["ids"]))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in expected["ids"]])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in expected["ids"]])
    vectors = torch.tensor(expected["vectors"])

    path = out / "adapters" / "LoRA--all-linear"
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(model), path).eval()
    with torch.no_grad():
        base = AutoModel.from_pretrained(model).eval()
        error = (embed(adapted, ids, mask) - vectors).abs().max().item()
        moved = (embed(base, ids, mask) - vectors).abs().max().item()
    print(f"vectors of {len(ids)} texts: largest difference {error:.1e}; the adapter moves them by {moved:.1e}")
    assert error < 1e-4 < moved

    # An adapter of PEFT's own for the same layers.
    config = adapted.peft_config["default"]
    config.inference_mode, config.modules_to_save = False, None
    own = get_peft_model(AutoModel.from_pretrained(model), config)
    own.save_pretrained(out / "from-python")
    ours = load_file(path / "adapter_model.safetensors")
    theirs = load_file(out / "from-python" / "adapter_model.safetensors")
    head = {f"base_model.model.classifier.{it}" for it in ("weight", "bias")}
    assert ours.keys() - head == theirs.keys(), ours.keys() ^ theirs.keys()
    assert all(ours[key].shape == theirs[key].shape for key in theirs)
    size = (path / "adapter_model.safetensors").stat().st_size
    print(f"{len(theirs)} tensors by the names and shapes of PEFT's own, and the head; {size:,} bytes")


if __name__ == "__main__":
    main()
