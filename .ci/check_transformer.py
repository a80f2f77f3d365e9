"""Checks the results of the transformer example: check_transformer.py DIR"""

import json
import sys
from pathlib import Path

summary = json.loads((Path(sys.argv[1]) / "summary.json").read_text())
print(summary)
assert summary["base_accuracy_old"] > 95
assert summary["base_accuracy_new"] < 40, "the new task must defeat the base"
full, overlay, layers = summary["methods"]
assert overlay["trainable"] == layers["trainable"] < 0.05 * full["trainable"]
for method in summary["methods"]:
    assert method["accuracy"] > 90, method
# The same computation, with different rounding.
assert abs(overlay["loss"] - layers["loss"]) < 0.1 * layers["loss"] + 1e-3
assert summary["max_abs_logit_diff"] < 1e-4
assert summary["base_restored_exactly"] is True
