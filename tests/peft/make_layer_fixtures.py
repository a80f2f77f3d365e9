"""Writes the adapters of embeddings and convolutions that the tests read, saved by Python's PEFT
library, and the outputs of each.

    venv/bin/python tests/peft/make_layer_fixtures.py

The packages are those of make_fixtures.py.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"


class Layers(torch.nn.Module):
    """An embedding and convolutions of several kinds, with kernels that are not square. None is
    dilated: PEFT's adapters do not support it.
    """

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.conv1 = torch.nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(1, 0), bias=False)
        self.grouped = torch.nn.Conv2d(5, 10, 3, padding=1, groups=5)

    def forward(self, ids):
        x = self.table(ids).transpose(1, 2)
        x = torch.relu(self.conv1(x)).reshape(-1, 2, 4, 8)
        return self.grouped(self.conv2(x)).flatten(1)


def base_model():
    model = Layers()
    model.load_state_dict(load_file(FIXTURES / "layers_base.safetensors"))
    return model


def case(name, **options):
    path = FIXTURES / name
    shutil.rmtree(path, ignore_errors=True)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options})
    model = get_peft_model(base_model(), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    ids = torch.randint(0, 11, (3, 8))
    y = model.eval()(ids)
    model.save_pretrained(path)
    (path / "README.md").unlink()
    expected = {"x": ids.flatten().tolist(), "y": y.flatten().tolist()}
    (path / "expected.json").write_text(json.dumps(expected) + "\n")
    tensors = load_file(path / "adapter_model.safetensors")
    print(f"{name}: {({key: list(tensor.shape) for key, tensor in tensors.items()})}")


def main():
    torch.manual_seed(21)
    save_file(Layers().state_dict(), FIXTURES / "layers_base.safetensors")
    case("layers_conv", target_modules=["conv1", "conv2"])
    case("layers_conv_bias", target_modules=["conv1", "conv2"], lora_bias=True)
    case("layers_embedding", target_modules=["table"])
    case("layers_all", target_modules=["table", "conv1", "conv2"], use_rslora=True,
         rank_pattern={"conv2": 2})
    case("layers_grouped", target_modules=["grouped"], r=5)


if __name__ == "__main__":
    main()
