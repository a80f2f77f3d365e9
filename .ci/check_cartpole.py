"""Checks the results of the cartpole example: check_cartpole.py DIR"""

import json
import sys
import xml.dom.minidom
from pathlib import Path

out = Path(sys.argv[1])
summary = json.loads((out / "summary.json").read_text())
print({name: value for name, value in summary.items() if name not in ("standard", "variants")})
variants = {variant["name"]: variant for variant in summary["variants"]}
target, seeds = summary["target"], len(summary["seeds"])
assert target == 475


def median(values):
    """The lower of the two in the middle; what was not reached counts as the highest."""
    return sorted(float("inf") if value is None else value for value in values)[(seeds - 1) // 2]


assert median(summary["standard"]["returns"]) > 450
assert list(variants) == ["reversed motor", "longer pole", "both"]
for name, variant in variants.items():
    print(name, "base", variant["base"])
    methods = {method["name"]: method for method in variant["methods"]}
    for method in methods.values():
        shown = {key: value for key, value in method.items() if key != "curves"}
        print("   ", shown)
        assert len(method["episodes"]) == len(method["returns"]) == seeds
    lora, full, scratch = (methods[it] for it in ["LoRA", "full fine-tuning", "from scratch"])
    assert full["trainable"] == full["total"] == scratch["trainable"]
    assert lora["trainable"] < 0.25 * lora["total"]
    # What was reached in training is what ended it.
    for method in methods.values():
        for episodes, curve in zip(method["episodes"], method["curves"]):
            assert (episodes is None) == (curve[-1] < target)
    assert median(curve[-1] for curve in lora["curves"]) >= target
    assert median(lora["returns"]) > 450
    # The task is noisy: only several seeds tell which method needs more.
    if seeds >= 5:
        assert median(lora["episodes"]) <= median(scratch["episodes"]), name
# Every push goes the wrong way.
for name in ["reversed motor", "both"]:
    assert max(variants[name]["base"]) < 100
assert summary["switched_returns_equal"] is True
assert summary["base_restored_exactly"] is True
switched = summary["switched"]
for name in variants:
    assert switched[name][name] == variants[name]["methods"][0]["returns"][0]
    assert switched["none"][name] == variants[name]["base"][0]
xml.dom.minidom.parse(str(out / "returns.svg"))
