"""Training steps of a linear layer with PEFT's LoRA, on PyTorch.

Started by compare.py, as `peft_step.py METHOD TOKENS WIDTH RANK`; METHOD is `lora` or `full`. It says
`ready`, and then answers each line that comes, a number of steps, with the seconds that each took. The weights are of
the type in the variable `PRECISION`, `f32` or `bf16`.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model

from serve import DTYPE, serve

method = sys.argv[1]
tokens, width, rank = map(int, sys.argv[2:])
torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(width, width)

    def forward(self, x):
        return self.fc(x)


model = Model().to(DTYPE)
if method == "lora":
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, target_modules=["fc"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
data = torch.rand(tokens, width).to(DTYPE)


def step():
    # As in the middle of a model, where gradients go on to what is below.
    x = data.detach().requires_grad_()
    optimizer.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    optimizer.step()


serve(step)
