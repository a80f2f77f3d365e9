"""Checks the results of the digits_seen_and_heard example: check_digits_seen_and_heard.py DIR"""

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
full, lora, frozen = (methods[name] for name in ["full fine-tuning", "LoRA", "frozen encoders"])
assert summary["dataset_images"] == summary["dataset_recordings"] == "generated"
assert summary["new_speaker"] == "bass"
# All know what they were trained on, and not what is new.
for before, after, lost in [(*summary["eye_accuracy"], 50), (*summary["ear_accuracy"], 3)]:
    assert before > 85 and after < before - lost
assert summary["base_accuracy_old"] > 85
assert summary["base_accuracy_new"] < 75
assert summary["max_abs_logit_diff_merged"] < 1e-3
assert summary["base_restored_exactly"] is True
assert lora["trainable"] < 0.2 * lora["total"]
assert lora["accuracy_new"] > frozen["accuracy_new"] + 5
assert lora["accuracy_new"] > full["accuracy_new"] - 4
assert (out / "adapters" / "LoRA" / "adapter_config.json").is_file()
xml.dom.minidom.parse(str(out / "curves.svg"))
