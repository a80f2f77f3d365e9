"""Writes adapters by the relatives of LoRA that the tests read, saved by Python's PEFT library: DoRA,
those that start as a part of the weight, and EVA. Needs what make_fixtures.py and make_layer_fixtures.py wrote.

    venv/bin/python tests/peft/make_method_fixtures.py

The packages are those of make_fixtures.py.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file

import make_fixtures
import make_layer_fixtures

FIXTURES = make_fixtures.FIXTURES


def write(name, model, x, extra=None, **options):
    path = FIXTURES / name
    shutil.rmtree(path, ignore_errors=True)
    y = model.eval()(x)
    model.save_pretrained(path, **options)
    (path / "README.md").unlink()
    expected = {"x": x.flatten().tolist(), "y": y.flatten().tolist(), **(extra or {})}
    (path / "expected.json").write_text(json.dumps(expected) + "\n")
    print(f"{name}: {sorted(load_file(path / 'adapter_model.safetensors'))}")


def randomize(model, factors=False):
    """Magnitudes that differ from the norms, by factors of 0.5 to 1.5, and factors that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif factors and "lora_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))


def dora():
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "use_dora": True}
    for name, more in [
        ("dora", {"target_modules": ["fc1", "head"]}),
        ("dora_rslora", {"target_modules": ["fc1", "fc2"], "use_rslora": True,
                         "rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 3}}),
    ]:
        model = get_peft_model(make_fixtures.base_model(), LoraConfig(**options, **more))
        randomize(model)
        write(name, model, torch.randn(5, 6))
    for name, targets in [("layers_dora_conv", ["conv1", "conv2"]), ("layers_dora_table", ["table"])]:
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True)
        model = get_peft_model(make_layer_fixtures.base_model(), config)
        randomize(model, factors=True)
        write(name, model, torch.randint(0, 11, (3, 8)))


def from_the_weight():
    """Trained for a few steps, and converted to plain LoRA. The updates that the adapters start as are
    noted, too: `s·B·A` as PyTorch has weights.
    """
    for init in ["pissa", "pissa_niter_8", "olora"]:
        for name, more in [(init, {}), (f"{init}_rslora", {"use_rslora": True})]:
            config = LoraConfig(r=2, lora_alpha=5, target_modules=["fc1", "fc2"],
                                init_lora_weights=init, **more)
            model = get_peft_model(make_fixtures.base_model(), config)
            with tempfile.TemporaryDirectory() as initial:
                # So that the initial adapter is read as one of plain factors.
                model.peft_config["default"].init_lora_weights = True
                model.save_pretrained(initial)
                layers = model.base_model.model
                starts = {
                    path: layers.get_submodule(path).get_delta_weight("default").flatten().tolist()
                    for path in ["fc1", "fc2"]
                }
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
                x, target = torch.randn(16, 6), torch.randn(16, 3)
                for _ in range(10):
                    optimizer.zero_grad()
                    torch.nn.functional.mse_loss(model(x), target).backward()
                    optimizer.step()
                model.peft_config["default"].init_lora_weights = init
                write(name, model, torch.randn(5, 6), {"starts": starts},
                      path_initial_model_for_weight_conversion=initial)


def eva():
    """What EVA makes of 64 inputs: ranks, and A as the matrix that projects on its rows, whose signs and
    order do not matter.
    """
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["fc1", "fc2", "head"],
                        init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = get_peft_model(make_fixtures.base_model(), config)
    x = torch.randn(64, 6) * torch.tensor([6.0, 2.5, 2.0, 1.6, 1.3, 1.0]) + 1.0
    initialize_lora_eva_weights(
        model, [x], forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )
    starts = {}
    for path in ["fc1", "fc2", "head"]:
        layer = model.base_model.model.get_submodule(path)
        if hasattr(layer, "lora_A"):
            a = layer.lora_A["default"].weight.detach()
            starts[path] = {
                "rank": a.shape[0],
                "scale": layer.scaling["default"],
                "projection": (a.T @ a).flatten().tolist(),
            }
    path = FIXTURES / "eva.json"
    path.write_text(json.dumps({"x": x.flatten().tolist(), "starts": starts}) + "\n")
    print("eva:", {path: (start["rank"], start["scale"]) for path, start in starts.items()})


def main():
    torch.manual_seed(21)
    dora()
    from_the_weight()
    eva()


if __name__ == "__main__":
    main()
