"""Checks the results of the adapters example: check_adapters.py DIR"""

import json
import sys
import xml.dom.minidom
from pathlib import Path

out = Path(sys.argv[1])
summary = json.loads((out / "summary.json").read_text())
accuracies = summary["accuracies"]
print(json.dumps(summary, indent=1))

adapter = summary["adapter_bytes"]
assert adapter == 4 * 8 * (784 + 512 + 512 + 256 + 256 + 10)
assert adapter < summary["file_bytes"] < adapter + 4096
assert summary["base_bytes"] == 4 * 535_818
assert 0 < summary["switch_micros"] < 5_000
more = summary["resident_bytes_with_64"] - summary["resident_bytes_with_1"]
assert 63 * adapter <= more <= 1.1 * 63 * adapter, more / (63 * adapter)

for task in ["left", "right", "upside-down", "mirrored"]:
    assert accuracies[task][task] > 90 > accuracies["none"][task]
for row in accuracies.values():
    assert row.keys() == {"left", "right", "upside-down", "mirrored"}
assert abs(accuracies["left, truncated to rank 8"]["left"] - accuracies["left"]["left"]) < 0.3
ranks = [accuracies[f"left, extracted to rank {rank}"]["left"] for rank in (1, 2, 4, 8)]
assert ranks[-1] > ranks[0]
xml.dom.minidom.parse(str(out / "adapters.svg"))
