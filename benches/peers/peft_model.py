"""Training steps of a whole model with PEFT's LoRA, on PyTorch.

Started by compare_models.py, as `peft_model.py MODEL METHOD`; MODEL is `minilm` (32 texts of 32 tokens),
`smollm2` (4 of 128), `resnet` (32 images of 32 x 32 pixels) or `conv` (one convolution of 64 to 64 channels,
3 x 3, that passes gradients on), with random weights, and METHOD is `lora` or `full`. With MODEL `product`, it
multiplies instead, and METHOD is the size, `ROWSxINNERxCOLUMNS`. The weights are of the type in the variable
`PRECISION`, `f32` or `bf16`. It answers as peft_step.py does.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from serve import DTYPE, serve

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


def conv(before, after, side, stride=1, bias=False):
    return torch.nn.Conv2d(before, after, side, stride, side // 2, bias=bias)


class Block(torch.nn.Module):
    def __init__(self, before, after):
        super().__init__()
        stride = 1 if before == after else 2
        self.first, self.first_norm = conv(before, after, 3, stride), torch.nn.GroupNorm(8, after)
        self.second, self.second_norm = conv(after, after, 3), torch.nn.GroupNorm(8, after)
        self.shortcut = torch.nn.Identity() if before == after else conv(before, after, 1, stride)

    def forward(self, x):
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.shortcut(x) + self.second_norm(self.second(y)))


class ResNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = conv(3, 32, 3), torch.nn.GroupNorm(8, 32)
        sizes = [32, 32, 32, 64, 64, 128, 128]
        self.blocks = torch.nn.Sequential(*map(Block, sizes, sizes[1:]))
        self.head = torch.nn.Linear(128, 10)

    def forward(self, images):
        x = self.blocks(torch.relu(self.stem_norm(self.stem(images))))
        return self.head(x.mean((2, 3)))


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(64, 64, 3, bias=True)

    def forward(self, images):
        return self.conv(images)


if model_name == "product":
    rows, inner, columns = map(int, method.split("x"))
    x, weight = torch.rand(rows, inner).to(DTYPE), torch.rand(columns, inner).to(DTYPE)
    with torch.no_grad():
        serve(lambda: torch.nn.functional.linear(x, weight))
    sys.exit()

also = None
if model_name == "minilm":
    model, targets, also = Classifier(), r"bert\.encoder\..*(query|key|value|dense)", ["head"]
    ids = torch.randint(0, 30522, (32, 32))
    loss = lambda model: model(ids).square().sum() / 32
elif model_name == "resnet":
    model, targets = ResNet(), r"stem|head|blocks\.\d+\.(first|second)|blocks\.[24]\.shortcut"
    images = torch.rand(32, 3, 32, 32).to(DTYPE)
    loss = lambda model: model(images).square().sum() / 32
elif model_name == "conv":
    model, targets = Conv(), ["conv"]
    images = torch.rand(32, 64, 32, 32).to(DTYPE).requires_grad_()

    def loss(model):
        images.grad = None
        return model(images).square().sum() / 32
else:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ))
    targets = "all-linear"
    ids = torch.randint(0, 49152, (4, 128))
    loss = lambda model: model(input_ids=ids, labels=ids).loss

model = model.to(DTYPE)
if method == "lora":
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=also)
    if model_name == "smollm2":
        config.task_type = "CAUSAL_LM"
    model = get_peft_model(model, config)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step():
    optimizer.zero_grad(set_to_none=True)
    loss(model).backward()
    optimizer.step()


serve(step)
