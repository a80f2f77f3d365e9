"""Training steps of a whole model with PEFT's LoRA, on PyTorch.

Started by compare_models.py, as `peft_model.py MODEL METHOD`; MODEL is `minilm` (32 texts of 32 tokens) or
`smollm2` (4 of 128), with random weights, and METHOD is `lora` or `full`. It answers as peft_step.py does.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from serve import serve

model_name, method = sys.argv[1:]
torch.manual_seed(0)


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = BertModel(BertConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=1536, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ), add_pooling_layer=False)
        self.head = torch.nn.Linear(384, 2)

    def forward(self, ids):
        mask = torch.ones_like(ids)
        return self.head(self.bert(ids, attention_mask=mask).last_hidden_state.mean(1))


if model_name == "minilm":
    model, targets, also = Classifier(), r"bert\.encoder\..*(query|key|value|dense)", ["head"]
    ids = torch.randint(0, 30522, (32, 32))
    loss = lambda model: model(ids).square().sum() / 32
else:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ))
    targets, also = "all-linear", None
    ids = torch.randint(0, 49152, (4, 128))
    loss = lambda model: model(input_ids=ids, labels=ids).loss

if method == "lora":
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=also)
    if model_name != "minilm":
        config.task_type = "CAUSAL_LM"
    model = get_peft_model(model, config)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step():
    optimizer.zero_grad(set_to_none=True)
    loss(model).backward()
    optimizer.step()


serve(step)
