"""Writes adapters with this crate, loads them into Python's PEFT library, and compares the outputs.
Needs the environment of make_fixtures.py:

    venv/bin/python tests/peft/check_saved.py
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file

import make_case_fixtures
import make_fixtures
import make_layer_fixtures

WEIGHTS = "adapter_model.safetensors"
ROOT = Path(__file__).parent.parent.parent


def check_case(path):
    """Every layer of the model computes what it did here."""
    case = json.loads((path / "case.json").read_text())
    base = make_case_fixtures.base_model(case["base"])
    model = PeftModel.from_pretrained(base, path).eval().base_model.model
    inputs = load_file(make_case_fixtures.CASES / case["io"] / "io.safetensors")
    worst = 0.0
    for leaf, expected in case["y"].items():
        module = model.get_submodule(leaf)
        x = inputs[f"x.{leaf}"]
        # The same input as here, where indices were written as floats.
        y = module(x.long() if "embed" in leaf or "transformer.w" in leaf else x)
        expected = torch.tensor(expected)
        error = (y.flatten() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert error < 1e-5, (path, leaf, error)
        worst = max(worst, error.item())
    return worst


def main():
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            ["cargo", "test", "--quiet", "--test", "suite", "--", "--ignored", "--exact",
             "peft::write_for_python"],
            cwd=ROOT, env={**os.environ, "PEFT_OUT": out}, check=True, stdout=subprocess.DEVNULL,
        )
        worst = 0.0
        directories = sorted(Path(out).iterdir())
        assert directories, "nothing was written"
        for path in directories:
            if (path / "case.json").exists():
                worst = max(worst, check_case(path))
                print(f"{path.name:<20} as expected")
                continue
            layers = path.name.startswith("layers_")
            base_model = (make_layer_fixtures if layers else make_fixtures).base_model
            config = PeftConfig.from_pretrained(path)
            config.inference_mode = False
            model = get_peft_model(base_model(), config)
            result = set_peft_model_state_dict(model, load_peft_weights(path))
            assert not result.unexpected_keys, result.unexpected_keys
            # PEFT may report only the base as missing: the file does not hold it.
            trained = {name for name, it in model.named_parameters() if it.requires_grad}
            lost = trained.intersection(result.missing_keys)
            assert trained and not lost, lost
            # After PEFT has saved the adapters again, every tensor has the same bits.
            model.save_pretrained(path / "again")
            ours, theirs = (load_file(it / WEIGHTS) for it in (path, path / "again"))
            assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), path
            model = PeftModel.from_pretrained(base_model(), path).eval()
            expected = json.loads((path / "expected.json").read_text())
            x = torch.tensor(expected["x"]).reshape((3, 8) if layers else (5, 6))
            error = (model(x).flatten() - torch.tensor(expected["y"])).abs().max().item()
            worst = max(worst, error)
            print(f"{path.name:<20} largest difference {error:.1e}")
            assert error < 1e-5, path
        print(f"{len(directories)} directories, largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
