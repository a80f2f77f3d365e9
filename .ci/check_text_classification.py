"""Checks the results of the text_classification example: check_text_classification.py DIR DATASET"""

import json
import sys
import xml.dom.minidom
from pathlib import Path

out, generated = Path(sys.argv[1]), sys.argv[2] == "generated-encoder"
summary = json.loads((out / "summary.json").read_text())
print({name: value for name, value in summary.items() if name != "methods"})
methods = {method["name"]: method for method in summary["methods"]}
for method in methods.values():
    print(method)
names = ["full fine-tuning", "LoRA, all linear", "LoRA, query and value", "head"]
full, every, some, head = (methods[name] for name in names)
assert summary["dataset"] == "generated"
assert summary["max_abs_logit_diff_merged"] < 1e-3
assert summary["base_restored_exactly"] is True
width, blocks, inner = (64, 2, 256) if generated else (384, 6, 1536)
assert head["trainable"] == 2 * width + 2
assert some["trainable"] - head["trainable"] == blocks * 2 * 8 * 2 * width
assert every["trainable"] - some["trainable"] == blocks * 8 * (2 * 2 * width + 2 * (width + inner))
assert full["trainable"] == full["total"] == every["total"]
for method in [every, some]:
    assert 0 <= method["bytes"] - 4 * method["trainable"] < 20_000
    path = out / "adapters" / method["name"].replace(" ", "-").replace(",", "-")
    assert json.loads((path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
if generated:
    assert summary["base_accuracy_old"] > 35
    assert full["accuracy_new"] > 95
    assert every["accuracy_new"] > head["accuracy_new"] + 20
    assert some["accuracy_new"] > head["accuracy_new"] + 15
    plus = methods["LoRA+, all linear"]
    assert plus["trainable"] == every["trainable"]
    assert plus["accuracy_new"] > head["accuracy_new"] + 20
else:
    assert summary["base_accuracy_old"] is None
    assert every["trainable"] < 0.03 * every["total"]
    assert every["accuracy_new"] > summary["base_accuracy_new"] + 10
    assert every["bytes"] < 1.5e6 and summary["model_bytes"] > 90e6
vectors = json.loads((out / "vectors.json").read_text())
assert len(vectors["vectors"]) == 16 and len(vectors["vectors"][0]) == width
xml.dom.minidom.parse(str(out / "curves.svg"))
