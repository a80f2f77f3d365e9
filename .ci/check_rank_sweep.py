"""Checks the results of the rank_sweep example on generated digits: check_rank_sweep.py DIR"""

import json
import sys
import xml.dom.minidom
from pathlib import Path

out = Path(sys.argv[1])
summary = json.loads((out / "summary.json").read_text())
sweeps = summary.pop("sweeps")
print(summary)
assert (summary["task"], summary["dataset"]) == ("digits", "generated")
assert sweeps.keys() == {
    "rank", "scaling", "layers", "alpha", "initialization", "singular_values"
}
base, full = summary["base_accuracy_new"], summary["full"]
assert summary["base_accuracy_old"] > 95 and base < 50, "the changed task must defeat the base"
assert full["trainable"] == summary["parameters"] == 535_818
best = full["accuracy"]["mean"]
assert best > 90


def show(point):
    print({name: value for name, value in point.items() if name not in ("bytes", "seconds")})


def means(points, name):
    return [point[name]["mean"] for point in points]


# A low rank has fewer parameters and learns less. A few percent of the parameters are enough.
ranks = {point["rank"]: point for point in sweeps["rank"]}
for rank, point in ranks.items():
    show(point)
    assert point["trainable"] == rank * (784 + 512 + 512 + 256 + 256 + 10)
    assert point["bytes"] == 4 * point["trainable"]
assert ranks[1]["trainable"] < 0.005 * full["trainable"]
accuracy = {rank: point["accuracy"]["mean"] for rank, point in ranks.items()}
assert base + 30 < accuracy[1] < accuracy[8] - 3
assert accuracy[8] > best - 4
assert ranks[1]["loss"]["mean"] > ranks[4]["loss"]["mean"] > ranks[16]["loss"]["mean"]

# The rules agree at rank 8, and move the weights of high ranks the more the larger their scale is.
rates = sorted({point["learning_rate"] for point in sweeps["scaling"]})
assert len(rates) == 2
for rate in rates:
    rules = {}
    for point in sweeps["scaling"]:
        if point["learning_rate"] == rate:
            show(point)
            rules.setdefault(point["scaling"], {})[point["rank"]] = point
    assert len({point[8]["accuracy"]["mean"] for point in rules.values()}) == 1
    order = ["alpha_over_rank", "alpha_over_sqrt_rank", "alpha"]
    at_64, at_1 = ([rules[rule][rank]["distance"]["mean"] for rule in order] for rank in (64, 1))
    assert at_64 == sorted(at_64)
    assert at_1 == sorted(at_1, reverse=True)

# The sets of layers have about as many parameters. The last layer alone is not enough.
layers = {entry["layers"]: entry["points"] for entry in sweeps["layers"]}
for name, points in layers.items():
    print(name)
    for point, first in zip(points, layers["all"], strict=True):
        show(point)
        assert abs(point["trainable"] / first["trainable"] - 1) < 0.15
last = {name: points[-1]["accuracy"]["mean"] for name, points in layers.items()}
assert last["head"] < min(last[name] for name in last if name != "head")
assert last["all"] > last["head"] + 10

# A larger alpha moves the weights further.
for point in sweeps["alpha"]:
    show(point)
alphas, distances = [point["alpha"] for point in sweeps["alpha"]], means(sweeps["alpha"], "distance")
assert alphas == sorted(alphas) and distances == sorted(distances)
assert distances[0] < 0.1 * distances[-1]
assert means(sweeps["alpha"], "accuracy")[0] < best - 20

# One factor at zero keeps the base as it is, and learns. Both at zero do not learn.
starts = {start["name"]: start for start in sweeps["initialization"]["starts"]}
for start in starts.values():
    print({name: value for name, value in start.items() if name not in ("steps", "losses")})
for name in ["A random, B zero", "A zero, B random", "both zero"]:
    assert starts[name]["at_start"]["logit_change"]["high"] == 0
    assert starts[name]["at_start"]["old_accuracy"]["mean"] == summary["base_accuracy_old"]
stuck = starts["both zero"]
assert stuck["distance"]["high"] == 0
assert stuck["accuracy"]["low"] == stuck["accuracy"]["high"] == base
assert len(set(means([{"loss": loss} for loss in stuck["losses"]], "loss"))) == 1
for name, start in starts.items():
    if name != "both zero":
        assert start["losses"][-1]["mean"] < 0.5 * start["losses"][0]["mean"]
random = sweeps["initialization"]["both_random"]
print(random)
changes = means(random, "logit_change")
assert starts["both random"]["at_start"]["logit_change"]["low"] > 0
assert changes == sorted(changes)
assert random[-1]["old_accuracy"]["mean"] < summary["base_accuracy_old"] - 20

# Most of what full fine-tuning changes is in few directions.
for change in sweeps["singular_values"]:
    values, energy = change["singular_values"], change["energy"]
    print(change["layer"], values[:4], energy[:8])
    assert len(values) == min(change["shape"])
    assert values == sorted(values, reverse=True) and values[-1] >= 0
    assert energy == sorted(energy) and abs(energy[-1] - 1) < 1e-6
    assert energy[7] > 0.5

for name in sweeps:
    xml.dom.minidom.parse(str(out / f"{name}.svg"))
