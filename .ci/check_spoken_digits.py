"""Checks the results of the spoken_digits example: check_spoken_digits.py DIR"""

import json
import sys
import xml.dom.minidom
from pathlib import Path

out = Path(sys.argv[1])
summary = json.loads((out / "summary.json").read_text())
print({name: value for name, value in summary.items() if name != "methods"})
methods = {method["name"]: method for method in summary["methods"]}
for method in methods.values():
    print(method)
full, lora, last = (methods[name] for name in ["full fine-tuning", "LoRA", "last layer"])
assert summary["dataset"] == "generated"
assert summary["new_speaker"] == "child"
assert summary["base_accuracy_old"] > 85
assert summary["base_accuracy_new"] < summary["base_accuracy_old"] - 15
assert summary["max_abs_logit_diff_merged"] < 1e-3
assert summary["base_restored_exactly"] is True
assert lora["trainable"] < 0.1 * lora["total"]
assert lora["accuracy_new"] > summary["base_accuracy_new"] + 5
assert lora["accuracy_new"] > full["accuracy_new"] - 4
assert lora["accuracy_new"] > last["accuracy_new"]
assert lora["accuracy_old_switched_off"] == summary["base_accuracy_old"]
assert (out / "adapters" / "LoRA" / "adapter_config.json").is_file()
xml.dom.minidom.parse(str(out / "curves.svg"))
