"""Writes the adapters that the tests read, saved by Python's PEFT library, and the outputs of each.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.23.0 safetensors==0.8.0
    venv/bin/python tests/peft/make_fixtures.py
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"


class Model(torch.nn.Module):
    """Two hidden layers, a norm and a head. One hidden layer is square."""

    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(6, 8)
        self.fc2 = torch.nn.Linear(8, 8, bias=False)
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.head(self.norm(x))


def base_model():
    model = Model()
    model.load_state_dict(load_file(FIXTURES / "base.safetensors"))
    return model


def randomize(model, wanted):
    """Draws new values for the parameters, so that none is zero, one or equal to the base."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if wanted(name):
                parameter.copy_(0.5 * torch.randn_like(parameter))


def save(name, model, x, dtype=torch.float32):
    path = FIXTURES / name
    shutil.rmtree(path, ignore_errors=True)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name and dtype != torch.float32:
                # Rounds to the type of the file, so that the expected output is exact.
                parameter.copy_(parameter.to(dtype).float())
    y = model.eval()(x)
    model.save_pretrained(path)
    (path / "README.md").unlink()
    if dtype != torch.float32:
        weights = path / "adapter_model.safetensors"
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    expected = {"x": x.flatten().tolist(), "y": y.flatten().tolist()}
    (path / "expected.json").write_text(json.dumps(expected) + "\n")
    print(f"{name}: {sorted(load_file(path / 'adapter_model.safetensors'))}")


def case(name, dtype=torch.float32, also=lambda name: False, **options):
    # `init_lora_weights=False` also draws B. A B of zero would test nothing.
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})
    model = get_peft_model(base_model(), config)
    randomize(model, lambda it: ("lora_B" in it and it.endswith("bias")) or also(it))
    save(name, model, torch.randn(5, 6), dtype)


def trained():
    """An adapter like a trained one."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["fc1", "fc2", "head"], lora_dropout=0.1)
    model = get_peft_model(base_model(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    x = torch.randn(32, 6)
    target = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3:].sum(dim=1)], dim=1)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
    save("trained", model, torch.randn(5, 6))


def combined():
    """Two adapters, and their combinations by PEFT with the weights 0.7 and -0.4."""
    path = FIXTURES / "combined"
    shutil.rmtree(path, ignore_errors=True)
    options = {"target_modules": ["fc1", "head"], "init_lora_weights": False}
    model = get_peft_model(base_model(), LoraConfig(r=4, lora_alpha=6, **options), "one")
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=10, **options))
    names = ["one", "two"]
    for kind, arguments in [("linear", {}), ("cat", {}), ("ties", {"density": 0.6})]:
        model.add_weighted_adapter(
            ["one", "two"], [0.7, -0.4], kind, combination_type=kind, **arguments
        )
        names.append(kind)
    model.save_pretrained(path, selected_adapters=names)
    (path / "README.md").unlink()
    print(f"combined: {names}")


def main():
    torch.manual_seed(20)
    FIXTURES.mkdir(exist_ok=True)
    model = Model()
    randomize(model, lambda name: name.startswith("norm"))
    save_file(model.state_dict(), FIXTURES / "base.safetensors")

    case("plain", target_modules=["fc1", "fc2"])
    case("rslora", target_modules=["fc2", "head"], use_rslora=True)
    case(
        "patterns",
        target_modules=["fc1", "fc2", "head"],
        rank_pattern={"^fc1": 2, "fc.": 3},
        alpha_pattern={"head": 9},
    )
    case("lora_bias", target_modules=["fc1", "fc2"], lora_bias=True)
    case("bias_lora_only", target_modules=["fc1"], bias="lora_only",
         also=lambda name: name.endswith("fc1.base_layer.bias"))
    case("bias_all", target_modules=["fc1", "fc2"], bias="all",
         also=lambda name: name.endswith("bias"))
    case("modules_to_save", target_modules=["fc1"], modules_to_save=["norm", "head"],
         also=lambda name: "modules_to_save" in name)
    case("regex", target_modules="fc[12]")
    case("exclude", target_modules=["fc1", "fc2"], exclude_modules=["fc2"])
    case("f16", dtype=torch.float16, target_modules=["fc1", "head"])
    case("bf16", dtype=torch.bfloat16, target_modules=["fc1", "head"])
    trained()
    combined()


if __name__ == "__main__":
    main()
