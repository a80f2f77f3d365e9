"""Training steps of a decoder on one long text with PEFT's LoRA, on PyTorch: `peft_long.py DIR LENGTH TEXTS WAY`,
where DIR is a model in Hugging Face's format, and WAY is `plain` or `checkpointing`. The weights are of the type in the
variable `PRECISION`, `f32` or `bf16`. Adapters of rank 8 are on all linear layers. Started by compare_lengths.py; it
answers as peft_step.py does.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from serve import DTYPE, serve

directory, length, texts, way = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPE)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
if way == "checkpointing":
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
model.train()
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
count = int(texts) * int(length)
ids = (torch.arange(count) * 7919 % model.config.vocab_size).reshape(int(texts), int(length))


def step():
    optimizer.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


serve(step)
