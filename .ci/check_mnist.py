"""Checks the results of the mnist example: check_mnist.py DIR BACKEND LEAST_BASE_ACCURACY"""

import json
import sys
import xml.dom.minidom
from pathlib import Path

out, backend, least = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
summary = json.loads((out / "summary.json").read_text())
print({name: value for name, value in summary.items() if name != "methods"})
assert summary["dataset"] == "generated"
assert summary["backend"] == backend
assert (summary["rank"], summary["alpha"], summary["seed"]) == (8, 16, 42)
assert summary["base_accuracy_old"] >= least
assert summary["base_accuracy_new"] < 50, "the changed task must defeat the base"
assert summary["max_abs_logit_diff_merged"] < 1e-3
assert summary["base_restored_exactly"] is True

methods = {method["name"]: method for method in summary["methods"]}
full, lora, last = (methods[name] for name in ["full fine-tuning", "LoRA", "last layer"])
assert full["trainable"] == full["total"] == lora["total"] == 535_818
assert lora["trainable"] == 8 * (784 + 512 + 512 + 256 + 256 + 10)
assert last["trainable"] == 256 * 10 + 10
assert 0 <= lora["bytes"] - 4 * lora["trainable"] < 4096
for name in ["adapter_config.json", "adapter_model.safetensors"]:
    assert (out / "adapters" / "LoRA" / name).stat().st_size > 0
for method in methods.values():
    print({name: value for name, value in method.items()})
    assert method["epoch_seconds"] > 0
    assert method["accuracy_new"] > summary["base_accuracy_new"] - 5
assert lora["accuracy_old_switched_off"] == summary["base_accuracy_old"]
if least > 90:
    assert lora["accuracy_new"] >= full["accuracy_new"] - 1.5
    assert lora["accuracy_new"] >= last["accuracy_new"] + 3
xml.dom.minidom.parse(str(out / "curves.svg"))
