"""Checks the results of the spoken_digits example with several seeds: check_spoken_digits.py DIR..."""

import json
import sys
import xml.dom.minidom
from pathlib import Path

NAMES = ["full fine-tuning", "LoRA", "last layer"]


def methods_of(out):
    """The methods of one run, each of which is checked alone."""
    summary = json.loads((out / "summary.json").read_text())
    print({name: value for name, value in summary.items() if name != "methods"})
    methods = {method["name"]: method for method in summary["methods"]}
    for method in methods.values():
        print(method)
    full, lora = methods["full fine-tuning"], methods["LoRA"]
    assert summary["dataset"] == "generated"
    assert summary["new_speaker"] == "child"
    assert summary["base_accuracy_old"] > 85
    assert summary["base_accuracy_new"] < summary["base_accuracy_old"] - 15
    assert summary["max_abs_logit_diff_merged"] < 1e-3
    assert summary["base_restored_exactly"] is True
    assert lora["trainable"] < 0.1 * lora["total"]
    assert lora["accuracy_new"] > summary["base_accuracy_new"] + 5
    assert lora["accuracy_new"] > full["accuracy_new"] - 4
    assert lora["accuracy_old_switched_off"] == summary["base_accuracy_old"]
    assert (out / "adapters" / "LoRA" / "adapter_config.json").is_file()
    xml.dom.minidom.parse(str(out / "curves.svg"))
    return methods


runs = [methods_of(Path(out)) for out in sys.argv[1:]]
# One test set is 250 recordings of one speaker. A single run can put the last layer ahead by two of them.
means = {name: sum(run[name]["accuracy_new"] for run in runs) / len(runs) for name in NAMES}
print(means)
assert len(runs) >= 3
assert means["LoRA"] > means["last layer"]
